// NMF of one instruction set. Included by for_each_isa.h only.
//
// Tiles are [channels][tile_pixels], their coefficients [tile_pixels][columns]; pixels past the end are 0.

#include "cpu/tiles.body.h"

// [rows][rank] of any strides to [rows][columns], and back.
template <typename A>
void take(const A* from, int64_t row, int64_t column, int64_t rows, int64_t rank, int64_t columns, A* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < columns; ++r) to[i * columns + r] = r < rank ? from[i * row + r * column] : A(0);
}
template <typename A>
void give(const A* from, int64_t columns, int64_t rows, int64_t rank, A* to, int64_t row, int64_t column) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < rank; ++r) to[i * row + r * column] = from[i * columns + r];
}

template <typename A>
void take_coefficients(const Problem<A>& p, int64_t image, int64_t update, Span at, A* to) {
  const Matrices<A>& m = p.coefficients;
  take(m.at(image, update) + at.first * m.row, m.row, m.column, at.count, p.rank, p.columns, to);
  for (int64_t i = at.count * p.columns; i < tile_pixels * p.columns; ++i) to[i] = 0;
}
template <typename A>
void give_coefficients(const Problem<A>& p, const A* from, int64_t image, int64_t update, Span at) {
  const Matrices<A>& m = p.coefficients;
  if (m.data) give(from, p.columns, at.count, p.rank, m.at(image, update) + at.first * m.row, m.row, m.column);
}
template <typename A>
void keep_bases(const Problem<A>& p, int64_t image, int64_t update) {
  const Matrices<A>& m = p.history;
  give(static_cast<const A*>(p.bases_at(image, 0)), p.columns, p.channels, p.rank, m.at(image, update), m.row, m.column);
}

// [tile_pixels][columns] to [columns][tile_pixels].
template <typename A>
void turn(const A* from, int64_t columns, A* to) {
  constexpr int64_t L = Simd<A>::lanes;
  for (int64_t i = 0; i < tile_pixels; i += L)
    for (int64_t r = 0; r < columns; r += L) {
      Vec<A> square[L];
#pragma GCC unroll 16
      for (int64_t j = 0; j < L; ++j) square[j] = load(from + (i + j) * columns + r);
      transpose<A>(square);
#pragma GCC unroll 16
      for (int64_t j = 0; j < L; ++j) store(to + (r + j) * tile_pixels + i, square[j]);
    }
}

// Rows [first, first + 16) of B^T B.
template <typename A>
void gram_rows(const Problem<A>& p, const A* bases, A* out, int64_t first) {
  product<false>(out + first * p.columns, p.columns, bases + first, 1, p.columns, bases, p.columns, 16, p.channels,
                 p.columns);
}

// What the padding adds to the denominators, beside eps: 1 behind the rank.
template <typename A>
[[gnu::always_inline]] inline Vec<A> safe(const Problem<A>& p, int64_t column) {
  Vec<A> v = Vec<A>{} + p.eps;
  for (int64_t j = 0; j < Simd<A>::lanes; ++j)
    if (column + j >= p.rank) v[j] += A(1);
  return v;
}

template <typename A>
void softmax(const Problem<A>& p, A* rows, int64_t count) {
  constexpr int64_t L = Simd<A>::lanes;
  for (int64_t i = 0; i < count; ++i) {
    A* row = rows + i * p.columns;
    A most = row[0], sum = 0;
    for (int64_t r = 1; r < p.rank; ++r) most = row[r] > most ? row[r] : most;
    for (int64_t r = 0; r < p.columns; r += L) store(row + r, vexp<A>(load(row + r) - most));
    for (int64_t r = p.rank; r < p.columns; ++r) row[r] = 0;
    for (int64_t r = 0; r < p.rank; ++r) sum += row[r];
    for (int64_t r = 0; r < p.columns; r += L) store(row + r, load(row + r) / sum);
  }
}

template <typename A>
struct Rooms {  // one worker's memory
  A *x, *y, *c, *next, *n, *d, *g, *turned;
  Rooms(const Problem<A>& p, char* memory) : x(reinterpret_cast<A*>(memory)) {
    const int64_t rows = tile_pixels * p.columns;
    y = x + p.channels * tile_pixels, c = y + p.channels * tile_pixels, next = c + rows, n = next + rows, d = n + rows;
    g = d + rows, turned = g + rows;
  }
};

template <typename A, typename Function>
[[gnu::always_inline]] inline void for_tiles(const Problem<A>& p, int64_t piece, Function function) {
  for (int64_t tile = piece * p.tiles / p.pieces; tile < (piece + 1) * p.tiles / p.pieces; ++tile)
    function(Span(p, tile));
}

template <typename A>
void zero(A* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i) data[i] = 0;
}

// Update `t` of the coefficients, then the piece's X C and C^T C, or after the last one its output.
template <typename A>
void forward_piece(const Problem<A>& p, int64_t t, int64_t image, int64_t piece, char* memory) {
  constexpr int64_t L = Simd<A>::lanes;
  const Rooms<A> r(p, memory);
  const int64_t P = tile_pixels, R = p.columns, index = image * p.pieces + piece;
  const A* b = p.bases_at(image, 0);
  const A* gram = p.gram + image * p.square();
  A* partial = p.partial + index * p.channels * R;
  A* partial_gram = p.partial_gram + index * p.square();
  const bool last = t == p.steps;
  if (!last) zero(partial, p.channels * R), zero(partial_gram, p.square());
  for_tiles(p, piece, [&](Span at) {
    with_storage(p.dtype, A(0), [&]<typename T>() { pack<T>(p, p.x, image, at, r.x); });
    A* state = p.state + (image * p.pixels + at.first) * R;
    product<false>(r.n, R, r.x, 1, P, b, R, P, p.channels, R);
    if (t == 0) {
      for (int64_t i = 0; i < P * R; i += L) store(r.c + i, load(r.n + i));
      softmax(p, r.c, at.count);
      zero(r.c + at.count * R, (P - at.count) * R);
      if (!p.one_step) give_coefficients(p, r.c, image, 0, at);
    } else {
      for (int64_t i = 0; i < at.count * R; i += L) store(r.c + i, load(state + i));
      zero(r.c + at.count * R, (P - at.count) * R);
    }
    if (last && p.one_step) give_coefficients(p, r.c, image, 0, at);
    product<false>(r.d, R, r.c, R, 1, gram, R, P, R, R);
    for (int64_t j = 0; j < R; j += L) {
      const Vec<A> eps = safe(p, j);
      for (int64_t i = 0; i < at.count; ++i) {
        A* c = r.c + i * R + j;
        store(c, load(c) * load(r.n + i * R + j) / (load(r.d + i * R + j) + eps));
      }
    }
    if (!p.one_step) give_coefficients(p, r.c, image, t + 1, at);
    if (last) {
      turn(r.c, R, r.turned);
      product<false>(r.y, P, b, R, 1, r.turned, P, p.channels, R, P);
      with_storage(p.dtype, A(0), [&]<typename T>() { unpack<T>(p, r.y, p.y, image, at); });
    } else {
      for (int64_t i = 0; i < at.count * R; i += L) store(state + i, load(r.c + i));
      product<true>(partial, R, r.x, P, 1, r.c, R, p.channels, P, R);
      product<true>(partial_gram, R, r.c, 1, R, r.c, R, R, P, R);
    }
  });
}

// The sum of the pieces' matrices, in the place of the first.
template <typename A>
void add_grams(const Problem<A>& p, A* partial, int64_t image) {
  constexpr int64_t L = Simd<A>::lanes;
  A* first = partial + image * p.pieces * p.square();
  for (int64_t piece = 1; piece < p.pieces; ++piece)
    for (int64_t i = 0; i < p.square(); i += L) store(first + i, load(first + i) + load(first + piece * p.square() + i));
}

template <typename A>
[[gnu::always_inline]] inline Vec<A> add_pieces(const Problem<A>& p, int64_t image, int64_t at) {
  const int64_t step = p.channels * p.columns;
  const A* first = p.partial + image * p.pieces * step + at;
  Vec<A> sum = load(first);
  for (int64_t piece = 1; piece < p.pieces; ++piece) sum += load(first + piece * step);
  return sum;
}

// Update `t` of some rows of the bases.
template <typename A>
void update_bases(const Problem<A>& p, int64_t t, int64_t image, int64_t block) {
  constexpr int64_t L = Simd<A>::lanes;
  const int64_t R = p.columns, first = block * base_rows;
  const int64_t rows = least(p.channels - first, base_rows);
  A* b = p.bases_at(image, 0) + first * R;
  // The pieces' sums are added in the place of the first, which then holds the numerators.
  A* denominators = p.partial + image * p.pieces * p.channels * R + first * R;
  A sums[base_rows * 16];
  for (int64_t j = 0; j < R; j += 16) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < 16; k += L) store(sums + i * 16 + k, add_pieces(p, image, (first + i) * R + j + k));
    product<false>(denominators + j, R, b, R, 1, p.partial_gram + image * p.pieces * p.square() + j, R, rows, R,
                   int64_t(16));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < 16; k += L) {
        A* d = denominators + i * R + j + k;
        store(d, load(sums + i * 16 + k) / (load(d) + safe(p, j + k)));
      }
  }
  for (int64_t i = 0; i < rows * R; i += L) store(b + i, load(b + i) * load(denominators + i));
  const Matrices<A>& m = p.history;
  if (m.data && !p.one_step)
    give(static_cast<const A*>(b), R, rows, p.rank, m.at(image, t) + first * m.row, m.row, m.column);
}

// a / b, and 0 for 0 / 0.
template <typename V>
[[gnu::always_inline]] inline V ratio(V a, V b) {
  return b == 0 ? V{} : a / b;
}

// Backward of update `t` of the coefficients: dN, what is left for the coefficients before it, and the piece's sums of
// X dN, C^T dD and C^T C.
template <typename A>
void backward_piece(const Problem<A>& p, int64_t t, bool for_bases, int64_t image, int64_t piece, char* memory) {
  constexpr int64_t L = Simd<A>::lanes;
  const Rooms<A> r(p, memory);
  const int64_t P = tile_pixels, R = p.columns, index = image * p.pieces + piece;
  const A* b = p.bases_at(image, t);
  const A* gram = p.gram + image * p.square();
  A* partial = p.partial + index * p.channels * R;
  A* partial_gram = p.partial_gram + index * p.square();
  A* partial_grad_gram = p.partial_grad_gram + index * p.square();
  const bool last = t == p.steps, sums = t > 0 || for_bases;
  if (sums) zero(partial, p.channels * R), zero(partial_gram, p.square()), zero(partial_grad_gram, p.square());
  for_tiles(p, piece, [&](Span at) {
    with_storage(p.dtype, A(0), [&]<typename T>() { pack<T>(p, p.x, image, at, r.x); });
    A* state = p.state + (image * p.pixels + at.first) * R;
    take_coefficients(p, image, t, at, r.c);
    take_coefficients(p, image, t + 1, at, r.next);
    if (last) {
      with_storage(p.dtype, A(0), [&]<typename T>() { pack<T>(p, p.y, image, at, r.y); });
      product<false>(r.g, R, r.y, 1, P, b, R, P, p.channels, R);
      if (sums) product<true>(partial, R, r.y, P, 1, r.next, R, p.channels, P, R);
    } else {
      for (int64_t i = 0; i < at.count * R; i += L) store(r.g + i, load(state + i));
      zero(r.g + at.count * R, (P - at.count) * R);
      product<true>(r.g, R, r.x, 1, P, p.grad_products_at(image, t + 1), R, P, p.channels, R);
      product<true>(r.g, R, r.next, R, 1, p.fold + image * p.square(), R, P, R, R);
    }
    product<false>(r.d, R, r.c, R, 1, gram, R, P, R, R);
    for (int64_t j = 0; j < R; j += L) {
      const Vec<A> eps = safe(p, j);
      for (int64_t i = j; i < at.count * R; i += R) {
        const Vec<A> g = load(r.g + i), c = load(r.c + i), factor = ratio(load(r.next + i), c);
        const Vec<A> dn = g * c / (load(r.d + i) + eps);
        store(r.n + i, dn);
        store(r.d + i, -dn * factor);
        store(r.g + i, g * factor);
      }
    }
    zero(r.n + at.count * R, (P - at.count) * R);
    zero(r.d + at.count * R, (P - at.count) * R);
    product<true>(r.g, R, r.d, R, 1, gram, R, P, R, R);
    if (t == 0)
      for (int64_t i = 0; i < at.count; ++i) {
        A* g = r.g + i * R;
        const A* c = r.c + i * R;
        A sum = 0;
        for (int64_t k = 0; k < p.rank; ++k) sum += g[k] * c[k];
        for (int64_t k = 0; k < R; k += L)
          store(r.n + i * R + k, load(r.n + i * R + k) + load(c + k) * (load(g + k) - sum));
      }
    else
      for (int64_t i = 0; i < at.count * R; i += L) store(state + i, load(r.g + i));
    A* numerators = p.numerators_at(image, t) + at.first * R;
    for (int64_t i = 0; i < at.count * R; i += L) store(numerators + i, load(r.n + i));
    if (sums) {
      product<true>(partial, R, r.x, P, 1, r.n, R, p.channels, P, R);
      product<true>(partial_grad_gram, R, r.c, 1, R, r.d, R, R, P, R);
      if (t > 0) product<true>(partial_gram, R, r.c, 1, R, r.c, R, R, P, R);
    }
  });
}

// dB_t of some rows and, from its update, dM_t and what is left for B_{t-1}; dE_t takes the place of the first sum.
template <typename A>
void update_grad_bases(const Problem<A>& p, int64_t t, int64_t image, int64_t block) {
  constexpr int64_t L = Simd<A>::lanes;
  const int64_t R = p.columns, first = block * base_rows;
  const int64_t rows = least(p.channels - first, base_rows);
  const A* b = p.bases_at(image, t) + first * R;
  A* carried = p.grad_bases + image * p.channels * R + first * R;
  const A* dg = p.partial_grad_gram + image * p.pieces * p.square();
  A* sums = p.partial + image * p.pieces * p.channels * R + first * R;
  for (int64_t i = 0; i < rows * R; i += L) {
    const Vec<A> sum = add_pieces(p, image, first * R + i);
    store(carried + i, t == p.steps ? sum : load(carried + i) + sum);
  }
  A folded[16 * 16];
  for (int64_t j = 0; j < R; j += 16)  // += B (dG + dG^T)
    for (int64_t k = 0; k < R; k += 16) {
      for (int64_t u = 0; u < 16; ++u)
        for (int64_t v = 0; v < 16; ++v) folded[u * 16 + v] = dg[(k + u) * R + j + v] + dg[(j + v) * R + k + u];
      product<true>(carried + j, R, b + k, R, 1, static_cast<const A*>(folded), 16, rows, int64_t(16), int64_t(16));
    }
  if (t == 0) return;
  const A* before = p.bases_at(image, t - 1) + first * R;
  const A* k = p.partial_gram + image * p.pieces * p.square();
  A* dm = p.grad_products_at(image, t) + first * R;
  product<false>(sums, R, before, R, 1, k, R, rows, R, R);
  for (int64_t j = 0; j < R; j += L) {
    const Vec<A> eps = safe(p, j);
    for (int64_t i = j; i < rows * R; i += R) {
      const Vec<A> g = load(carried + i), factor = ratio(load(b + i), load(before + i));
      const Vec<A> d = g * load(before + i) / (load(sums + i) + eps);
      store(dm + i, d);
      store(sums + i, -d * factor);
      store(carried + i, g * factor);
    }
  }
  product<true>(carried, R, static_cast<const A*>(sums), R, 1, k, R, rows, R, R);
}

// Rows [first, first + 16) of dK_t = B_{t-1}^T dE_t, in the place of the sum of C^T dD.
template <typename A>
void grad_gram_rows(const Problem<A>& p, int64_t t, int64_t image, int64_t first) {
  const A* de = p.partial + image * p.pieces * p.channels * p.columns;
  A* out = p.partial_grad_gram + image * p.pieces * p.square();
  product<false>(out + first * p.columns, p.columns, p.bases_at(image, t - 1) + first, 1, p.columns, de, p.columns, 16,
                 p.channels, p.columns);
}

template <typename A>
void fold_gram(const Problem<A>& p, int64_t image) {
  const A* dk = p.partial_grad_gram + image * p.pieces * p.square();
  A* fold = p.fold + image * p.square();
  for (int64_t i = 0; i < p.columns; ++i)
    for (int64_t j = 0; j < p.columns; ++j) fold[i * p.columns + j] = dk[i * p.columns + j] + dk[j * p.columns + i];
}

// dX = sum_t B_t dN_t^T + dM_t C_t^T.
template <typename A>
void grad_x_piece(const Problem<A>& p, int64_t image, int64_t piece, char* memory) {
  constexpr int64_t L = Simd<A>::lanes;
  const Rooms<A> r(p, memory);
  const int64_t P = tile_pixels, R = p.columns;
  for_tiles(p, piece, [&](Span at) {
    for (int64_t t = 0; t <= p.steps; ++t) {
      const A* numerators = p.numerators_at(image, t) + at.first * R;
      for (int64_t i = 0; i < at.count * R; i += L) store(r.n + i, load(numerators + i));
      zero(r.n + at.count * R, (P - at.count) * R);
      turn(r.n, R, r.turned);
      if (t == 0) {
        product<false>(r.y, P, p.bases_at(image, t), R, 1, r.turned, P, p.channels, R, P);
        continue;
      }
      product<true>(r.y, P, p.bases_at(image, t), R, 1, r.turned, P, p.channels, R, P);
      take_coefficients(p, image, t, at, r.c);
      turn(r.c, R, r.turned);
      product<true>(r.y, P, p.grad_products_at(image, t), R, 1, r.turned, P, p.channels, R, P);
    }
    with_storage(p.dtype, A(0), [&]<typename T>() { unpack<T>(p, r.y, p.grad_x, image, at); });
  });
}

// dN = (dout^T B) * C / (C (B^T B) + eps), dX = B dN^T.
template <typename A>
void one_step_piece(const Problem<A>& p, int64_t image, int64_t piece, char* memory) {
  constexpr int64_t L = Simd<A>::lanes;
  const Rooms<A> r(p, memory);
  const int64_t P = tile_pixels, R = p.columns;
  const A* b = p.bases_at(image, 0);
  for_tiles(p, piece, [&](Span at) {
    with_storage(p.dtype, A(0), [&]<typename T>() { pack<T>(p, p.y, image, at, r.y); });
    take_coefficients(p, image, 0, at, r.c);
    product<false>(r.g, R, r.y, 1, P, b, R, P, p.channels, R);
    product<false>(r.d, R, r.c, R, 1, p.gram + image * p.square(), R, P, R, R);
    for (int64_t j = 0; j < R; j += L) {
      const Vec<A> eps = safe(p, j);
      for (int64_t i = j; i < at.count * R; i += R)
        store(r.n + i, load(r.g + i) * load(r.c + i) / (load(r.d + i) + eps));
    }
    zero(r.n + at.count * R, (P - at.count) * R);
    turn(r.n, R, r.turned);
    product<false>(r.x, P, b, R, 1, r.turned, P, p.channels, R, P);
    with_storage(p.dtype, A(0), [&]<typename T>() { unpack<T>(p, r.x, p.grad_x, image, at); });
  });
}
