// Tiles of tile_pixels pixels, packed to [channels][tile_pixels] in the type of the sums, and products with them, for one
// instruction set. A problem has pixels, width, height and channels; pixels past the end are 0.

#include "cpu/arena.body.h"

template <typename A, int Rows, int Vectors, bool Add>
[[gnu::always_inline]] inline void block(A* out, int64_t out_step, const A* s, int64_t s_row, int64_t s_depth,
                                         const A* v, int64_t v_step, int64_t depth) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Add ? load(out + i * out_step + j * L) : Vec<A>{};
  for (int64_t k = 0; k < depth; ++k, s += s_depth, v += v_step) {
    Vec<A> right[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) right[j] = load(v + j * L);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const A left = s[i * s_row];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(out + i * out_step + j * L, sum[i][j]);
}

template <typename A, int Rows, int Vectors, bool Add>
inline void strip(A* out, int64_t out_step, const A* s, int64_t s_row, int64_t s_depth, const A* v, int64_t v_step,
                  int64_t rows, int64_t depth) {
  int64_t i = 0;
  for (; i + Rows <= rows; i += Rows)
    block<A, Rows, Vectors, Add>(out + i * out_step, out_step, s + i * s_row, s_row, s_depth, v, v_step, depth);
  for (; i + 2 <= rows; i += 2)
    block<A, 2, Vectors, Add>(out + i * out_step, out_step, s + i * s_row, s_row, s_depth, v, v_step, depth);
  for (; i < rows; ++i)
    block<A, 1, Vectors, Add>(out + i * out_step, out_step, s + i * s_row, s_row, s_depth, v, v_step, depth);
}

// out[i][j] (+)= sum_k s[i * s_row + k * s_depth] * v[k][j], `columns` a multiple of 16.
template <bool Add, typename A>
inline void product(A* out, int64_t out_step, const A* s, int64_t s_row, int64_t s_depth, const A* v, int64_t v_step,
                    int64_t rows, int64_t depth, int64_t columns) {
  constexpr int64_t L = Simd<A>::lanes;
  int64_t j = 0;
#if SEGOPS_VECTOR_REGISTERS == 32
  for (; j + 4 * L <= columns; j += 4 * L)
    strip<A, 6, 4, Add>(out + j, out_step, s, s_row, s_depth, v + j, v_step, rows, depth);
#endif
  for (; j + 2 * L <= columns; j += 2 * L)
    strip<A, SEGOPS_VECTOR_REGISTERS == 32 ? 12 : 6, 2, Add>(out + j, out_step, s, s_row, s_depth, v + j, v_step, rows,
                                                             depth);
  for (; j < columns; j += L)
    strip<A, 12, 1, Add>(out + j, out_step, s, s_row, s_depth, v + j, v_step, rows, depth);
}

template <typename Function>
[[gnu::always_inline]] inline void with_storage(DType dtype, float, Function function) {
  switch (dtype) {
    case DType::bfloat16: return function.template operator()<bf16>();
    case DType::float16: return function.template operator()<fp16>();
    default: return function.template operator()<float>();
  }
}
template <typename Function>
[[gnu::always_inline]] inline void with_storage(DType, double, Function function) {
  function.template operator()<double>();
}

// The pixels [first, first + count) of an image: where they lie.
struct Span {
  int64_t first, count;
  template <typename P>
  Span(const P& p, int64_t tile)
      : first(tile * tile_pixels), count(least(p.pixels - first, tile_pixels)) {}
};

template <typename P>
[[gnu::always_inline]] inline int64_t offset(const P& p, const Strided& map, int64_t pixel) {
  // The division takes longer than what is read there.
  return map.y == p.width * map.x ? pixel * map.x : pixel / p.width * map.y + pixel % p.width * map.x;
}

// A tile of a map to [channels][tile_pixels], or back.
template <typename T, typename P, typename A>
void pack(const P& p, const Strided& map, int64_t image, Span at, A* tile) {
  constexpr int64_t L = Simd<A>::lanes;
  const T* from = static_cast<const T*>(map.data) + image * map.n;
  const bool flat = map.y == p.width * map.x || p.height == 1;
  if (flat && map.x == 1) {
    from += at.first;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t i = 0; i < tile_pixels; i += L) {
        const int64_t left = at.count - i;
        store(tile + c * tile_pixels + i, left >= L ? widen(from + c * map.c + i)
                                          : left > 0 ? widen(from + c * map.c + i, left)
                                                     : Vec<A>{});
      }
  } else if (map.c == 1) {
    for (int64_t i = 0; i < tile_pixels; i += L)
      for (int64_t c = 0; c < p.channels; c += L) {
        const int64_t channels = least(p.channels - c, L);
        Vec<A> square[L];
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; ++j) {
          const T* pixel = from + (i + j < at.count ? offset(p, map, at.first + i + j) : 0) + c;
          square[j] = i + j >= at.count ? Vec<A>{} : channels == L ? widen(pixel) : widen(pixel, channels);
        }
        transpose<A>(square);
        for (int64_t j = 0; j < channels; ++j) store(tile + (c + j) * tile_pixels + i, square[j]);
      }
  } else {
    for (int64_t i = 0; i < tile_pixels; ++i) {
      const int64_t pixel = i < at.count ? offset(p, map, at.first + i) : 0;
      for (int64_t c = 0; c < p.channels; ++c)
        tile[c * tile_pixels + i] = i < at.count ? widen(from + pixel + c * map.c, 1)[0] : A(0);
    }
  }
}

template <typename T, typename P, typename A>
void unpack(const P& p, const A* tile, const Strided& map, int64_t image, Span at) {
  constexpr int64_t L = Simd<A>::lanes;
  T* to = static_cast<T*>(map.data) + image * map.n;
  const bool flat = map.y == p.width * map.x || p.height == 1;
  if (flat && map.x == 1) {
    to += at.first;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t i = 0; i < at.count; i += L) {
        const Vec<A> v = load(tile + c * tile_pixels + i);
        at.count - i >= L ? narrow(v, to + c * map.c + i) : narrow(v, to + c * map.c + i, at.count - i);
      }
  } else if (map.c == 1) {
    for (int64_t i = 0; i < at.count; i += L)
      for (int64_t c = 0; c < p.channels; c += L) {
        const int64_t channels = least(p.channels - c, L);
        Vec<A> square[L];
        for (int64_t j = 0; j < L; ++j) square[j] = j < channels ? load(tile + (c + j) * tile_pixels + i) : Vec<A>{};
        transpose<A>(square);
        for (int64_t j = 0; j < L && i + j < at.count; ++j) {
          T* pixel = to + offset(p, map, at.first + i + j) + c;
          channels == L ? narrow(square[j], pixel) : narrow(square[j], pixel, channels);
        }
      }
  } else {
    for (int64_t i = 0; i < at.count; ++i)
      for (int64_t c = 0; c < p.channels; ++c)
        narrow(Vec<A>{} + tile[c * tile_pixels + i], to + offset(p, map, at.first + i) + c * map.c, 1);
  }
}
