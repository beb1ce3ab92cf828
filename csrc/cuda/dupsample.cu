// The part of DUpsampling that is no matrix product, on the GPU (semantics: segops/reference/dupsample.py).
//
//   rearrange  out(n, k, r i + dy, r j + dx) = (columns(n, s, k, cell) + bias(s, k)) / T,  s = dy r + dx, cell = i w + j
//   backward   grad_columns(n, s, k, cell) = grad_out(n, k, r i + dy, r j + dx) / T, zero beyond H x W
//
// columns [N, r * r * K, h * w], out [N, K, H, W], any strides, r (h - 1) < H <= r h.
//
// Memory is all there is to it. A block owns `tile_cells` neighbouring cells and, for one dy, up to `tile_rows` rows of
// columns, brings them into shared memory in the order of one side and writes them in the order of the other:
// neighbouring lanes take neighbouring cells of a row on the columns' side, and neighbouring classes (channels last) or
// pixels (NCHW) on the other, 16 bytes each where strides allow. Where a row and a cell stand in memory is worked out
// once per block.
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

// Division of numbers below 2^31 by multiplication (Granlund and Montgomery 1994).
struct Divisor {
  unsigned divisor = 1, factor = 0, shift = 0;
  Divisor() = default;
  explicit Divisor(int d) : divisor(d) {
    while ((1u << shift) < divisor) ++shift;
    factor = static_cast<unsigned>((uint64_t(1) << (31 + shift)) / divisor + 1);
  }
  __device__ __forceinline__ int divide(int n) const { return int((2 * uint64_t(n) * factor) >> 32 >> shift); }
  __device__ __forceinline__ int divide(int n, int& remainder) const {
    const int quotient = divide(n);
    remainder = n - quotient * int(divisor);
    return quotient;
  }
};

template <typename T>
struct Call {
  T *columns, *pixels;
  const T* bias;
  const Accumulator<T>* temperature;
  int64_t columns_n, columns_row, columns_cell, pixels_n, pixels_k, pixels_y, pixels_x;  // strides in elements
  int r, classes, cells, height, width;
  int rows, row_tiles, cell_tiles;  // a tile's rows: pairs of dx and class, in NCHW with all dx of a class
  Divisor by_r, by_classes, by_w;
  Divisor by_run, by_plane;  // units of a tile's pixels: in one run of neighbours, in one class
  bool classes_fastest, wide_columns, wide_pixels, bfloat16;
};

template <typename T>
struct Tile {
  using A = Accumulator<T>;
  static constexpr int V = vector_length<T>;

  struct Row {
    int64_t column, pixel;  // offsets
    int dx;                 // beyond every output if there is no such row
    A bias;
  };
  struct Cell {
    int64_t pixel;
    int room;  // pixels from its first to the end of the output's row
  };

  const Call<T>& call;
  T *columns, *pixels;
  int rows, cells;  // that exist
  A factor;
  A* tile;
  Row* row;
  Cell* cell;

  static std::size_t bytes(int rows) {
    return sizeof(A) * round_up(rows * pitch, 16) + sizeof(Row) * rows + sizeof(Cell) * tile_cells;
  }
  __host__ __device__ static int round_up(int a, int b) { return (a + b - 1) / b * b; }

  __device__ __forceinline__ explicit Tile(const Call<T>& call) : call(call) {
    unsigned rest = blockIdx.x;
    const auto next = [&](int count) {
      const int index = rest % count;
      rest /= count;
      return index;
    };
    const int first_cell = next(call.cell_tiles) * tile_cells, first_row = next(call.row_tiles) * call.rows;
    const int dy = next(call.r);
    columns = call.columns + int64_t(rest) * call.columns_n;
    pixels = call.pixels + int64_t(rest) * call.pixels_n;
    rows = call.r * call.classes - first_row, cells = call.cells - first_cell;
    if (rows > call.rows) rows = call.rows;
    if (cells > tile_cells) cells = tile_cells;
    factor = call.temperature ? A(1) / *call.temperature : A(1);
    tile = reinterpret_cast<A*>(shared_memory());
    row = reinterpret_cast<Row*>(tile + round_up(call.rows * pitch, 16));
    cell = reinterpret_cast<Cell*>(row + call.rows);

    for (int q = threadIdx.x; q < call.rows; q += blockDim.x) {
      int minor = 0;
      const int major = (call.classes_fastest ? call.by_classes : call.by_r).divide(first_row + q, minor);
      const int dx = call.classes_fastest ? major : minor, k = call.classes_fastest ? minor : major;
      const int n = (dy * call.r + dx) * call.classes + k;
      const bool exists = q < rows;
      row[q] = {n * call.columns_row + first_cell * call.columns_cell, dx * call.pixels_x + k * call.pixels_k,
                exists ? dx : 1 << 30, exists && call.bias ? accumulator(call.bias[n], call.bfloat16) : A(0)};
    }
    for (int c = threadIdx.x; c < tile_cells; c += blockDim.x) {
      int j = 0;
      const int y = call.by_w.divide(first_cell + c, j) * call.r + dy, x = j * call.r;
      cell[c] = {y * call.pixels_y + x * call.pixels_x, c < cells && y < call.height ? call.width - x : 0};
    }
    __syncthreads();
  }

  __device__ __forceinline__ T* column(int q, int c) const { return columns + row[q].column + c * call.columns_cell; }
  __device__ __forceinline__ T* pixel(int q, int c) const { return pixels + row[q].pixel + cell[c].pixel; }
  __device__ __forceinline__ bool is_pixel(int q, int c) const { return row[q].dx < cell[c].room; }
  __device__ __forceinline__ A& at(int q, int c) const { return tile[q * pitch + c]; }

  // Calls wide(q, c) for V cells of row q from c on, or single(q, c) for one.
  template <typename Wide, typename Single>
  __device__ __forceinline__ void for_columns(Wide wide, Single single) const {
    if (call.wide_columns) {
      constexpr int units = tile_cells / V;
      for (int unit = threadIdx.x; unit < rows * units; unit += blockDim.x) {
        const int q = unit / units, first = unit % units * V;
        if (first + V <= cells)
          wide(q, first);
        else
          for (int c = first; c < cells; ++c) single(q, c);
      }
    } else {
      const int c = threadIdx.x % tile_cells;
      if (c < cells)
        for (int q = threadIdx.x / tile_cells; q < rows; q += blockDim.x / tile_cells) single(q, c);
    }
  }

  // Calls wide(q, c) for V rows from q on, neighbours in memory, or single(q, c) for one; also where there is no pixel.
  template <typename Wide, typename Single>
  __device__ __forceinline__ void for_pixels(Wide wide, Single single) const {
    const int step = call.wide_pixels ? V : 1;
    for (int index = threadIdx.x; index < call.rows / step * tile_cells; index += blockDim.x) {
      int q = 0, c = 0;
      if (call.classes_fastest) {
        // V cells of a unit beside each other, for the banks.
        const int beside = index % step;
        c = call.by_run.divide(index / step, q) * step + beside;
        q *= step;
      } else {
        int unit = 0;
        const int k = call.by_plane.divide(index, unit);
        c = call.by_run.divide(unit, q);
        q = k * call.r + q * step;
      }
      if (call.wide_pixels && is_pixel(q + V - 1, c))
        wide(q, c);
      else
        for (int e = q; e < q + step; ++e) single(e, c);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(threads) rearrange_kernel(const __grid_constant__ Call<T> call) {
  constexpr int V = vector_length<T>;
  const Tile<T> t(call);
  t.for_columns(
      [&](int q, int c) {
        Accumulator<T> part[V];
        unpack(load_vector(static_cast<const T*>(t.column(q, c))), call.bfloat16, part);
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) t.at(q, c + e) = (part[e] + t.row[q].bias) * t.factor;
      },
      [&](int q, int c) { t.at(q, c) = (accumulator(*t.column(q, c), call.bfloat16) + t.row[q].bias) * t.factor; });
  __syncthreads();
  t.for_pixels(
      [&](int q, int c) {
        Accumulator<T> part[V];
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) part[e] = t.at(q + e, c);
        store_vector(t.pixel(q, c), pack<T>(part, call.bfloat16));
      },
      [&](int q, int c) {
        if (t.is_pixel(q, c)) *t.pixel(q, c) = rounded<T>(t.at(q, c), call.bfloat16);
      });
}

template <typename T>
__global__ void __launch_bounds__(threads) rearrange_backward_kernel(const __grid_constant__ Call<T> call) {
  constexpr int V = vector_length<T>;
  const Tile<T> t(call);
  t.for_pixels(
      [&](int q, int c) {
        Accumulator<T> part[V];
        unpack(load_vector(static_cast<const T*>(t.pixel(q, c))), call.bfloat16, part);
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) t.at(q + e, c) = part[e] * t.factor;
      },
      [&](int q, int c) {
        t.at(q, c) = t.is_pixel(q, c) ? accumulator(*t.pixel(q, c), call.bfloat16) * t.factor : Accumulator<T>(0);
      });
  __syncthreads();
  t.for_columns(
      [&](int q, int c) {
        Accumulator<T> part[V];
        SEGOPS_UNROLL for (int e = 0; e < V; ++e) part[e] = t.at(q, c + e);
        store_vector(t.column(q, c), pack<T>(part, call.bfloat16));
      },
      [&](int q, int c) { *t.column(q, c) = rounded<T>(t.at(q, c), call.bfloat16); });
}

template <typename T>
void rearrange(const Tensor& columns, const Tensor& pixels, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& temperature, int64_t scale_factor, bool backward) {
  constexpr int V = vector_length<T>;
  const auto narrow = [](int64_t size) {
    STD_TORCH_CHECK(size < (int64_t(1) << 30), "segops.dupsample: a size of ", size, " is too large");
    return static_cast<int>(size);
  };
  const auto whole = [](const Tensor& t, int axis) { return t.size(axis) <= 1 || t.stride(axis) % V == 0; };
  Call<T> call{};
  call.columns = static_cast<T*>(columns.data_ptr()), call.pixels = static_cast<T*>(pixels.data_ptr());
  if (bias) call.bias = static_cast<const T*>(bias->data_ptr());
  if (temperature) call.temperature = static_cast<const Accumulator<T>*>(temperature->data_ptr());
  call.columns_n = columns.stride(0), call.columns_row = columns.stride(1), call.columns_cell = columns.stride(2);
  call.pixels_n = pixels.stride(0), call.pixels_k = pixels.stride(1);
  call.pixels_y = pixels.stride(2), call.pixels_x = pixels.stride(3);
  call.r = narrow(scale_factor), call.classes = narrow(pixels.size(1)), call.cells = narrow(columns.size(2));
  call.height = narrow(pixels.size(2)), call.width = narrow(pixels.size(3));
  call.bfloat16 = columns.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  call.classes_fastest = call.pixels_k == 1 && call.classes > 1;
  const int all = narrow(scale_factor * pixels.size(1));
  call.rows = call.classes_fastest ? std::min((all + V - 1) / V * V, tile_rows)
                                   : std::min(all, std::max(tile_rows / call.r, 1) * call.r);
  call.wide_columns = call.columns_cell == 1 && aligned(call.columns) && whole(columns, 0) && whole(columns, 1);
  // A pixel's classes go on into the next pixel's, a cell's pixels into the next cell's.
  const bool neighbours = call.classes_fastest ? call.pixels_x == call.classes && all % V == 0
                                               : call.pixels_x == 1 && call.r % V == 0 && whole(pixels, 1);
  call.wide_pixels = neighbours && aligned(call.pixels) && whole(pixels, 0) && whole(pixels, 2);
  const int step = call.wide_pixels ? V : 1, run = (call.classes_fastest ? call.rows : call.r) / step;
  call.by_r = Divisor(call.r), call.by_classes = Divisor(call.classes);
  call.by_w = Divisor((call.width + call.r - 1) / call.r);
  call.by_run = Divisor(run), call.by_plane = Divisor(run * tile_cells);
  call.row_tiles = (all + call.rows - 1) / call.rows;
  call.cell_tiles = (call.cells + tile_cells - 1) / tile_cells;
  const int64_t blocks = pixels.size(0) * call.r * call.row_tiles * int64_t(call.cell_tiles);
  STD_TORCH_CHECK(blocks <= max_grid_x, "segops.dupsample: ", blocks, " tiles are more than a launch takes");
  launch(backward ? rearrange_backward_kernel<T> : rearrange_kernel<T>, static_cast<unsigned>(blocks), threads,
         Tile<T>::bytes(call.rows), columns, call);
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
