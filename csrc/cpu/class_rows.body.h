// What the class of a pixel says, laid out as tiles of pixels are, for one instruction set.

#include "cpu/tiles.body.h"

// Calls function.operator()<T>() for the storage type.
template <typename Function>
[[gnu::always_inline]] inline void with_type(DType dtype, Function function) {
  dtype == DType::float64 ? with_storage(dtype, double{}, function) : with_storage(dtype, float{}, function);
}

// The class of each pixel of a tile, -1 where it does not count and past the end.
inline void read_tile(const Labels& labels, int64_t image, int64_t first, int64_t count, int32_t* out,
                      FirstIndex* wrong) {
  for (int64_t i = 0, next; i < count; i = next) {
    const int64_t y = (first + i) / labels.width, x = (first + i) % labels.width;
    next = least(count, i + labels.width - x);
    labels.read(image, y, x, 1, next - i, out + i, wrong);
  }
  for (int64_t i = count; i < tile_pixels; ++i) out[i] = -1;
}

// rows[i][j] = table[label[j]][i], one channel of a vector of pixels; 0 where there is no class or no such channel.
template <typename A>
[[gnu::always_inline]] inline void class_rows(const A* table, int64_t step, const int32_t* label, int64_t channels,
                                              Vec<A>* rows) {
  constexpr int L = Simd<A>::lanes;
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) {
    const A* row = table + label[j] * step;
    rows[j] = label[j] < 0 ? Vec<A>{} : channels >= L ? load(row) : widen(row, channels);
  }
  transpose<A>(rows);
}
