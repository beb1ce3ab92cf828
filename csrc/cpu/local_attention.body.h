// Dilated local attention for one instruction set; see local_attention.cpp for the formula and the plan.

#include "cpu/arena.body.h"

// Taps that one pass of the inner kernels takes, and vectors of pixels: their product of sums stays in registers.
constexpr int max_taps = 5;
constexpr int max_vectors = SEGOPS_VECTOR_REGISTERS == 32 ? 4 : 2;

// sums[t][x] = sum_c a[c][x] * b[c][x + offset + t * step], for `Taps` taps and `Vectors` vectors of pixels.
template <typename A, int Taps, int Vectors>
[[gnu::noinline]] void scores(const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t channels,
                              int64_t step, A* sums, int64_t sums_stride) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> acc[Taps][Vectors] = {};
  const A* at[Taps];  // one pointer per tap: otherwise the compiler keeps one per load, on the stack
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) at[t] = b + t * step;
  for (int64_t c = 0; c < channels; ++c, a += a_stride) {
    Vec<A> left[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) left[v] = load(a + v * L);
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[t][v] += left[v] * load(at[t] + v * L);
      at[t] += b_stride;
      asm("" : "+r"(at[t]));
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(sums + t * sums_stride + v * L, acc[t][v]);
}

// out[c][x] (+)= sum_t weights[t][x + t * weights_step] * b[c][x + t * step].
template <typename A, int Taps, int Vectors>
[[gnu::noinline]] void mix(const A* weights, int64_t weights_stride, int64_t weights_step, const A* b,
                           int64_t b_stride, int64_t channels, int64_t step, A* out, int64_t out_stride, bool add) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> w[Taps][Vectors];
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) w[t][v] = load(weights + t * (weights_stride + weights_step) + v * L);
  const A* at[Taps];
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) at[t] = b + t * step;
  for (int64_t c = 0; c < channels; ++c, out += out_stride) {
    Vec<A> acc[Vectors] = {};
    if (add)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[v] = load(out + v * L);
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[v] += w[t][v] * load(at[t] + v * L);
      at[t] += b_stride;
      asm("" : "+r"(at[t]));
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(out + v * L, acc[v]);
  }
}

// Calls kernel.operator()<Taps, Vectors>(first_tap) for all taps of a row of `taps`, max_taps at a time.
template <int Vectors, typename Kernel>
[[gnu::always_inline]] inline void for_taps(int64_t taps, Kernel kernel) {
  for (int64_t first = 0; first < taps; first += max_taps) {
    switch (least(max_taps, taps - first)) {
      case 5: kernel.template operator()<5, Vectors>(first); break;
      case 4: kernel.template operator()<4, Vectors>(first); break;
      case 3: kernel.template operator()<3, Vectors>(first); break;
      case 2: kernel.template operator()<2, Vectors>(first); break;
      default: kernel.template operator()<1, Vectors>(first); break;
    }
  }
}
template <typename Kernel>
[[gnu::always_inline]] inline void for_taps(int64_t taps, int64_t vectors, Kernel kernel) {
  static_assert(max_vectors <= 4);
  switch (vectors) {
    case 4: if constexpr (max_vectors >= 4) for_taps<4>(taps, kernel); break;
    case 3: if constexpr (max_vectors >= 4) for_taps<3>(taps, kernel); break;
    case 2: for_taps<2>(taps, kernel); break;
    default: for_taps<1>(taps, kernel); break;
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

template <typename T, typename A = typename Sum<T>::type>
struct Worker {
  static constexpr int L = Simd<A>::lanes;
  static constexpr int block = max_vectors * L;  // pixels per pass

  const Problem& p;
  const int64_t kh, kw, taps, rh, rw, pad_w;  // pad_w: pixels that the outermost tap reaches outside the row
  const bool shift;
  const int64_t margin;       // pixels of a row buffer before its first, in whole vectors
  const int64_t tile;         // pixels of a row that are worked on at a time
  const int64_t row;          // every row buffer is [channels][row]; the tile's pixel x stands at margin + x

  Worker(const Problem& p, bool backward)
      : p(p), kh(p.kernel_h), kw(p.kernel_w), taps(kh * kw), rh(p.dilation_h), rw(p.dilation_w),
        pad_w(rw * (kw / 2)), shift(p.border == Border::shift),
        margin(round_up(pad_w, L) * (backward && shift ? 2 : 1)), tile(backward ? p.w : forward_tile()),
        row(row_length(tile)) {}

  int64_t row_length(int64_t pixels) const {
    const int64_t length = 2 * margin + round_up(pixels, L) + (shift && pixels < p.w ? L : 0);
    return length * int64_t(sizeof(A)) % 2048 ? length : length + L;  // rows a page apart would share cache sets
  }
  // Forward works on part of a row where whole rows of keys and values would leave no room in a core's cache.
  int64_t forward_tile() const {
    constexpr int64_t cache = 512 * 1024;
    const int64_t one = kh * (p.d + p.dv) * int64_t(sizeof(A));
    const int64_t room = (cache / one - 2 * margin) / block * block;
    return least(p.w, most(room, block));
  }

  // Groups: rows y = phase + g * rh of one dilation phase form a dense problem of their own.
  int64_t groups(int64_t phase) const { return (p.h - phase + rh - 1) / rh; }
  int64_t window_start(int64_t g, int64_t count) const {
    const int64_t s = g - kh / 2;
    return shift ? most(0, least(s, count - kh)) : s;
  }

  // Pixels x0 - margin .. x0 + tile + margin - 1 of one row of a head, converted. Outside the map stand zeros; for a
  // window pushed back inside, the pixel kernel * dilation further in, which that window has for each tap outside.
  void load_row(A* out, const Plane<T>& plane, int64_t y, int64_t x0, A factor) const {
    const int64_t from = x0 - margin, to = from + row, end = x0 + tile + margin;
    int64_t left = most(0, from), right = least(p.w, end);
    const int64_t period = kw * rw, wrapped_left = most(-pad_w, from), wrapped_right = least(p.w + pad_w, end);
    // Whole vectors are written: each part runs over into the next, which is written after it.
    if (shift && wrapped_left < 0)
      load_pixels(out + wrapped_left - from, plane, y, wrapped_left + period, -wrapped_left, factor);
    load_pixels(out + left - from, plane, y, left, right - left, factor);
    if (shift && wrapped_right > p.w)
      load_pixels(out + right - from, plane, y, right - period, wrapped_right - right, factor);
    if (shift) left = least(left, wrapped_left), right = most(right, wrapped_right);
    for (int64_t c = 0; c < plane.channels; ++c) {
      A* at = out + c * row - from;
      for (int64_t x = from; x < left; ++x) at[x] = 0;
      for (int64_t x = right; x < to; ++x) at[x] = 0;
    }
  }

  // out[c][row] = `count` pixels from x0 on, in whole vectors; the row of the next group is fetched on the way.
  void load_pixels(A* out, const Plane<T>& plane, int64_t y, int64_t x0, int64_t count, A factor) const {
    const T* in = plane.data + y * plane.y + x0 * plane.x;
    const int64_t ahead = y + rh < p.h ? rh * plane.y : 0;
    if (plane.x == 1) {
      for (int64_t c = 0; c < plane.channels; ++c) {
        const T* from = in + c * plane.c;
        int64_t x = 0;
        for (; x + L <= count; x += L) {
          __builtin_prefetch(from + ahead + x, 0, 2);
          store(out + c * row + x, widen(from + x) * factor);
        }
        if (x < count) store(out + c * row + x, widen(from + x, count - x) * factor);
      }
    } else if (plane.c == 1) {
      for (int64_t x = 0; x < count; x += L) {
        const int64_t last = least(L, count - x) - 1;
        int64_t c = 0;
        for (; c + L <= plane.channels; c += L) {
          Vec<A> square[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            const T* from = in + (x + least(i, last)) * plane.x + c;
            __builtin_prefetch(from + ahead, 0, 2);
            square[i] = widen(from) * factor;
          }
          transpose<A>(square);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(out + (c + i) * row + x, square[i]);
        }
        if (c == plane.channels) continue;
        Vec<A> square[L];
        for (int i = 0; i < L; ++i)
          square[i] = widen(in + (x + least(i, last)) * plane.x + c, plane.channels - c) * factor;
        transpose<A>(square);
        for (int i = 0; c + i < plane.channels; ++i) store(out + (c + i) * row + x, square[i]);
      }
    } else {
      for (int64_t c = 0; c < plane.channels; ++c)
        for (int64_t x = 0; x < count; ++x) out[c * row + x] = widen(in + c * plane.c + x * plane.x, 1)[0] * factor;
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
      for (int64_t x = 0; x < count; x += L) {
        const int64_t pixels = least(L, count - x);
        for (int64_t c = 0; c < plane.channels; c += L) {
          const int64_t channels = least(L, plane.channels - c);
          Vec<A> square[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = load(in + (c + least(i, channels - 1)) * in_stride + x) * factor;
          transpose<A>(square);
          T* to = out + x * plane.x + c;
          if (pixels == L && channels == L) {
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) narrow(square[i], to + i * plane.x);
          } else {
            for (int i = 0; i < pixels; ++i) narrow(square[i], to + i * plane.x, channels);
          }
        }
      }
    } else {
      for (int64_t c = 0; c < plane.channels; ++c)
        for (int64_t x = 0; x < count; ++x)
          narrow(Vec<A>{} + in[c * in_stride + x] * factor, out + c * plane.c + x * plane.x, 1);
    }
  }

  // Rows of one tensor, converted and padded, of the last `slots` groups that were asked for.
  struct Ring {
    A* data = nullptr;
    int64_t* held = nullptr;
    int64_t slots = 0, size = 0;
    void clear() { for (int64_t i = 0; i < slots; ++i) held[i] = -1; }
    A* slot(int64_t g) const { return data + g % slots * size; }
    bool take(int64_t g) { return held[g % slots] != g && (held[g % slots] = g, true); }
  };

  struct RingArena : Arena {
    Ring ring(int64_t slots, int64_t size) {
      Ring r;
      r.slots = slots, r.size = size;
      r.held = this->template take<int64_t>(slots), r.data = this->template take<A>(slots * size);
      return r;
    }
  };

  struct Task {
    int64_t n, head, phase, first, last, count;  // groups first..last-1 of the phase's count
    bool empty() const { return first >= last; }
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

  // sums[tap row's taps][x] of query row a (at its pixel x) with row b of the key; both point at pixel x of channel 0.
  void row_scores(const A* a, const A* b, int64_t channels, int64_t vectors, A* sums, int64_t stride) const {
    for_taps(kw, vectors, [&]<int Taps, int Vectors>(int64_t t) {
      scores<A, Taps, Vectors>(a, row, b - pad_w + t * rw, row, channels, rw, sums + t * stride, stride);
    });
  }
  void row_mix(const A* weights, int64_t stride, const A* b, int64_t channels, int64_t vectors, A* out,
               int64_t out_stride, bool add) const {
    for_taps(kw, vectors, [&]<int Taps, int Vectors>(int64_t t) {
      mix<A, Taps, Vectors>(weights + t * stride, stride, 0, b - pad_w + t * rw, row, channels, rw, out, out_stride,
                            add || t > 0);
    });
  }
  // The transpose: pixel x of a key row gathers from pixel x - offset of a query row, weights included.
  void row_mix_transposed(const A* weights, int64_t stride, const A* b, int64_t channels, int64_t vectors, A* out,
                          int64_t out_stride, bool add) const {
    for_taps(kw, vectors, [&]<int Taps, int Vectors>(int64_t t) {
      const int64_t at = pad_w - t * rw;
      mix<A, Taps, Vectors>(weights + t * stride + at, stride, -rw, b + at, row, channels, -rw, out, out_stride,
                            add || t > 0);
    });
  }

  struct Forward {
    Ring key, value;
    A *query, *sums, *out, *outside;
  };
  Forward forward_scratch(RingArena& arena) const {
    Forward s;
    s.key = arena.ring(least(kh, p.h), p.d * row), s.value = arena.ring(least(kh, p.h), p.dv * row);
    s.query = arena.template take<A>(p.d * row);
    s.sums = arena.template take<A>((taps + 1) * block);
    s.out = arena.template take<A>(p.dv * block);
    s.outside = arena.template take<A>(p.border == Border::mask ? kw * row : 0);
    return s;
  }

  void forward(Forward& s, const Task& t) const {
    for (int64_t x = 0; x < p.w; x += tile) forward_tile(s, t, x);
  }

  void forward_tile(Forward& s, const Task& t, int64_t x0) const {
    const Plane<T> query(p.query, t.n, t.head, p.d), key(p.key, t.n, t.head, p.d);
    const Plane<T> value(p.value, t.n, t.head, p.dv), out(p.out, t.n, t.head, p.dv);
    A* lse = static_cast<A*>(p.lse.data) + t.n * p.lse.n + t.head * p.lse.c;
    const A inf = __builtin_inf();
    const int64_t pixels = least(tile, p.w - x0);
    s.key.clear(), s.value.clear();
    if (p.border == Border::mask)
      for (int64_t j = 0; j < kw; ++j)
        for (int64_t x = 0; x < round_up(pixels, L); ++x) {
          const int64_t at = x0 + x - pad_w + j * rw;
          s.outside[j * row + x] = at >= 0 && at < p.w ? 0 : -inf;
        }
    for (int64_t g = t.first; g < t.last; ++g) {
      const int64_t y = t.phase + g * rh, start = window_start(g, t.count);
      load_row(s.query, query, y, x0, A(p.scale));
      for (int64_t i = most(0, -start); i < kh && start + i < t.count; ++i) {
        const int64_t source = t.phase + (start + i) * rh;
        if (s.key.take(start + i)) load_row(s.key.slot(start + i), key, source, x0, 1);
        if (s.value.take(start + i)) load_row(s.value.slot(start + i), value, source, x0, 1);
      }
      for (int64_t x = 0; x < pixels; x += block) {
        const int64_t vectors = least(max_vectors, (pixels - x + L - 1) / L);
        for (int64_t i = 0; i < kh; ++i) {
          A* sums = s.sums + i * kw * block;
          if (start + i < 0 || start + i >= t.count) {
            const A logit = p.border == Border::mask ? -inf : 0;
            for (int64_t e = 0; e < kw * block; ++e) sums[e] = logit;
            continue;
          }
          row_scores(s.query + margin + x, s.key.slot(start + i) + margin + x, p.d, vectors, sums, block);
          if (p.border == Border::mask)
            for (int64_t j = 0; j < kw; ++j)
              for (int64_t v = 0; v < vectors * L; v += L) {
                A* at = sums + j * block + v;
                store(at, load(at) + load(s.outside + j * row + x + v));
              }
        }
        softmax(s.sums, vectors);
        bool add = false;
        for (int64_t i = most(0, -start); i < kh && start + i < t.count; ++i, add = true)
          row_mix(s.sums + i * kw * block, block, s.value.slot(start + i) + margin + x, p.dv, vectors, s.out, block,
                  add);
        const int64_t count = least(block, pixels - x);
        store_row(s.out, block, out, y, x0 + x, count, 1);
        const A* row_lse = s.sums + taps * block;
        for (int64_t e = 0; e < count; ++e) lse[y * p.lse.y + (x0 + x + e) * p.lse.x] = row_lse[e];
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
    A *sums, *delta, *out, *temporary;
  };
  Backward backward_scratch(RingArena& arena) const {
    // A key row is seen from kh query rows; from up to 2 kh - 1 where windows are pushed back inside at both ends.
    const int64_t seen = least(shift ? 2 * kh - 1 : kh, p.h), reach = least(kh, p.h);
    Backward s;
    s.query = arena.ring(seen, p.d * row), s.grad = arena.ring(seen, p.dv * row);
    s.key = arena.ring(reach, p.d * row), s.value = arena.ring(reach, p.dv * row);
    s.probability = arena.ring(seen, taps * row), s.grad_score = arena.ring(seen, taps * row);
    s.sums = arena.template take<A>(kw * block);
    s.delta = arena.template take<A>(2 * row);
    s.temporary = arena.template take<A>(p.dv * row);
    s.out = arena.template take<A>(most(p.d, p.dv) * most(row, block));
    return s;
  }

  struct Heads {
    Plane<T> query, key, value, out, grad_out, grad_query, grad_key, grad_value;
    Heads(const Problem& p, const Task& t)
        : query(p.query, t.n, t.head, p.d), key(p.key, t.n, t.head, p.d), value(p.value, t.n, t.head, p.dv),
          out(p.out, t.n, t.head, p.dv), grad_out(p.grad_out, t.n, t.head, p.dv),
          grad_query(p.grad_query, t.n, t.head, p.d), grad_key(p.grad_key, t.n, t.head, p.d),
          grad_value(p.grad_value, t.n, t.head, p.dv) {}
  };

  // A = exp(S - lse) and dS = A * (<g, v> - delta) of query row g, and its grad_query if this task owns the row.
  void backward_row(Backward& s, const Task& t, const Heads& h, int64_t g) const {
    const int64_t y = t.phase + g * rh, start = window_start(g, t.count);
    load_row(s.query.slot(g), h.query, y, 0, A(p.scale));
    load_row(s.grad.slot(g), h.grad_out, y, 0, 1);
    load_row(s.temporary, h.out, y, 0, 1);
    const A* lse = static_cast<const A*>(p.lse.data) + t.n * p.lse.n + t.head * p.lse.c + y * p.lse.y;
    const A* grad_lse = static_cast<const A*>(p.grad_lse.data);
    if (grad_lse) grad_lse += t.n * p.grad_lse.n + t.head * p.grad_lse.c + y * p.grad_lse.y;
    A *delta = s.delta, *row_lse = s.delta + row;
    for (int64_t x = 0; x < p.w; ++x) {
      row_lse[x] = lse[x * p.lse.x];
      delta[x] = grad_lse ? -grad_lse[x * p.grad_lse.x] : 0;
    }
    for (int64_t x = p.w; x < round_up(p.w, L); ++x) row_lse[x] = delta[x] = 0;
    for (int64_t c = 0; c < p.dv; ++c) {
      const A *gradient = s.grad.slot(g) + c * row + margin, *out = s.temporary + c * row + margin;
      for (int64_t x = 0; x < p.w; ++x) delta[x] += gradient[x] * out[x];
    }
    for (int64_t i = most(0, -start); i < kh && start + i < t.count; ++i) {
      const int64_t source = t.phase + (start + i) * rh;
      if (s.key.take(start + i)) load_row(s.key.slot(start + i), h.key, source, 0, 1);
      if (s.value.take(start + i)) load_row(s.value.slot(start + i), h.value, source, 0, 1);
    }
    const bool owned = g >= t.first && g < t.last;
    for (int64_t x = 0; x < p.w; x += block) {
      const int64_t vectors = least(max_vectors, (p.w - x + L - 1) / L);
      bool add = false;
      for (int64_t i = most(0, -start); i < kh && start + i < t.count; ++i, add = true) {
        A* probability = s.probability.slot(g) + i * kw * row + margin + x;
        A* grad_score = s.grad_score.slot(g) + i * kw * row + margin + x;
        const A* key = s.key.slot(start + i) + margin + x;
        row_scores(s.query.slot(g) + margin + x, key, p.d, vectors, probability, row);
        row_scores(s.grad.slot(g) + margin + x, s.value.slot(start + i) + margin + x, p.dv, vectors, grad_score, row);
        for (int64_t j = 0; j < kw; ++j)
          for (int64_t v = 0; v < vectors * L; v += L) {
            const Vec<A> a = vexp<A>(load(probability + j * row + v) - load(row_lse + x + v));
            store(probability + j * row + v, a);
            store(grad_score + j * row + v, a * (load(grad_score + j * row + v) - load(delta + x + v)));
          }
        if (owned) row_mix(grad_score, row, key, p.d, vectors, s.out, block, add);
      }
      if (owned) store_row(s.out, block, h.grad_query, y, x, least(block, p.w - x), A(p.scale));
    }
    // Queries beyond the row do not exist: what the last vector computed there must not reach a key.
    for (int64_t e = 0; e < taps; ++e)
      for (int64_t x = p.w; x < round_up(p.w, L); ++x)
        s.probability.slot(g)[e * row + margin + x] = s.grad_score.slot(g)[e * row + margin + x] = 0;
  }

  // Gradient of one key (or value) row: weights are dS with the queries (or A with grad_out).
  void gather_row(const Backward& s, const Task& t, const Ring& weights, const Ring& from, int64_t channels,
                  int64_t u, const Plane<T>& plane) const {
    const int64_t low = shift ? -round_up(pad_w, L) : 0;
    const int64_t high = shift ? round_up(p.w + pad_w, L) : round_up(p.w, L);
    A* out = s.out + margin;
    for (int64_t x = low; x < high; x += block) {
      const int64_t vectors = least(max_vectors, (high - x) / L);
      bool add = false;
      for (int64_t g = first_query(u); g <= last_query(u, t.count); ++g, add = true) {
        const int64_t i = u - window_start(g, t.count);
        row_mix_transposed(weights.slot(g) + i * kw * row + margin + x, row, from.slot(g) + margin + x, channels,
                           vectors, out + x, row, add);
      }
    }
    if (shift)  // the transpose of load_row's padding
      for (int64_t c = 0; c < channels; ++c) {
        A* at = out + c * row;
        for (int64_t x = 1; x <= pad_w; ++x) at[kw * rw - x] += at[-x];
        for (int64_t x = 0; x < pad_w; ++x) at[p.w + x - kw * rw] += at[p.w + x];
      }
    store_row(out, row, plane, t.phase + u * rh, 0, p.w, 1);
  }

  // The query groups whose window holds key group u.
  int64_t first_query(int64_t u) const { return shift && u < kh ? 0 : most(0, u - kh / 2); }
  int64_t last_query(int64_t u, int64_t count) const {
    return shift && u >= count - kh ? count - 1 : least(count - 1, u + kh / 2);
  }

  void backward(Backward& s, const Task& t) const {
    const Heads h(p, t);
    for (Ring* ring : {&s.query, &s.grad, &s.key, &s.value, &s.probability, &s.grad_score}) ring->clear();
    for (int64_t u = t.first; u < t.last; ++u) {
      for (int64_t g = first_query(u); g <= last_query(u, t.count); ++g)
        if (s.probability.take(g)) backward_row(s, t, h, g);
      gather_row(s, t, s.grad_score, s.query, p.d, u, h.grad_key);
      gather_row(s, t, s.probability, s.grad, p.dv, u, h.grad_value);
    }
  }
};

template <typename T>
void run(const Problem& p, bool backward, int64_t begin, int64_t end, Scratch& scratch) {
  Worker<T> worker(p, backward);
  typename Worker<T>::RingArena arena{nullptr};
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
