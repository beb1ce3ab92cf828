// Multi-scale strip convolution for one instruction set; see multi_scale_strip_conv.cpp for the formula and the plan.

#include "cpu/arena.body.h"

constexpr int P = 8;  // outputs of a pass of the inner kernels, along W or along H
constexpr int max_taps = SEGOPS_VECTOR_REGISTERS == 32 ? 7 : 5;  // taps of a pass, in registers beside the outputs

// Where a pass reads: pixels of a row, or one pixel of several rows.
template <typename A>
struct AlongRow {
  const A* at;
  [[gnu::always_inline]] Vec<A> operator()(int i) const { return load(at + i * Simd<A>::lanes); }
};
template <typename A>
struct AlongColumn {
  const A* const* rows;
  int64_t offset;
  [[gnu::always_inline]] Vec<A> operator()(int i) const { return load(rows[i] + offset); }
};

// sums[p] += sum_t taps[t] in(p + t)
template <typename A, int Taps, typename In>
[[gnu::always_inline]] inline void correlate(Vec<A> (&sums)[P], const A* taps, In in) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> tap[Taps];
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) tap[t] = load(taps + t * L);
#pragma GCC unroll 16
  for (int r = 0; r < P + Taps - 1; ++r) {
    const Vec<A> v = in(r);
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t)
      if (r - t >= 0 && r - t < P) sums[r - t] += tap[t] * v;
  }
}

// tap_sums[t] += sum_p fixed[p] in(p + t)
template <typename A, int Taps, typename In>
[[gnu::always_inline]] inline void correlate_taps(A* tap_sums, const Vec<A> (&fixed)[P], In in) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> sum[Taps] = {};  // apart from the long sums: shorter chains of additions, and less error
#pragma GCC unroll 16
  for (int r = 0; r < P + Taps - 1; ++r) {
    const Vec<A> v = in(r);
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t)
      if (r - t >= 0 && r - t < P) sum[t] += fixed[r - t] * v;
  }
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) store(tap_sums + t * L, load(tap_sums + t * L) + sum[t]);
}

// Calls pass.operator()<Taps>(first) for all taps, max_taps at a time.
template <typename Pass>
[[gnu::always_inline]] inline void for_taps(int64_t taps, Pass pass) {
  int64_t first = 0;
  for (; first + max_taps <= taps; first += max_taps) pass.template operator()<max_taps>(first);
  switch (taps - first) {
    case 6: pass.template operator()<6>(first); break;
    case 5: pass.template operator()<5>(first); break;
    case 4: pass.template operator()<4>(first); break;
    case 3: pass.template operator()<3>(first); break;
    case 2: pass.template operator()<2>(first); break;
    case 1: pass.template operator()<1>(first); break;
    default: break;
  }
}

// Where channels are adjacent in memory a pixel is a cache line of its own, which nothing but the program foresees: the
// lines that will be wanted are asked for one by one, between products. at(x) is wanted soon after pixel x was computed.
struct Ahead {
  const char* data;
  int64_t step;
  [[gnu::always_inline]] const char* at(int64_t x) const { return data + x * step; }
};

// out(x) = bias + sum_ij taps[i][j] in[i](x + j) for x in from .. to - 1.
template <typename A>
[[gnu::noinline]] void convolve_row(A* out, const A* const* in, int64_t kh, int64_t kw, const A* taps, const A* bias,
                                    int64_t from, int64_t to, Ahead ahead) {
  constexpr int L = Simd<A>::lanes;
  for (int64_t x = from; x < to; x += P) {
    Vec<A> sums[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sums[p] = load(bias), __builtin_prefetch(ahead.at(x + p), 0, 2);
    for (int64_t i = 0; i < kh; ++i)
      for_taps(kw, [&]<int Taps>(int64_t first) __attribute__((always_inline)) {
        correlate<A, Taps>(sums, taps + (i * kw + first) * L, AlongRow<A>{in[i] + (x + first) * L});
      });
    const int64_t count = least(P, to - x);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
      if (p < count) store(out + (x + p) * L, sums[p]);
  }
}

// The adjoint, with the taps in reverse order, and the taps' gradients:
//   out(x)         (+)= sum_ij taps[i][j] in[i](x + j)         for x in from .. to - 1
//   tap_sums[i][j]  +=  sum_x fixed(x) in[i](x + j)            over those of them in own_from .. own_to - 1
template <typename A>
[[gnu::noinline]] void convolve_row_backward(A* out, bool add, A* tap_sums, const A* fixed, const A* const* in,
                                             int64_t kh, int64_t kw, const A* taps, int64_t from, int64_t to,
                                             int64_t own_from, int64_t own_to, Ahead ahead) {
  constexpr int L = Simd<A>::lanes;
  for (int64_t x = from; x < to; x += P) {
    const int64_t count = least(P, to - x);
    Vec<A> sums[P] = {}, still[P];
    if (add)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[p] = load(out + (x + p) * L);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) __builtin_prefetch(ahead.at(x + p), 0, 2);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
      still[p] = x + p >= own_from && x + p < own_to ? load(fixed + (x + p) * L) : Vec<A>{};
    for (int64_t i = 0; i < kh; ++i)
      for_taps(kw, [&]<int Taps>(int64_t first) __attribute__((always_inline)) {
        const AlongRow<A> row{in[i] + (x + first) * L};
        correlate<A, Taps>(sums, taps + (i * kw + first) * L, row);
        correlate_taps<A, Taps>(tap_sums + (i * kw + first) * L, still, row);
      });
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
      if (p < count) store(out + (x + p) * L, sums[p]);
  }
}

// out[p][x] = centre[p](x) + bias + sum over pairs of sum_t taps[t] rows[p + t](x), `count` pixels from `from` on.
// The pairs' rows and taps follow one another, with a row of 1 x k taps before those of k x 1.
template <typename A>
[[gnu::noinline]] void convolve_columns(A* out, int64_t out_pitch, const A* const* centre, const A* bias,
                                        const A* const* rows, const A* taps, const int64_t* lengths, int64_t pairs,
                                        int64_t from, int64_t count, Ahead ahead, int64_t ahead_pitch) {
  constexpr int L = Simd<A>::lanes;
  for (int64_t x = 0; x < count; ++x) {
    const int64_t offset = (from + x) * L;
    Vec<A> sums[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      sums[p] = load(centre[p] + offset) + load(bias);
      __builtin_prefetch(ahead.at(from + x) + p * ahead_pitch, 1, 2);
    }
    const A* const* in = rows;
    const A* tap = taps;
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t k = lengths[i];
      tap += k * L;
      for_taps(k, [&]<int Taps>(int64_t first) __attribute__((always_inline)) {
        correlate<A, Taps>(sums, tap + first * L, AlongColumn<A>{in + first, offset});
      });
      tap += k * L;
      in += P + k - 1;
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store(out + p * out_pitch + x * L, sums[p]);
  }
}

// The adjoint of one k x 1 strip, and its taps' gradients, for x in from .. to - 1:
//   out[p](x) = sum_t taps[t] in[p + t](x),   tap_sums[t] += sum_p fixed[p](x) in[p + t](x)
template <typename A>
[[gnu::noinline]] void convolve_columns_backward(A* out, int64_t out_pitch, A* tap_sums, const A* const* fixed,
                                                 const A* const* in, const A* taps, int64_t k, int64_t from,
                                                 int64_t to) {
  constexpr int L = Simd<A>::lanes;
  for (int64_t x = from; x < to; ++x) {
    const int64_t offset = x * L;
    Vec<A> sums[P] = {}, still[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) still[p] = load(fixed[p] + offset);
    for_taps(k, [&]<int Taps>(int64_t first) __attribute__((always_inline)) {
      const AlongColumn<A> column{in + first, offset};
      correlate<A, Taps>(sums, taps + first * L, column);
      correlate_taps<A, Taps>(tap_sums + first * L, still, column);
    });
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store(out + p * out_pitch + offset, sums[p]);
  }
}

// sum += row(x) for x in from .. to - 1.
template <typename A>
[[gnu::noinline]] void add_row(A* sum, const A* row, int64_t from, int64_t to) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> sums[4] = {load(sum)};
  int64_t x = from;
  for (; x + 4 <= to; x += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += load(row + (x + i) * L);
  for (; x < to; ++x) sums[0] += load(row + x * L);
  store(sum, (sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows of pixels, each a vector of channels; outside the map they are zero. Pointers are to pixel 0 of the map, though a
// row only holds the pixels around a tile.
template <typename A>
struct Ring {
  A* data = nullptr;
  const A* zeros = nullptr;
  int64_t rows = 0, height = 0, pitch = 0;
  A* row(int64_t y) const { return data + y % rows * pitch; }
  const A* at(int64_t y) const { return y < 0 || y >= height ? zeros : row(y); }
};

template <typename T, typename A = typename Sum<T>::type>
struct Worker {
  static constexpr int L = Simd<A>::lanes;
  static constexpr int columns = 16;  // pixels that wait to be stored

  const Problem& p;
  const int64_t entries;  // vectors of taps, then of biases
  const int64_t rh, rw, reach, margin, tile, pitch;
  const int64_t tiles, pieces, tasks;  // of a block of channels: tasks = tiles * n * pieces
  int64_t tile_at = -1;                // what the rows were made for

  // The task: some channels of an image, and the rows and columns of its output.
  int64_t image = 0, channel = 0, channels = 0, y0 = 0, y1 = 0, x0 = 0, x1 = 0;

  A *memory = nullptr, *rows_at = nullptr;
  const A *taps = nullptr, *reversed = nullptr, *biases = nullptr, *all_biases = nullptr;
  A *sums = nullptr, *waiting = nullptr, *product = nullptr;
  double* totals = nullptr;
  const A** table = nullptr;
  A* zeros = nullptr;

  explicit Worker(const Problem& p)
      : p(p), entries(p.entries()), rh(p.kh / 2), rw(p.kw / 2), reach(p.longest() / 2), margin(reach + rw),
        tile(tile_width()), pitch(row_pitch(tile + 2 * margin + columns)), tiles((p.w + tile - 1) / tile),
        pieces(p.pieces), tasks(tiles * p.n * pieces) {}

  int64_t blocks() const { return (p.c + L - 1) / L; }
  int64_t ring_rows() const {
    return p.backward ? (p.longest() - 1 + P) + 2 * (p.kh - 1 + P) + 3 * P + 1
                      : p.kh + (P + reach) + p.pairs * (P - 1) + p.all_lengths();
  }
  // As wide as a core's cache can hold the rows of.
  int64_t tile_width() const {
    constexpr int64_t cache = 1024 * 1024;
    const int64_t room = cache / (ring_rows() * SEGOPS_VECTOR_BYTES) - 2 * margin;
    const int64_t most_columns = most(room, 32), count = (p.w + most_columns - 1) / most_columns;
    return round_up((p.w + count - 1) / count, P);
  }
  // An odd number of cache lines: the rows of one column lie in different sets.
  static int64_t row_pitch(int64_t pixels) {
    constexpr int64_t line = 64 / SEGOPS_VECTOR_BYTES;
    return (round_up(pixels, 2 * line) + line) * L;
  }

  int64_t table_length() const { return P + p.kh + p.pairs * (P - 1) + p.all_lengths(); }
  int64_t bytes() const {
    const int64_t vectors = entries + (P + 1) * columns;
    return (ring_rows() + 1) * pitch * int64_t(sizeof(A)) + vectors * SEGOPS_VECTOR_BYTES +
           entries * L * int64_t(sizeof(double)) + (table_length() + 64) * int64_t(sizeof(void*));
  }
  void take(char* at) {
    totals = reinterpret_cast<double*>(at), at += entries * L * sizeof(double);
    memory = reinterpret_cast<A*>(at);
    A* next = memory;
    const auto some = [&next](int64_t vectors) { return next += vectors * L, next - vectors * L; };
    sums = some(entries), waiting = some(P * columns), product = some(columns);
    next = memory + round_up(next - memory, 64 / int64_t(sizeof(A)));
    rows_at = next, next += (ring_rows() + 1) * pitch;
    table = reinterpret_cast<const A**>(next);
  }

  // Tasks of one image follow one another: where channels are adjacent in memory, they share its pages and cache lines.
  // Returns the place of the task's sums, those of a block side by side.
  int64_t prepare(int64_t task) {
    const int64_t block = task % blocks(), rest = task / blocks(), tile_index = rest / (p.n * pieces);
    image = rest / pieces % p.n;
    const int64_t piece = rest % pieces;
    y0 = p.h * piece / pieces, y1 = p.h * (piece + 1) / pieces;
    x0 = tile_index * tile, x1 = least(p.w, x0 + tile);
    channel = block * L, channels = least(L, p.c - channel);
    if (tile_index != tile_at) __builtin_memset(rows_at, 0, (ring_rows() + 1) * pitch * sizeof(A));
    tile_at = tile_index;
    zeros = rows_at - (x0 - margin) * L;
    taps = static_cast<const A*>(p.tables) + block * table_vectors() * L;
    reversed = taps + p.taps() * L, biases = reversed + p.taps() * L, all_biases = biases + (1 + 2 * p.pairs) * L;
    return block * tasks + rest;
  }

  // Of a block: its taps, those in reverse order, its biases, and the sum of the k x 1 biases.
  int64_t table_vectors() const { return 2 * p.taps() + 2 + 2 * p.pairs; }
  void make_table(int64_t block) const {
    A* const taps = static_cast<A*>(p.tables) + block * table_vectors() * L;
    A *const reversed = taps + p.taps() * L, *const biases = reversed + p.taps() * L;
    const auto fill = [&](A* out, const Matrix& m, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < L; ++c) {
          const T* at = static_cast<const T*>(m.data) + (block * L + c) * m.row + i * m.column;
          out[i * L + c] = block * L + c < p.c ? widen(at, 1)[0] : A(0);
        }
    };
    fill(taps, p.taps_of, p.taps());
    fill(biases, p.biases_of, 1 + 2 * p.pairs);
    int64_t from = 0;
    const auto reverse = [&](int64_t count) {
      for (int64_t i = 0; i < count; ++i) store(reversed + (from + count - 1 - i) * L, load(taps + (from + i) * L));
      from += count;
    };
    reverse(p.kh * p.kw);
    for (int64_t i = 0; i < p.pairs; ++i) reverse(p.lengths[i]), reverse(p.lengths[i]);
    Vec<A> all = {};
    for (int64_t i = 0; i < p.pairs; ++i) all += load(biases + (2 + 2 * i) * L);
    store(biases + (1 + 2 * p.pairs) * L, all);
  }

  Ring<A> ring(int64_t& used, int64_t rows) {
    used += rows;
    return {zeros + (1 + used - rows) * pitch, zeros, rows, p.h, pitch};
  }

  // out[i] = pixel from + i of row y.
  void fetch(A* out, const Strided& s, int64_t y, int64_t from, int64_t count) const {
    const T* in = static_cast<const T*>(s.data) + image * s.n + channel * s.c + y * s.y + from * s.x;
    if (s.c == 1) {
      if (channels == L)
        for (int64_t x = 0; x < count; ++x) store(out + x * L, widen(in + x * s.x));
      else
        for (int64_t x = 0; x < count; ++x) store(out + x * L, widen(in + x * s.x, channels));
    } else if (s.x == 1) {
      for (int64_t x = 0; x < count; x += L) {
        const int64_t some = least(L, count - x);
        Vec<A> square[L];
        if (channels == L && some == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = widen(in + i * s.c + x);
        } else {
          for (int i = 0; i < L; ++i) square[i] = i < channels ? widen(in + i * s.c + x, some) : Vec<A>{};
        }
        transpose<A>(square);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (i < some) store(out + (x + i) * L, square[i]);
      }
    } else {
      for (int64_t x = 0; x < count; ++x)
        for (int64_t c = 0; c < channels; ++c) out[x * L + c] = widen(in + c * s.c + x * s.x, 1)[0];
    }
  }

  void put(const A* from, const Strided& s, int64_t y, int64_t x, int64_t count) const {
    T* out = static_cast<T*>(s.data) + image * s.n + channel * s.c + y * s.y + x * s.x;
    if (s.c == 1) {
      if (channels == L)
        for (int64_t i = 0; i < count; ++i) narrow(load(from + i * L), out + i * s.x);
      else
        for (int64_t i = 0; i < count; ++i) narrow(load(from + i * L), out + i * s.x, channels);
    } else if (s.x == 1) {
      for (int64_t i = 0; i < count; i += L) {
        const int64_t some = least(L, count - i);
        Vec<A> square[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) square[j] = load(from + (i + j) * L);  // `waiting` has whole blocks
        transpose<A>(square);
        if (channels == L && some == L) {
#pragma GCC unroll 16
          for (int c = 0; c < L; ++c) narrow(square[c], out + c * s.c + i);
        } else {
          for (int c = 0; c < channels; ++c) narrow(square[c], out + c * s.c + i, some);
        }
      }
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < channels; ++c)
          narrow(Vec<A>{} + from[i * L + c], out + c * s.c + i * s.x, 1);
    }
  }

  // Row y of a map; past the last row, of the next channels'. Nothing new where a row is contiguous.
  Ahead ahead(const Strided& s, int64_t y) const {
    if (s.c != 1 || !s.data) return {reinterpret_cast<const char*>(waiting), 0};
    const T* at = static_cast<const T*>(s.data) + image * s.n + channel;
    at += y < p.h ? y * s.y : (y - p.h) * s.y + L;
    return {reinterpret_cast<const char*>(at), s.x * int64_t(sizeof(T))};
  }

  void load_row(const Ring<A>& ring, const Strided& s, int64_t y) const {
    const int64_t from = most(0, x0 - margin), to = least(p.w, x1 + margin);
    fetch(ring.row(y) + from * L, s, y, from, to - from);
  }

  // Row y of a = dw(x) + bias from the rows of x around it.
  void centre_row(A* out, const Ring<A>& x, int64_t y) {
    for (int64_t i = 0; i < p.kh; ++i) table[i] = x.at(y - rh + i) - rw * L;
    convolve_row<A>(out, table, p.kh, p.kw, taps, biases, most(0, x0 - reach), least(p.w, x1 + reach),
                    ahead(p.x, y + rh + P));
  }

  void forward() {
    int64_t used = 0;
    const Ring<A> x = ring(used, p.kh), a = ring(used, P + reach);
    int64_t next_x = most(0, y0 - reach - rh), next_a = most(0, y0 - reach);
    for (int64_t y = y0 - round_up(2 * reach, P); y < y1; y += P) {  // before y0: the rows that strips reach up to
      const int64_t last = least(y1, y + P);
      for (const int64_t a_to = least(p.h, last + reach); next_a < a_to; ++next_a) {
        for (const int64_t x_to = least(p.h, next_a + rh + 1); next_x < x_to; ++next_x) load_row(x, p.x, next_x);
        centre_row(a.row(next_a), x, next_a);
      }
      const A** rows = table + P;
      const A* across = taps + p.kh * p.kw * L;
      for (int64_t i = 0, line = used; i < p.pairs; ++i) {
        const int64_t k = p.lengths[i], r = k / 2;
        const Ring<A> h = ring(line, k - 1 + P);
        for (int64_t at = most(0, most(y0 - r, y + r)); at < least(p.h, last + r); ++at) {
          const A* in = a.row(at) - r * L;
          convolve_row<A>(h.row(at), &in, 1, k, across, biases + (1 + 2 * i) * L, x0, x1, ahead({}, 0));
        }
        for (int64_t j = 0; j < P + k - 1; ++j) rows[j] = h.at(y - r + j);
        rows += P + k - 1, across += 2 * k * L;
      }
      if (y < y0) continue;
      for (int j = 0; j < P; ++j) table[j] = a.at(y + j);
      for (int64_t from = x0; from < x1; from += columns) {
        const int64_t count = least(columns, x1 - from);
        convolve_columns<A>(waiting, columns * L, table, all_biases, table + P, taps + p.kh * p.kw * L, p.lengths,
                            p.pairs, from, count, ahead(p.out, y + P),
                            p.out.c == 1 ? p.out.y * int64_t(sizeof(T)) : 0);
        for (int64_t at = y; at < last; ++at) put(waiting + (at - y) * columns * L, p.out, at, from, count);
      }
    }
  }

  void backward(int64_t place) {
    int64_t used = 0;
    const Ring<A> g = ring(used, p.longest() - 1 + P), x = ring(used, p.kh - 1 + P), da = ring(used, p.kh - 1 + P);
    A* const a = zeros + (1 + used) * pitch;  // P rows, as h and u
    A *const h = a + P * pitch, *const u = h + P * pitch, *const dx = u + P * pitch;
    
    const int64_t first = most(0, y0 - rh), end = least(p.h, y1 + rh);  // of da
    int64_t next_g = most(0, first - reach), next_x = most(0, first - rh), next_dx = y0;
    for (int64_t y = first; y < end; y += P) {
      const int64_t last = least(end, y + P);
      const auto own = [&](int64_t at) { return at >= y0 && at < y1; };
      for (const int64_t to = least(p.h, y + P + reach); next_g < to; ++next_g) load_row(g, p.grad_out, next_g);
      for (const int64_t to = least(p.h, y + P + rh); next_x < to; ++next_x) load_row(x, p.x, next_x);
      for (int64_t at = y; at < last; ++at) {
        const int64_t from = most(0, x0 - rw), to = least(p.w, x1 + rw);
        __builtin_memcpy(da.row(at) + from * L, g.row(at) + from * L, (to - from) * L * sizeof(A));
        if (!own(at)) continue;
        centre_row(a + (at - y) * pitch, x, at);
        if (p.pairs > 0) add_row<A>(sums + (p.taps() + 2) * L, g.row(at), x0, x1);
      }
      const A* across = reversed + p.kh * p.kw * L;
      A* across_sums = sums + p.kh * p.kw * L;
      for (int64_t i = 0; i < p.pairs; ++i) {
        const int64_t k = p.lengths[i], r = k / 2;
        for (int64_t at = y; at < y + P; ++at) {
          A* const row = h + (at - y) * pitch;
          table[at - y] = own(at) ? row : zeros;
          const A* in = a + (at - y) * pitch - r * L;
          if (own(at))
            convolve_row<A>(row, &in, 1, k, taps + (across - reversed), biases + (1 + 2 * i) * L, x0, x1, ahead({}, 0));
        }
        for (int64_t j = 0; j < P + k - 1; ++j) table[P + j] = g.at(y - r + j);
        convolve_columns_backward<A>(u, pitch, across_sums + k * L, table, table + P, across + k * L, k,
                                     most(0, x0 - margin), least(p.w, x1 + margin));
        for (int64_t at = y; at < last; ++at) {
          const A* const row = u + (at - y) * pitch;
          const A* in = row - r * L;
          convolve_row_backward<A>(da.row(at), true, across_sums, a + (at - y) * pitch, &in, 1, k, across,
                                   most(0, x0 - rw), least(p.w, x1 + rw), x0, own(at) ? x1 : x0,
                                   ahead(i == 0 ? p.grad_out : Strided(), at + P + reach));
          if (own(at)) add_row<A>(sums + (p.taps() + 1 + 2 * i) * L, row, x0, x1);
        }
        across += 2 * k * L, across_sums += 2 * k * L;
      }
      for (int64_t at = y; at < last; ++at)
        if (own(at)) add_row<A>(sums + p.taps() * L, da.row(at), x0, x1);
      for (const int64_t to = last == end ? y1 : least(y1, last - rh); next_dx < to; ++next_dx) {
        for (int64_t i = 0; i < p.kh; ++i) table[i] = da.at(next_dx - rh + i) - rw * L;
        convolve_row_backward<A>(dx, false, sums, x.row(next_dx), table, p.kh, p.kw, reversed, x0, x1, x0, x1,
                                 ahead(p.grad_x, next_dx + 1));
        store_gradient(dx, next_dx);
      }
      for (int64_t i = 0; i < entries * L; ++i) totals[i] += sums[i], sums[i] = 0;
    }
    __builtin_memcpy(p.partial + place * entries * L, totals, entries * L * sizeof(double));
    __builtin_memset(totals, 0, entries * L * sizeof(double));
  }

  // Row y of the gradient of x, plus the product of two maps if there are any.
  void store_gradient(A* row, int64_t y) const {
    if (p.scaled.data)
      for (int64_t from = x0; from < x1; from += columns) {
        const int64_t count = least(columns, x1 - from);
        fetch(waiting, p.scaled, y, from, count);
        fetch(product, p.scale, y, from, count);
        for (int64_t i = 0; i < count; ++i)
          store(row + (from + i) * L, load(row + (from + i) * L) + load(waiting + i * L) * load(product + i * L));
      }
    put(row + x0 * L, p.grad_x, y, x0, x1 - x0);
  }
};

// The taps' gradients of channels begin * L .. end * L - 1: the sums of all tasks, in order.
template <typename T>
void reduce(const Problem& p, int64_t begin, int64_t end) {
  const Worker<T> worker(p);
  constexpr int64_t L = Worker<T>::L;
  const auto put = [](const Matrix& m, int64_t row, int64_t column, double value) {
    narrow(Vec<typename Sum<T>::type>{} + static_cast<typename Sum<T>::type>(value),
           static_cast<T*>(m.data) + row * m.row + column * m.column, 1);
  };
  for (int64_t block = begin; block < end; ++block)
    for (int64_t c = 0; c < least(L, p.c - block * L); ++c) {
      const auto total = [&](int64_t entry) {
        double sum = 0;
        for (int64_t t = block * worker.tasks; t < (block + 1) * worker.tasks; ++t)
          sum += p.partial[(t * worker.entries + entry) * L + c];
        return sum;
      };
      const int64_t channel = block * L + c;
      int64_t from = 0;
      const auto reversed = [&](int64_t count) {
        for (int64_t t = 0; t < count; ++t) put(p.grad_taps, channel, from + t, total(from + count - 1 - t));
        from += count;
      };
      reversed(p.kh * p.kw);
      for (int64_t i = 0; i < p.pairs; ++i) reversed(p.lengths[i]), reversed(p.lengths[i]);
      put(p.grad_biases, channel, 0, total(from));
      for (int64_t i = 0; i < p.pairs; ++i) {
        put(p.grad_biases, channel, 1 + 2 * i, total(from + 1 + 2 * i));
        put(p.grad_biases, channel, 2 + 2 * i, total(from + 2));  // all k x 1 biases reach the output as they are
      }
    }
}

template <typename T>
void work(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  Worker<T> worker(p);
  char* memory = scratch.zeroed(worker.bytes());
  if (!memory) return;
  worker.take(memory);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t place = worker.prepare(task);
    p.backward ? worker.backward(place) : worker.forward();
  }
}

template <typename T>
Plan plan(const Problem& p) {
  const Worker<T> worker(p);
  return {worker.blocks(), worker.tasks, worker.entries * Worker<T>::L, worker.table_vectors() * SEGOPS_VECTOR_BYTES};
}

template <typename T>
void make_tables(const Problem& p, int64_t begin, int64_t end) {
  const Worker<T> worker(p);
  for (int64_t block = begin; block < end; ++block) worker.make_table(block);
}

#define SEGOPS_STRIPS_DTYPE(function, ...)                                   \
  switch (p.dtype) {                                                         \
    case DType::float32: return function<float>(__VA_ARGS__);                \
    case DType::float64: return function<double>(__VA_ARGS__);               \
    case DType::bfloat16: return function<bf16>(__VA_ARGS__);                \
    default: return function<fp16>(__VA_ARGS__);                             \
  }
void run(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  SEGOPS_STRIPS_DTYPE(work, p, begin, end, scratch)
}
void tabulate(const Problem& p, int64_t begin, int64_t end) { SEGOPS_STRIPS_DTYPE(make_tables, p, begin, end) }
void sum_up(const Problem& p, int64_t begin, int64_t end) { SEGOPS_STRIPS_DTYPE(reduce, p, begin, end) }
Plan planned(const Problem& p) { SEGOPS_STRIPS_DTYPE(plan, p) }
#undef SEGOPS_STRIPS_DTYPE
