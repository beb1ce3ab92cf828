// Products of packed lines for one instruction set; see axial_attention.cpp.

#include "cpu/arena.body.h"

constexpr int64_t tile = 32;                                          // queries side by side
constexpr int max_rows = SEGOPS_VECTOR_REGISTERS == 32 ? 14 : 6;      // by two vectors: what sums fit the registers

// Scalars of a product, a[i * row + t * step], and vectors, b[t * step ...]: any packed line serves as either.
template <typename A>
struct Scalars {
  const A* at;
  int64_t row, step;
};
template <typename A>
struct Vectors {
  const A* at;
  int64_t step;
};

// out[i] (+)= sum_t a(i, t) b(t), `Columns` vectors wide.
template <typename A, int Rows, int Columns>
[[gnu::noinline]] void multiply(Scalars<A> a, Vectors<A> b, int64_t count, A* out, int64_t out_step, bool add) {
  constexpr int L = Simd<A>::lanes, pointers = (Rows + 2) / 3;
  // Three rows per pointer: addresses of base and one or two steps, which fit the integer registers.
  const A* at[pointers];
#pragma GCC unroll 5
  for (int i = 0; i < pointers; ++i) at[i] = a.at + 3 * i * a.row;
  const A* right_at = b.at;
  Vec<A> acc[Rows][Columns] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < count; ++t, right_at += b.step) {
    Vec<A> right[Columns];
#pragma GCC unroll 2
    for (int v = 0; v < Columns; ++v) right[v] = load(right_at + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < Columns; ++v) acc[i][v] += at[i / 3][i % 3 * a.row] * right[v];
#pragma GCC unroll 5
    for (int i = 0; i < pointers; ++i) at[i] += a.step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Columns; ++v) {
      A* to = out + i * out_step + v * L;
      store(to, add ? load(to) + acc[i][v] : acc[i][v]);
    }
}

template <typename A, int Rows = max_rows>
void multiply(int64_t rows, bool two, Scalars<A> a, Vectors<A> b, int64_t count, A* out, int64_t out_step, bool add) {
  if constexpr (Rows > 1)
    if (rows < Rows) return multiply<A, Rows - 1>(rows, two, a, b, count, out, out_step, add);
  if (two)
    multiply<A, Rows, 2>(a, b, count, out, out_step, add);
  else
    multiply<A, Rows, 1>(a, b, count, out, out_step, add);
}

// Cuts `rows` by `width` sums into blocks that fit the registers: function(first row, rows, first column, columns).
template <typename A, typename Function>
[[gnu::always_inline]] inline void for_blocks(int64_t rows, int64_t width, Function function) {
  constexpr int64_t L = Simd<A>::lanes;
  const int64_t parts = (rows + max_rows - 1) / max_rows;
  for (int64_t x = 0; x < width; x += 2 * L)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = rows * part / parts;
      function(first, rows * (part + 1) / parts - first, x, least(width - x, 2 * L));
    }
}
template <typename A>
int64_t blocks(int64_t rows, int64_t width) {
  return (rows + max_rows - 1) / max_rows * (round_up(width, 2 * Simd<A>::lanes) / (2 * Simd<A>::lanes));
}

// The first `count` of a vector's elements, as widen and narrow take them, through masks where there are any: copying
// them one by one takes longer than everything else that is done to the end of a line.
#if SEGOPS_X86_ISAS && SEGOPS_VECTOR_BYTES == 64
[[gnu::always_inline]] inline Vec<float> widen_some(const float* p, int64_t count) {
  return __builtin_ia32_loadups512_mask(p, Vec<float>{}, uint16_t((1u << count) - 1));
}
[[gnu::always_inline]] inline Vec<double> widen_some(const double* p, int64_t count) {
  return __builtin_ia32_loadupd512_mask(p, Vec<double>{}, uint8_t((1u << count) - 1));
}
template <typename T>
[[gnu::always_inline]] inline Vec<float> widen_some(const T* p, int64_t count) {
  typedef short Shorts __attribute__((vector_size(32)));
  T full[16];
  const uint16_t mask = uint16_t((1u << count) - 1);
  const auto bits = __builtin_ia32_loaddquhi256_mask(reinterpret_cast<const short*>(p), Shorts{}, mask);
  __builtin_memcpy(full, &bits, 32);
  return widen(static_cast<const T*>(full));
}
[[gnu::always_inline]] inline void narrow_some(Vec<float> x, float* p, int64_t count) {
  __builtin_ia32_storeups512_mask(p, x, uint16_t((1u << count) - 1));
}
[[gnu::always_inline]] inline void narrow_some(Vec<double> x, double* p, int64_t count) {
  __builtin_ia32_storeupd512_mask(p, x, uint8_t((1u << count) - 1));
}
template <typename T>
[[gnu::always_inline]] inline void narrow_some(Vec<float> x, T* p, int64_t count) {
  typedef short Shorts __attribute__((vector_size(32)));
  T full[16];
  Shorts bits;
  narrow(x, static_cast<T*>(full));
  __builtin_memcpy(&bits, full, 32);
  __builtin_ia32_storedquhi256_mask(reinterpret_cast<short*>(p), bits, uint16_t((1u << count) - 1));
}
#else
template <typename T>
[[gnu::always_inline]] inline auto widen_some(const T* p, int64_t count) {
  return widen(p, count);
}
template <typename T, typename V>
[[gnu::always_inline]] inline void narrow_some(V x, T* p, int64_t count) {
  narrow(x, p, count);
}
#endif

// [rows][columns] to [columns][rows], whole vectors of rows; rows past the end repeat the last one.
template <typename A>
void turn(const A* from, int64_t from_step, int64_t rows, int64_t columns, A* to, int64_t to_step) {
  constexpr int64_t L = Simd<A>::lanes;
  for (int64_t i = 0; i < rows; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      Vec<A> square[L];
#pragma GCC unroll 16
      for (int64_t k = 0; k < L; ++k) square[k] = load(from + least(i + k, rows - 1) * from_step + j);
      transpose<A>(square);
      if (columns - j >= L) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < L; ++k) store(to + (j + k) * to_step + i, square[k]);
      } else {
        for (int64_t k = 0; k < columns - j; ++k) store(to + (j + k) * to_step + i, square[k]);
      }
    }
}
