// Products of packed lines, and their packing, for one instruction set; see axial_attention.cpp.

#include "cpu/arena.body.h"

constexpr int64_t tile = 32;                                          // queries side by side
constexpr int max_rows = SEGOPS_VECTOR_REGISTERS == 32 ? 14 : 6;      // by two vectors: what sums fit the registers

// out[i] (+)= sum_t a[i * Row + t * a_step] * b[t * b_step ...], `Vectors` vectors wide.
template <typename A, int Rows, int Vectors, int Row>
[[gnu::noinline]] void multiply(const A* a, int64_t a_step, const A* b, int64_t b_step, int64_t count, A* out,
                                int64_t out_step, bool add) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> acc[Rows][Vectors] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < count; ++t, a += a_step, b += b_step) {
    Vec<A> right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[i][v] += a[i * Row] * right[v];
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      A* to = out + i * out_step + v * L;
      store(to, add ? load(to) + acc[i][v] : acc[i][v]);
    }
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

// Rows of scalars in panels: [parts][depth][width], one panel per block of sums.
struct Panels {
  int64_t width, parts;
  explicit Panels(int64_t rows) : width(0), parts(0) {
    for (int64_t w = max_rows; w >= 1; --w) {
      const int64_t p = (rows + w - 1) / w;
      if (!width || p * (w + 1) < parts * (width + 1)) width = w, parts = p;
    }
  }
  int64_t rows() const { return width * parts; }
};

template <typename Kernel>
[[gnu::always_inline]] inline void with_width(int64_t width, Kernel kernel) {
  switch (width) {
#if SEGOPS_VECTOR_REGISTERS == 32
    case 14: return kernel.template operator()<14>();
    case 13: return kernel.template operator()<13>();
    case 12: return kernel.template operator()<12>();
    case 11: return kernel.template operator()<11>();
    case 10: return kernel.template operator()<10>();
    case 9: return kernel.template operator()<9>();
    case 8: return kernel.template operator()<8>();
    case 7: return kernel.template operator()<7>();
#endif
    case 6: return kernel.template operator()<6>();
    case 5: return kernel.template operator()<5>();
    case 4: return kernel.template operator()<4>();
    case 3: return kernel.template operator()<3>();
    case 2: return kernel.template operator()<2>();
    default: return kernel.template operator()<1>();
  }
}

// out[rows][tile] (+)= panels of [depth] scalars * b[depth][tile], of which the first `width` queries are wanted.
template <typename A>
void product(const Panels& rows, const A* panels, int64_t depth, const A* b, int64_t b_step, int64_t width, A* out,
             bool add) {
  constexpr int64_t L = Simd<A>::lanes;
  with_width(rows.width, [&]<int W>() {
    for (int64_t part = 0; part < rows.parts; ++part)
      for (int64_t x = 0; x < width; x += 2 * L) {
        const A* a = panels + part * depth * W;
        A* to = out + part * W * tile + x;
        if (x + L < width)
          multiply<A, W, 2, 1>(a, W, b + x, b_step, depth, to, tile, add);
        else
          multiply<A, W, 1, 1>(a, W, b + x, b_step, depth, to, tile, add);
      }
  });
}

// out[rows][columns] += sum over `count` queries of scores[rows] * b[columns]: scores in tiles of [rows][tile], b
// [queries][columns]. Sums stay in the nearest cache from tile to tile.
template <typename A>
void outer_product(const Panels& rows, const A* scores, int64_t count, const A* b, int64_t columns, A* out,
                   int64_t out_step) {
  constexpr int64_t L = Simd<A>::lanes;
  with_width(rows.width, [&]<int W>() {
    for (int64_t x = 0; x < columns; x += 2 * L)
      for (int64_t part = 0; part < rows.parts; ++part) {
        A* to = out + part * W * out_step + x;
        for (int64_t first = 0; first < count; first += tile) {
          const A *from = scores + (first * rows.parts + part * tile) * W, *right = b + first * columns + x;
          if (x + L < columns)
            multiply<A, W, 2, tile>(from, 1, right, columns, least(count - first, tile), to, out_step, true);
          else
            multiply<A, W, 1, tile>(from, 1, right, columns, least(count - first, tile), to, out_step, true);
        }
      }
  });
}

template <typename A>
void zero(A* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i) data[i] = 0;
}

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

// [depth][columns] to panels of columns.
template <typename A>
void to_panels(const A* from, int64_t from_step, int64_t depth, const Panels& panels, A* to) {
  constexpr int64_t L = Simd<A>::lanes;
  // Whole vectors are written: each runs over into the next, which is written after it.
  for (int64_t part = 0; part < panels.parts; ++part)
    for (int64_t t = 0; t < depth; ++t, to += panels.width)
      for (int64_t x = 0; x < panels.width; x += L) store(to + x, load(from + t * from_step + part * panels.width + x));
}
