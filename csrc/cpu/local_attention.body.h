// Dilated local attention for one instruction set; see local_attention.cpp for the formula and the plan.

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// One pass of the inner kernels takes so many taps, vectors of pixels and rows: the product of sums stays in registers,
// and each loaded vector of keys or values serves every row.
constexpr int max_taps = 5;
constexpr int max_vectors = SEGOPS_VECTOR_REGISTERS == 32 ? 2 : 1;
constexpr int max_rows = 2;

// sums[r][t][x] = sum_c a[r][c][x] * b[c][x + t * step].
template <typename A, int Taps, int Vectors, int Rows>
[[gnu::noinline]] void scores(const A* const* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t channels,
                              int64_t step, A* const* sums, int64_t sums_stride) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> acc[Rows][Taps][Vectors] = {};
  const A* from[Rows];
  for (int r = 0; r < Rows; ++r) from[r] = a[r];
  for (int64_t c = 0; c < channels; ++c, b += b_stride) {
    Vec<A> left[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) left[r][v] = load(from[r] + v * L);
      from[r] += a_stride;
    }
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const Vec<A> right = Rows > 1 ? load_once(b + t * step + v * L) : load(b + t * step + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r][t][v] += left[r][v] * right;
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) store(sums[r] + t * sums_stride + v * L, acc[r][t][v]);
}

// out[r][c][x] += sum_t weights[r][t][x + t * weights_step] * b[c][x + t * step].
template <typename A, int Taps, int Vectors, int Rows>
[[gnu::noinline]] void mix(const A* const* weights, int64_t weights_stride, int64_t weights_step, const A* b,
                           int64_t b_stride, int64_t channels, int64_t step, A* const* out, int64_t out_stride) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> w[Rows][Taps][Vectors];
  A* to[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    to[r] = out[r];
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) w[r][t][v] = load(weights[r] + t * (weights_stride + weights_step) + v * L);
  }
  for (int64_t c = 0; c < channels; ++c, b += b_stride) {
    Vec<A> acc[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[r][v] = load(to[r] + v * L);
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const Vec<A> right = Rows > 1 ? load_once(b + t * step + v * L) : load(b + t * step + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r][v] += w[r][t][v] * right;
      }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) store(to[r] + v * L, acc[r][v]);
      to[r] += out_stride;
    }
  }
}

// Calls kernel.operator()<Taps, Vectors, Rows>(first_tap) for all taps of a row of `taps`, max_taps at a time.
template <int Vectors, int Rows, typename Kernel>
[[gnu::always_inline]] inline void for_taps(int64_t taps, Kernel kernel) {
  for (int64_t first = 0; first < taps; first += max_taps) {
    switch (least(max_taps, taps - first)) {
      case 5: kernel.template operator()<5, Vectors, Rows>(first); break;
      case 4: kernel.template operator()<4, Vectors, Rows>(first); break;
      case 3: kernel.template operator()<3, Vectors, Rows>(first); break;
      case 2: kernel.template operator()<2, Vectors, Rows>(first); break;
      default: kernel.template operator()<1, Vectors, Rows>(first); break;
    }
  }
}
template <typename Kernel>
[[gnu::always_inline]] inline void for_taps(int64_t taps, int64_t vectors, int rows, Kernel kernel) {
  static_assert(max_vectors <= 2 && max_rows == 2);
  if (vectors == max_vectors) {
    rows == 2 ? for_taps<max_vectors, 2>(taps, kernel) : for_taps<max_vectors, 1>(taps, kernel);
  } else if constexpr (max_vectors > 1) {
    rows == 2 ? for_taps<1, 2>(taps, kernel) : for_taps<1, 1>(taps, kernel);
  }
}

// One head of one image: [channels, H, W] with strides, in storage type T.
template <typename T>
struct Plane {
  T* data;
  int64_t c, y, x, channels;
  Plane(const Strided& s, int64_t n, int64_t head, int64_t channels)
      : data(static_cast<T*>(s.data) + n * s.n + head * channels * s.c), c(s.c), y(s.y), x(s.x), channels(channels) {}
};

// Memory that the next rows will be read from, fetched a few lines at a time between passes: a core has room for some
// sixteen outstanding lines, so asking for whole rows at once would stall it.
struct Fetch {
  struct Piece { const char* at; int64_t stride, count, bytes; };
  static constexpr int64_t line = 64;
  Piece pieces[16];
  int64_t size = 0, current = 0, outer = 0, inner = 0, share = 0;

  template <typename T>
  void add(const Plane<T>& plane, int64_t y, int64_t w) {
    if (size == 16) return;
    const char* at = reinterpret_cast<const char*>(plane.data + y * plane.y);
    const int64_t one = sizeof(T);
    pieces[size++] = plane.c == 1 ? Piece{at, plane.x * one, w, plane.channels * one}
                                  : Piece{at, plane.c * one, plane.channels, w * plane.x * one};
  }
  void start(int64_t steps) {
    int64_t lines = 0;
    for (int64_t i = 0; i < size; ++i) lines += pieces[i].count * ((pieces[i].bytes + line - 1) / line);
    share = lines / most(steps, 1) + 1, current = outer = inner = 0;
  }
  void step() {
    for (int64_t i = 0; i < share && current < size; ++i) {
      const Piece& piece = pieces[current];
      __builtin_prefetch(piece.at + outer * piece.stride + inner, 0, 2);
      if ((inner += line) < piece.bytes) continue;
      inner = 0;
      if (++outer < piece.count) continue;
      outer = 0, ++current;
    }
  }
};

template <typename T, typename A = typename Sum<T>::type>
struct Worker {
  static constexpr int L = Simd<A>::lanes;
  static constexpr int block = max_vectors * L;  // pixels per pass

  const Problem& p;
  const int64_t kh, kw, taps, rh, rw, pad_w;  // pad_w: pixels that the outermost tap reaches outside the row
  const bool shift;
  const int64_t margin, row;  // every row buffer is [channels][row]; pixel x stands at margin + x
  const int64_t blocks_w;     // W rounded up to whole vectors

  explicit Worker(const Problem& p)
      : p(p), kh(p.kernel_h), kw(p.kernel_w), taps(kh * kw), rh(p.dilation_h), rw(p.dilation_w),
        pad_w(rw * (kw / 2)), shift(p.border == Border::shift), margin(round_up(pad_w, L) * (shift ? 2 : 1)),
        row(row_length()), blocks_w(round_up(p.w, L)) {}

  int64_t row_length() const {
    const int64_t length = 2 * margin + round_up(p.w, L) + block;
    return length * int64_t(sizeof(A)) % 2048 ? length : length + L;  // rows a page apart would share cache sets
  }

  // Groups: rows y = phase + g * rh of one dilation phase form a dense problem of their own.
  int64_t groups(int64_t phase) const { return (p.h - phase + rh - 1) / rh; }
  int64_t window_start(int64_t g, int64_t count) const {
    const int64_t s = g - kh / 2;
    return shift ? most(0, least(s, count - kh)) : s;
  }
  // The query groups whose window holds key group u.
  int64_t first_query(int64_t u) const { return shift && u < kh ? 0 : most(0, u - kh / 2); }
  int64_t last_query(int64_t u, int64_t count) const {
    return shift && u >= count - kh ? count - 1 : least(count - 1, u + kh / 2);
  }

  // One row of a head into a padded row buffer.
  void load_row(A* out, const Plane<T>& plane, int64_t y, A factor) const {
    const T* in = plane.data + y * plane.y;
    out += margin;
    if (plane.x == 1) {
      for (int64_t c = 0; c < plane.channels; ++c) {
        const T* from = in + c * plane.c;
        int64_t x = 0;
        for (; x + L <= p.w; x += L) store(out + c * row + x, widen(from + x) * factor);
        if (x < p.w) store(out + c * row + x, widen(from + x, p.w - x) * factor);
      }
    } else if (plane.c == 1) {
      for (int64_t x = 0; x < p.w; x += L)
        for (int64_t c = 0; c < plane.channels; c += L) {
          const int64_t pixels = least(L, p.w - x), channels = least(L, plane.channels - c);
          Vec<A> tile[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            const T* from = in + (x + least(i, pixels - 1)) * plane.x + c;
            tile[i] = (channels == L ? widen(from) : widen(from, channels)) * factor;
          }
          transpose<A>(tile);
          for (int i = 0; i < channels; ++i) store(out + (c + i) * row + x, tile[i]);
        }
    } else {
      for (int64_t c = 0; c < plane.channels; ++c)
        for (int64_t x = 0; x < p.w; ++x) out[c * row + x] = widen(in + c * plane.c + x * plane.x, 1)[0] * factor;
    }
    for (int64_t c = 0; c < plane.channels; ++c) {
      A* to = out + c * row;
      for (int64_t x = 1; x <= margin; ++x) to[-x] = 0;
      for (int64_t x = p.w; x < row - margin; ++x) to[x] = 0;
      if (!shift) continue;
      // A window pushed back inside sees, for each tap outside, the pixel kernel * dilation further in.
      for (int64_t x = 1; x <= pad_w; ++x) to[-x] = to[kw * rw - x];
      for (int64_t x = 0; x < pad_w; ++x) to[p.w + x] = to[p.w + x - kw * rw];
    }
  }

  // `count` pixels from x0 on; `in` is [channels][in_stride] with at least a vector's room after the last.
  void store_row(const A* in, int64_t in_stride, const Plane<T>& plane, int64_t y, int64_t x0, int64_t count,
                 A factor) const {
    T* out = plane.data + y * plane.y + x0 * plane.x;
    if (plane.x == 1) {
      for (int64_t c = 0; c < plane.channels; ++c) {
        T* to = out + c * plane.c;
        int64_t x = 0;
        for (; x + L <= count; x += L) narrow(load(in + c * in_stride + x) * factor, to + x);
        if (x < count) narrow(load(in + c * in_stride + x) * factor, to + x, count - x);
      }
    } else if (plane.c == 1) {
      for (int64_t x = 0; x < count; x += L)
        for (int64_t c = 0; c < plane.channels; c += L) {
          const int64_t pixels = least(L, count - x), channels = least(L, plane.channels - c);
          Vec<A> tile[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) tile[i] = load(in + (c + least(i, channels - 1)) * in_stride + x) * factor;
          transpose<A>(tile);
          for (int i = 0; i < pixels; ++i) {
            T* to = out + (x + i) * plane.x + c;
            channels == L ? narrow(tile[i], to) : narrow(tile[i], to, channels);
          }
        }
    } else {
      for (int64_t c = 0; c < plane.channels; ++c)
        for (int64_t x = 0; x < count; ++x)
          narrow(Vec<A>{} + in[c * in_stride + x] * factor, out + c * plane.c + x * plane.x, 1);
    }
  }

  // Rows of one tensor, converted and padded: those of the last `slots` groups.
  struct Ring {
    A* data = nullptr;
    int64_t slots = 0, size = 0;
    A* slot(int64_t g) const { return data + g % slots * size; }
  };

  // Scratch memory is one allocation: each part takes what it needs, first to be counted, then for real.
  struct Arena {
    char* base;
    int64_t used = 0;
    A* take(int64_t count) {
      A* at = base ? reinterpret_cast<A*>(base + used) : nullptr;
      used += round_up(count * int64_t(sizeof(A)), 64);
      return at;
    }
    Ring ring(int64_t slots, int64_t size) { return {take(slots * size), slots, size}; }
  };

  struct Task {
    int64_t n, head, phase, first, last, count;  // groups first..last-1 of the phase's count
  };
  Task task(int64_t index) const {
    Task t;
    const int64_t piece = index % p.pieces;
    index /= p.pieces;
    t.phase = index % p.phases, index /= p.phases;
    t.head = index % p.heads, t.n = index / p.heads;
    t.count = groups(t.phase);
    t.first = piece * t.count / p.pieces, t.last = (piece + 1) * t.count / p.pieces;
    return t;
  }

  struct Heads {
    Plane<T> query, key, value, out, grad_out, grad_query, grad_key, grad_value;
    Heads(const Problem& p, const Task& t)
        : query(p.query, t.n, t.head, p.d), key(p.key, t.n, t.head, p.d), value(p.value, t.n, t.head, p.dv),
          out(p.out, t.n, t.head, p.dv), grad_out(p.grad_out, t.n, t.head, p.dv),
          grad_query(p.grad_query, t.n, t.head, p.d), grad_key(p.grad_key, t.n, t.head, p.d),
          grad_value(p.grad_value, t.n, t.head, p.dv) {}
  };

  // Two neighbouring query rows and the key rows low..high-1 that their windows cover.
  struct Pair {
    int64_t g, rows, start[max_rows], low, high;
  };
  Pair pair(const Task& t, int64_t g, int64_t limit) const {
    Pair q{g, least(max_rows, limit - g), {}, 0, 0};
    for (int64_t r = 0; r < q.rows; ++r) q.start[r] = window_start(g + r, t.count);
    q.low = most(0, q.start[0]), q.high = least(t.count, q.start[q.rows - 1] + kh);
    return q;
  }
  // Calls visit(first row, number of rows) with the rows of the pair whose window holds key row b.
  template <typename Visit>
  [[gnu::always_inline]] void rows_that_see(const Pair& q, int64_t b, Visit visit) const {
    int64_t first = 0, rows = 0;
    for (int64_t r = 0; r < q.rows; ++r)
      if (b >= q.start[r] && b < q.start[r] + kh && rows++ == 0) first = r;
    if (rows) visit(first, int(rows));
  }

  // Key rows up to high-1 that the rings do not hold yet; `next` is the first of them.
  void load_keys(const Task& t, const Heads& h, const Ring& key, const Ring& value, int64_t low, int64_t high,
                 int64_t& next) const {
    for (next = most(next, low); next < high; ++next) {
      load_row(key.slot(next), h.key, t.phase + next * rh, 1);
      load_row(value.slot(next), h.value, t.phase + next * rh, 1);
    }
  }

  void row_scores(const A* const* a, const A* b, int64_t channels, int64_t vectors, int rows, A* const* sums,
                  int64_t stride) const {
    for_taps(kw, vectors, rows, [&]<int Taps, int Vectors, int Rows>(int64_t t) {
      A* to[Rows];
      for (int r = 0; r < Rows; ++r) to[r] = sums[r] + t * stride;
      scores<A, Taps, Vectors, Rows>(a, row, b - pad_w + t * rw, row, channels, rw, to, stride);
    });
  }
  void row_mix(const A* const* weights, int64_t stride, const A* b, int64_t channels, int64_t vectors, int rows,
               A* const* out, int64_t out_stride) const {
    for_taps(kw, vectors, rows, [&]<int Taps, int Vectors, int Rows>(int64_t t) {
      const A* from[Rows];
      for (int r = 0; r < Rows; ++r) from[r] = weights[r] + t * stride;
      mix<A, Taps, Vectors, Rows>(from, stride, 0, b - pad_w + t * rw, row, channels, rw, out, out_stride);
    });
  }
  // The transpose: pixel x of a key row gathers from pixel x - offset of a query row, weights included.
  void row_mix_transposed(const A* const* weights, int64_t stride, const A* b, int64_t channels, int64_t vectors,
                          int rows, A* const* out, int64_t out_stride) const {
    for_taps(kw, vectors, rows, [&]<int Taps, int Vectors, int Rows>(int64_t t) {
      const int64_t at = pad_w - t * rw;
      const A* from[Rows];
      for (int r = 0; r < Rows; ++r) from[r] = weights[r] + t * stride + at;
      mix<A, Taps, Vectors, Rows>(from, stride, -rw, b + at, row, channels, -rw, out, out_stride);
    });
  }

  struct Forward {
    Ring key, value;
    A *query, *sums, *out, *outside;
  };
  Forward forward_scratch(Arena& arena) const {
    Forward s;
    const int64_t seen = least(kh + max_rows - 1, p.h);
    s.key = arena.ring(seen, p.d * row), s.value = arena.ring(seen, p.dv * row);
    s.query = arena.take(max_rows * p.d * row);
    s.sums = arena.take(max_rows * (taps + 1) * block);
    s.out = arena.take(max_rows * p.dv * block);
    s.outside = arena.take(p.border == Border::mask ? kw * row : 0);
    return s;
  }

  void forward(Forward& s, const Task& t) const {
    const Heads h(p, t);
    A* lse = static_cast<A*>(p.lse.data) + t.n * p.lse.n + t.head * p.lse.c;
    const A inf = __builtin_inf();
    if (p.border == Border::mask)
      for (int64_t j = 0; j < kw; ++j)
        for (int64_t x = 0; x < blocks_w; ++x) {
          const int64_t at = x - pad_w + j * rw;
          s.outside[j * row + x] = at >= 0 && at < p.w ? 0 : -inf;
        }
    int64_t next = 0;
    for (int64_t g = t.first; g < t.last; g += max_rows) {
      const Pair q = pair(t, g, t.last);
      for (int64_t r = 0; r < q.rows; ++r) load_row(s.query + r * p.d * row, h.query, t.phase + (g + r) * rh, A(p.scale));
      load_keys(t, h, s.key, s.value, q.low, q.high, next);
      Fetch fetch;
      for (int64_t r = g + q.rows; r < least(g + q.rows + max_rows, t.last); ++r) {
        fetch.add(h.query, t.phase + r * rh, p.w);
        const int64_t b = q.high + r - g - q.rows;
        if (b < t.count) fetch.add(h.key, t.phase + b * rh, p.w), fetch.add(h.value, t.phase + b * rh, p.w);
      }
      fetch.start((p.w + block - 1) / block * 2 * (q.high - q.low));
      for (int64_t x = 0; x < p.w; x += block) {
        const int64_t vectors = least(max_vectors, (p.w - x + L - 1) / L);
        for (int64_t r = 0; r < q.rows; ++r)
          for (int64_t i = 0; i < kh; ++i)
            if (q.start[r] + i < 0 || q.start[r] + i >= t.count) {
              A* sums = s.sums + (r * (taps + 1) + i * kw) * block;
              for (int64_t e = 0; e < kw * block; ++e) sums[e] = p.border == Border::mask ? -inf : 0;
            }
        const auto sums_of = [&](int64_t r, int64_t b) {
          return s.sums + (r * (taps + 1) + (b - q.start[r]) * kw) * block;
        };
        for (int64_t b = q.low; b < q.high; ++b)
          rows_that_see(q, b, [&](int64_t first, int rows) {
            const A* queries[max_rows];
            A* sums[max_rows];
            for (int64_t r = 0; r < rows; ++r) {
              queries[r] = s.query + (first + r) * p.d * row + margin + x;
              sums[r] = sums_of(first + r, b);
            }
            row_scores(queries, s.key.slot(b) + margin + x, p.d, vectors, rows, sums, block);
            fetch.step();
            if (p.border != Border::mask) return;
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t j = 0; j < kw; ++j)
                for (int64_t v = 0; v < vectors * L; v += L)
                  store(sums[r] + j * block + v, load(sums[r] + j * block + v) + load(s.outside + j * row + x + v));
          });
        for (int64_t r = 0; r < q.rows; ++r) softmax(s.sums + r * (taps + 1) * block, vectors);
        for (int64_t e = 0; e < q.rows * p.dv * block; e += L) store(s.out + e, Vec<A>{});
        for (int64_t b = q.low; b < q.high; ++b)
          rows_that_see(q, b, [&](int64_t first, int rows) {
            const A* weights[max_rows];
            A* out[max_rows];
            for (int64_t r = 0; r < rows; ++r) {
              weights[r] = sums_of(first + r, b);
              out[r] = s.out + (first + r) * p.dv * block;
            }
            row_mix(weights, block, s.value.slot(b) + margin + x, p.dv, vectors, rows, out, block);
            fetch.step();
          });
        const int64_t count = least(block, p.w - x);
        for (int64_t r = 0; r < q.rows; ++r) {
          const int64_t y = t.phase + (g + r) * rh;
          store_row(s.out + r * p.dv * block, block, h.out, y, x, count, 1);
          const A* row_lse = s.sums + (r * (taps + 1) + taps) * block;
          for (int64_t e = 0; e < count; ++e) lse[y * p.lse.y + (x + e) * p.lse.x] = row_lse[e];
        }
      }
    }
  }

  // sums[taps][block] of logits become probabilities; the log-sum-exp stands after the last tap.
  void softmax(A* sums, int64_t vectors) const {
    for (int64_t v = 0; v < vectors * L; v += L) {
      Vec<A> top = load(sums + v);
      for (int64_t t = 1; t < taps; ++t) {
        const Vec<A> s = load(sums + t * block + v);
        top = s > top ? s : top;
      }
      Vec<A> total = {};
      for (int64_t t = 0; t < taps; ++t) {
        const Vec<A> e = vexp<A>(load(sums + t * block + v) - top);
        total += e;
        store(sums + t * block + v, e);
      }
      store(sums + taps * block + v, top + vlog<A>(total));
      const Vec<A> inverse = 1 / total;
      for (int64_t t = 0; t < taps; ++t) store(sums + t * block + v, load(sums + t * block + v) * inverse);
    }
  }

  struct Backward {
    Ring query, key, value, grad, probability, grad_score;
    A *delta, *lse, *out, *temporary;
  };
  Backward backward_scratch(Arena& arena) const {
    // A key row is seen from kh query rows; from up to 2 kh - 1 where windows are pushed back inside at both ends. Both
    // key rows and query rows go two at a time.
    const int64_t seen = least((shift ? 2 * kh - 1 : kh) + 2 * (max_rows - 1), p.h);
    const int64_t reach = least(kh + max_rows - 1, p.h);
    Backward s;
    s.query = arena.ring(seen, p.d * row), s.grad = arena.ring(seen, p.dv * row);
    s.key = arena.ring(reach, p.d * row), s.value = arena.ring(reach, p.dv * row);
    s.probability = arena.ring(seen, taps * row), s.grad_score = arena.ring(seen, taps * row);
    s.delta = arena.take(max_rows * row), s.lse = arena.take(max_rows * row);
    s.temporary = arena.take(p.dv * row);
    s.out = arena.take(max_rows * most(p.d, p.dv) * row);
    return s;
  }

  // The query row itself, and what its softmax needs: lse and delta = <g, out> - g_lse.
  void load_query(Backward& s, const Task& t, const Heads& h, int64_t g, int64_t r) const {
    const int64_t y = t.phase + g * rh;
    load_row(s.query.slot(g), h.query, y, A(p.scale));
    load_row(s.grad.slot(g), h.grad_out, y, 1);
    load_row(s.temporary, h.out, y, 1);
    const A* from = static_cast<const A*>(p.lse.data) + t.n * p.lse.n + t.head * p.lse.c + y * p.lse.y;
    const A* grad_lse = static_cast<const A*>(p.grad_lse.data);
    if (grad_lse) grad_lse += t.n * p.grad_lse.n + t.head * p.grad_lse.c + y * p.grad_lse.y;
    A *delta = s.delta + r * row, *lse = s.lse + r * row;
    for (int64_t x = 0; x < p.w; ++x) {
      lse[x] = from[x * p.lse.x];
      delta[x] = grad_lse ? -grad_lse[x * p.grad_lse.x] : 0;
    }
    for (int64_t x = p.w; x < blocks_w; ++x) lse[x] = delta[x] = 0;
    const A *gradient = s.grad.slot(g) + margin, *out = s.temporary + margin;
    for (int64_t c = 0; c < p.dv; ++c, gradient += row, out += row)
      for (int64_t x = 0; x < blocks_w; x += L)
        store(delta + x, load(delta + x) + load(gradient + x) * load(out + x));
  }

  // A = exp(S - lse) and dS = A * (<g, v> - delta) of a pair of query rows, and grad_query of those the task owns.
  void backward_pair(Backward& s, const Task& t, const Heads& h, const Pair& q, int64_t& next_key) const {
    for (int64_t r = 0; r < q.rows; ++r) load_query(s, t, h, q.g + r, r);
    load_keys(t, h, s.key, s.value, q.low, q.high, next_key);
    Fetch fetch;
    for (int64_t r = 0; r < max_rows; ++r) {
      const int64_t g = q.g + q.rows + r, b = q.high + r, y = t.phase + g * rh;
      if (g < t.count) fetch.add(h.query, y, p.w), fetch.add(h.grad_out, y, p.w), fetch.add(h.out, y, p.w);
      if (b < t.count) fetch.add(h.key, t.phase + b * rh, p.w), fetch.add(h.value, t.phase + b * rh, p.w);
    }
    fetch.start((p.w + block - 1) / block * (q.high - q.low));
    const bool owned = q.g + q.rows > t.first && q.g < t.last;
    for (int64_t x = 0; x < p.w; x += block) {
      const int64_t vectors = least(max_vectors, (p.w - x + L - 1) / L);
      if (owned)
        for (int64_t e = 0; e < q.rows * p.d * block; e += L) store(s.out + e, Vec<A>{});
      for (int64_t b = q.low; b < q.high; ++b)
        rows_that_see(q, b, [&](int64_t first, int rows) {
          const A *queries[max_rows], *gradients[max_rows];
          A *probability[max_rows], *grad_score[max_rows], *out[max_rows];
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t g = q.g + first + r, at = (b - q.start[first + r]) * kw * row + margin + x;
            queries[r] = s.query.slot(g) + margin + x, gradients[r] = s.grad.slot(g) + margin + x;
            probability[r] = s.probability.slot(g) + at, grad_score[r] = s.grad_score.slot(g) + at;
            out[r] = s.out + (first + r) * p.d * block;
          }
          const A* key = s.key.slot(b) + margin + x;
          row_scores(queries, key, p.d, vectors, rows, probability, row);
          row_scores(gradients, s.value.slot(b) + margin + x, p.dv, vectors, rows, grad_score, row);
          for (int64_t r = 0; r < rows; ++r) {
            const A *lse = s.lse + (first + r) * row + x, *delta = s.delta + (first + r) * row + x;
            for (int64_t j = 0; j < kw; ++j)
              for (int64_t v = 0; v < vectors * L; v += L) {
                A *a = probability[r] + j * row + v, *ds = grad_score[r] + j * row + v;
                const Vec<A> value = vexp<A>(load(a) - load(lse + v));
                store(a, value);
                store(ds, value * (load(ds) - load(delta + v)));
              }
          }
          if (owned) row_mix(grad_score, row, key, p.d, vectors, rows, out, block);
          fetch.step();
        });
      for (int64_t r = 0; r < q.rows; ++r)
        if (q.g + r >= t.first && q.g + r < t.last)
          store_row(s.out + r * p.d * block, block, h.grad_query, t.phase + (q.g + r) * rh, x,
                    least(block, p.w - x), A(p.scale));
    }
    // Queries beyond the row do not exist: what the last vector computed there must not reach a key.
    for (int64_t r = 0; r < q.rows; ++r)
      for (int64_t e = 0; e < taps; ++e)
        for (int64_t x = p.w; x < blocks_w; ++x) {
          s.probability.slot(q.g + r)[e * row + margin + x] = 0;
          s.grad_score.slot(q.g + r)[e * row + margin + x] = 0;
        }
  }

  // Gradient of key (or value) rows u.. of the task: weights are dS with the queries (or A with grad_out).
  void gather(const Backward& s, const Task& t, const Ring& weights, const Ring& from, int64_t channels, int64_t u,
              int64_t keys, const Plane<T>& plane) const {
    const int64_t low = shift ? -round_up(pad_w, L) : 0;
    const int64_t high = shift ? round_up(p.w + pad_w, L) : blocks_w;
    for (int64_t e = 0; e < keys * channels * row; e += L) store(s.out + e, Vec<A>{});
    for (int64_t x = low; x < high; x += block) {
      const int64_t vectors = least(max_vectors, (high - x) / L);
      for (int64_t g = first_query(u); g <= last_query(u + keys - 1, t.count); ++g) {
        const int64_t start = window_start(g, t.count);
        const A* w[max_rows];
        A* out[max_rows];
        int rows = 0;
        for (int64_t r = 0; r < keys; ++r)
          if (u + r >= start && u + r < start + kh) {
            w[rows] = weights.slot(g) + (u + r - start) * kw * row + margin + x;
            out[rows++] = s.out + r * channels * row + margin + x;
          }
        if (rows)
          row_mix_transposed(w, row, from.slot(g) + margin + x, channels, vectors, rows, out, row);
      }
    }
    for (int64_t r = 0; r < keys; ++r) {
      A* out = s.out + r * channels * row + margin;
      if (shift)  // the transpose of load_row's padding
        for (int64_t c = 0; c < channels; ++c) {
          A* at = out + c * row;
          for (int64_t x = 1; x <= pad_w; ++x) at[kw * rw - x] += at[-x];
          for (int64_t x = 0; x < pad_w; ++x) at[p.w + x - kw * rw] += at[p.w + x];
        }
      store_row(out, row, plane, t.phase + (u + r) * rh, 0, p.w, 1);
    }
  }

  void backward(Backward& s, const Task& t) const {
    const Heads h(p, t);
    if (t.first == t.last) return;
    const int64_t limit = last_query(t.last - 1, t.count) + 1;
    int64_t next_query = first_query(t.first), next_key = 0;
    for (int64_t u = t.first; u < t.last; u += max_rows) {
      const int64_t keys = least(max_rows, t.last - u);
      for (; next_query <= last_query(u + keys - 1, t.count); next_query += max_rows)
        backward_pair(s, t, h, pair(t, next_query, limit), next_key);
      gather(s, t, s.grad_score, s.query, p.d, u, keys, h.grad_key);
      gather(s, t, s.probability, s.grad, p.dv, u, keys, h.grad_value);
    }
  }
};

template <typename T>
void run(const Problem& p, bool backward, int64_t begin, int64_t end, Scratch& scratch) {
  Worker<T> worker(p);
  typename Worker<T>::Arena arena{nullptr};
  backward ? (void)worker.backward_scratch(arena) : (void)worker.forward_scratch(arena);
  arena = {scratch.zeroed(arena.used)};
  if (!arena.base) return;
  if (backward) {
    auto s = worker.backward_scratch(arena);
    for (int64_t i = begin; i < end; ++i) worker.backward(s, worker.task(i));
  } else {
    auto s = worker.forward_scratch(arena);
    for (int64_t i = begin; i < end; ++i) worker.forward(s, worker.task(i));
  }
}

inline void run(const Problem& p, bool backward, int64_t begin, int64_t end, Scratch& scratch) {
  switch (p.dtype) {
    case DType::float32: return run<float>(p, backward, begin, end, scratch);
    case DType::float64: return run<double>(p, backward, begin, end, scratch);
    case DType::bfloat16: return run<bf16>(p, backward, begin, end, scratch);
    case DType::float16: return run<fp16>(p, backward, begin, end, scratch);
  }
}
