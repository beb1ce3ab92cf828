// The part of DUpsampling that is no matrix product, on the GPU (semantics: segops/reference/dupsample.py).
//
//   rearrange  out(n, k, r i + dy, r j + dx) = (columns(n, s, k, cell) + bias(s, k)) / T,   s = dy r + dx, cell = i w + j
//   backward   grad_columns(n, s, k, cell) = grad_out(n, k, r i + dy, r j + dx) / T, zero beyond H x W
//
// columns [N, r * r * K, h * w], out [N, K, H, W], any strides, r (h - 1) < H <= r h.
//
// Memory is all there is to it. A block owns `tile_cells` neighbouring cells and, for one dy, up to `tile_rows` rows of
// columns, brings them into shared memory in the order of one side and writes them in the order of the other: neighbouring
// lanes take neighbouring cells of a row on the columns' side, and neighbouring classes (channels last) or pixels (NCHW)
// on the other, 16 bytes each where strides allow.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "common/launch.h"
#include "common/scalar.h"
#include "schemas.h"

namespace segops {
namespace {

using torch::stable::Tensor;

constexpr int threads = 256, tile_cells = 32, tile_rows = 128;
// Lanes that read one cell of V rows each, 32 / V of them beside V cells, meet 32 different banks.
constexpr int pitch = tile_cells + 1;

template <typename T>
struct Call {
  T *columns, *pixels;
  const T* bias;
  const Accumulator<T>* temperature;
  int64_t columns_n, columns_row, columns_cell, pixels_n, pixels_k, pixels_y, pixels_x;  // strides in elements
  int r, classes, cells, w, height, width;
  int rows, row_tiles, cell_tiles;  // a tile's rows: pairs of dx and class, or with whole dx
  bool classes_fastest, wide_columns, wide_pixels, bfloat16;
};

template <typename T>
struct Tile {
  using A = Accumulator<T>;
  static constexpr int V = vector_length<T>;

  const Call<T>& call;
  int64_t image;
  int dy, first, first_cell;
  A factor;
  A* tile;

  __device__ __forceinline__ explicit Tile(const Call<T>& call) : call(call) {
    unsigned rest = blockIdx.x;
    const auto next = [&](int count) {
      const int index = rest % count;
      rest /= count;
      return index;
    };
    first_cell = next(call.cell_tiles) * tile_cells;
    first = next(call.row_tiles) * call.rows;
    dy = next(call.r);
    image = rest;
    factor = call.temperature ? A(1) / *call.temperature : A(1);
    tile = reinterpret_cast<A*>(shared_memory());
  }

  // What row q of the tile is; false if nothing.
  __device__ __forceinline__ bool row(int q, int& dx, int& k) const {
    const int n = first + q;
    dx = call.classes_fastest ? n / call.classes : n % call.r;
    k = call.classes_fastest ? n % call.classes : n / call.r;
    return n < call.r * call.classes;
  }
  __device__ __forceinline__ int weight_row(int dx, int k) const { return (dy * call.r + dx) * call.classes + k; }

  __device__ __forceinline__ T* column(int dx, int k, int cell) const {
    return call.columns + image * call.columns_n + weight_row(dx, k) * call.columns_row +
           int64_t(first_cell + cell) * call.columns_cell;
  }
  // The pixel of a cell; null beyond the output.
  __device__ __forceinline__ T* pixel(int dx, int k, int cell) const {
    const int at = first_cell + cell, y = at / call.w * call.r + dy, x = at % call.w * call.r + dx;
    if (y >= call.height || x >= call.width) return nullptr;
    return call.pixels + image * call.pixels_n + k * call.pixels_k + y * call.pixels_y + x * call.pixels_x;
  }

  // Calls wide(q, dx, k, cell) for V cells from `cell` on, or single(...) for one.
  template <typename Wide, typename Single>
  __device__ __forceinline__ void for_columns(Wide wide, Single single) const {
    const int step = call.wide_columns ? V : 1, units = tile_cells / step, cells = call.cells - first_cell;
    for (int unit = threadIdx.x; unit < call.rows * units; unit += blockDim.x) {
      const int q = unit / units, cell = unit % units * step;
      int dx, k;
      if (!row(q, dx, k)) break;
      if (call.wide_columns && cell + V <= cells)
        wide(q, dx, k, cell);
      else
        for (int c = cell; c < cell + step && c < cells; ++c) single(q, dx, k, c);
    }
  }

  // Calls wide(q, dx, k, cell) for V rows from q on, neighbours in memory, or single(...) for one.
  template <typename Wide, typename Single>
  __device__ __forceinline__ void for_pixels(Wide wide, Single single) const {
    const int step = call.wide_pixels ? V : 1, units = call.rows / step;
    const int run = call.classes_fastest ? units : call.r / step, together = call.classes_fastest ? step : tile_cells;
    for (int index = threadIdx.x; index < tile_cells * units; index += blockDim.x) {
      int cell, unit;
      if (call.classes_fastest) {
        cell = index % together + index / (together * run) * together;
        unit = index / together % run;
      } else {
        cell = index / run % together;
        unit = index % run + index / (run * together) * run;
      }
      const int q = unit * step;
      int dx, k, last_dx, last_k;
      if (first_cell + cell >= call.cells) continue;
      if (call.wide_pixels && row(q + V - 1, last_dx, last_k) && pixel(last_dx, last_k, cell)) {
        row(q, dx, k);
        wide(q, dx, k, cell);
      } else {
        for (int e = q; e < q + step; ++e)
          if (row(e, dx, k)) single(e, dx, k, cell);
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(threads) rearrange_kernel(const __grid_constant__ Call<T> call) {
  using A = Accumulator<T>;
  constexpr int V = vector_length<T>;
  const Tile<T> t(call);
  const auto finished = [&](T x, int dx, int k) {
    const A b = call.bias ? accumulator(call.bias[t.weight_row(dx, k)], call.bfloat16) : A(0);
    return (accumulator(x, call.bfloat16) + b) * t.factor;
  };
  t.for_columns(
      [&](int q, int dx, int k, int cell) {
        const Vector<T> v = load_vector(t.column(dx, k, cell));
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) t.tile[q * pitch + cell + e] = finished(v.at[e], dx, k);
      },
      [&](int q, int dx, int k, int cell) { t.tile[q * pitch + cell] = finished(*t.column(dx, k, cell), dx, k); });
  __syncthreads();
  t.for_pixels(
      [&](int q, int dx, int k, int cell) {
        A part[V];
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) part[e] = t.tile[(q + e) * pitch + cell];
        store_vector(t.pixel(dx, k, cell), pack<T>(part, call.bfloat16));
      },
      [&](int q, int dx, int k, int cell) {
        T* const pixel = t.pixel(dx, k, cell);
        if (pixel) *pixel = rounded<T>(t.tile[q * pitch + cell], call.bfloat16);
      });
}

template <typename T>
__global__ void __launch_bounds__(threads) rearrange_backward_kernel(const __grid_constant__ Call<T> call) {
  using A = Accumulator<T>;
  constexpr int V = vector_length<T>;
  const Tile<T> t(call);
  t.for_pixels(
      [&](int q, int dx, int k, int cell) {
        A part[V];
        unpack(load_vector(static_cast<const T*>(t.pixel(dx, k, cell))), call.bfloat16, part);
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) t.tile[(q + e) * pitch + cell] = part[e] * t.factor;
      },
      [&](int q, int dx, int k, int cell) {
        const T* const pixel = t.pixel(dx, k, cell);
        t.tile[q * pitch + cell] = pixel ? accumulator(*pixel, call.bfloat16) * t.factor : A(0);
      });
  __syncthreads();
  t.for_columns(
      [&](int q, int dx, int k, int cell) {
        A part[V];
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) part[e] = t.tile[q * pitch + cell + e];
        store_vector(t.column(dx, k, cell), pack<T>(part, call.bfloat16));
      },
      [&](int q, int dx, int k, int cell) {
        *t.column(dx, k, cell) = rounded<T>(t.tile[q * pitch + cell], call.bfloat16);
      });
}

template <typename T>
void rearrange(const Tensor& columns, const Tensor& pixels, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& temperature, int64_t scale_factor, bool backward) {
  using A = Accumulator<T>;
  constexpr int V = vector_length<T>;
  const auto narrow = [](int64_t size) {
    STD_TORCH_CHECK(size < (int64_t(1) << 30), "segops.dupsample: a size of ", size, " is too large");
    return static_cast<int>(size);
  };
  const auto whole = [](const Tensor& t, int axis) { return t.size(axis) <= 1 || t.stride(axis) % V == 0; };
  Call<T> call{};
  call.columns = static_cast<T*>(columns.data_ptr()), call.pixels = static_cast<T*>(pixels.data_ptr());
  if (bias) call.bias = static_cast<const T*>(bias->data_ptr());
  if (temperature) call.temperature = static_cast<const A*>(temperature->data_ptr());
  call.columns_n = columns.stride(0), call.columns_row = columns.stride(1), call.columns_cell = columns.stride(2);
  call.pixels_n = pixels.stride(0), call.pixels_k = pixels.stride(1);
  call.pixels_y = pixels.stride(2), call.pixels_x = pixels.stride(3);
  call.r = narrow(scale_factor), call.classes = narrow(pixels.size(1)), call.cells = narrow(columns.size(2));
  call.height = narrow(pixels.size(2)), call.width = narrow(pixels.size(3));
  call.w = (call.width + call.r - 1) / call.r;
  call.bfloat16 = columns.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  call.classes_fastest = call.pixels_k == 1 && call.classes > 1;
  const int all = call.r * call.classes;
  call.rows = call.classes_fastest ? std::min((all + V - 1) / V * V, tile_rows)
                                   : std::min(all, std::max(tile_rows / call.r, 1) * call.r);
  call.wide_columns = call.columns_cell == 1 && aligned(call.columns) && whole(columns, 0) && whole(columns, 1);
  // A pixel's classes go on into the next pixel's, a cell's pixels into the next cell's.
  const bool neighbours = call.classes_fastest ? call.pixels_x == call.classes && all % V == 0
                                               : call.pixels_x == 1 && call.r % V == 0 && whole(pixels, 1);
  call.wide_pixels = neighbours && aligned(call.pixels) && whole(pixels, 0) && whole(pixels, 2);
  call.row_tiles = (all + call.rows - 1) / call.rows;
  call.cell_tiles = (call.cells + tile_cells - 1) / tile_cells;
  const int64_t blocks = pixels.size(0) * call.r * call.row_tiles * int64_t(call.cell_tiles);
  STD_TORCH_CHECK(blocks <= max_grid_x, "segops.dupsample: ", blocks, " tiles are more than a launch takes");
  const std::size_t shared = sizeof(A) * call.rows * pitch;
  launch(backward ? rearrange_backward_kernel<T> : rearrange_kernel<T>, static_cast<unsigned>(blocks), threads, shared,
         columns, call);
}

void dupsample_rearrange(const Tensor& out, const Tensor& columns, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& temperature, int64_t scale_factor) {
  if (out.numel() == 0) return;
  for_dtype(out.scalar_type(), [&](auto zero) {
    rearrange<decltype(zero)>(columns, out, bias, temperature, scale_factor, false);
  });
}

void dupsample_rearrange_backward(const Tensor& grad_columns, const Tensor& grad_out,
                                  const std::optional<Tensor>& temperature, int64_t scale_factor) {
  if (grad_out.numel() == 0) return;
  for_dtype(grad_out.scalar_type(), [&](auto zero) {
    rearrange<decltype(zero)>(grad_columns, grad_out, std::nullopt, temperature, scale_factor, true);
  });
}

}  // namespace
}  // namespace segops

// Ops that only a GPU has are defined here; those of the CPU too, beside their CPU kernels.
STABLE_TORCH_LIBRARY_FRAGMENT(SEGOPS_NAMESPACE, m) {
  SEGOPS_DEF(m, dupsample_rearrange);
  SEGOPS_DEF(m, dupsample_rearrange_backward);
}
STABLE_TORCH_LIBRARY_IMPL(SEGOPS_NAMESPACE, SEGOPS_CUDA_KEY, m) {
  SEGOPS_IMPL(m, dupsample_rearrange, segops::dupsample_rearrange);
  SEGOPS_IMPL(m, dupsample_rearrange_backward, segops::dupsample_rearrange_backward);
}
