// Multi-scale strip convolution on the GPU (semantics: segops/reference/multi_scale_strip_conv.py).
//
//   forward    a = K * x + b,  h_i = w_i * a + b_i,  out = a + sum_i (v_i * h_i + b'_i)     w_i: 1 x k, v_i: k x 1
//   backward   u_i = v_i^T * g,  da = g + sum_i w_i^T * u_i,  dx = K^T * da
//              dv_i = <h_i, g>,  dw_i = <a, u_i>,  dK = <x, da>,  db' = sum g,  db_i = sum u_i,  db = sum da
//
// A block owns a tile of one channel's plane. The pixels that the tile's windows see are brought into shared memory once;
// every map between the convolutions stays there. A thread makes eight outputs along a window from an input loaded once,
// seven taps at a time; lanes are neighbours across the window, in rows of an odd pitch, so that no two meet one bank.
// Where channels are adjacent in memory the blocks of one tile follow one another and share its cache lines. Sums of taps
// are made per tile by warps that own seven taps each, and added up tile after tile by a second kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "common/launch.h"
#include "common/scalar.h"
#include "schemas.h"

namespace segops {
namespace {

using torch::stable::Tensor;

constexpr int threads = 256, warps = threads / 32, P = 8, max_taps = 7, max_pairs = 16;

template <typename T>
struct Map {
  T* data;
  int64_t n, c, y, x;
  __device__ __forceinline__ int64_t at(int64_t image, int64_t channel, int row, int column) const {
    return image * n + channel * c + row * y + column * x;
  }
};

template <typename T>
struct Call {
  Map<T> x, out, grad_out, scaled, scale;  // out: of x's gradient in the backward
  const T *taps, *biases;
  int64_t taps_c, taps_k, biases_c, biases_k;
  Accumulator<T>* partial;  // [C][tiles of all images][entries]
  int channels, height, width, kh, kw, pairs, lengths[max_pairs], reach, entries, taps_count;
  int tile, rows_of_tiles, columns_of_tiles;
  int64_t images;
  bool channels_fastest, bfloat16;
};

// A plane in shared memory: rows from `top` on, columns from `left` on, of the map.
template <typename A>
struct Plane {
  A* data;
  int top, left, rows, columns, pitch;
  __device__ __forceinline__ A& at(int y, int x) const { return data[(y - top) * pitch + x - left]; }
};

__host__ __device__ __forceinline__ int odd(int n) { return n | 1; }

// Elements of a plane; windows of whole passes read up to P + max_taps beyond a row.
__host__ __device__ __forceinline__ int plane_size(int rows, int columns) { return rows * odd(columns + P); }

template <typename A>
__device__ __forceinline__ Plane<A> take(A*& memory, int top, int left, int rows, int columns) {
  const Plane<A> plane{memory, top, left, rows, columns, odd(columns + P)};
  memory += plane_size(rows, columns);
  return plane;
}

// sums[p] += sum_t taps[t] in[(p + t) step]
template <int Taps, typename A>
__device__ __forceinline__ void correlate(A (&sums)[P], const A* taps, const A* in, int step) {
  A tap[Taps];
  SEGOPS_UNROLL for (int t = 0; t < Taps; ++t) tap[t] = taps[t];
  SEGOPS_UNROLL for (int r = 0; r < P + Taps - 1; ++r) {
    const A v = in[r * step];
    SEGOPS_UNROLL for (int t = 0; t < Taps; ++t)
      if (r - t >= 0 && r - t < P) sums[r - t] += tap[t] * v;
  }
}

// sums[t] += sum_p fixed[p] in[(p + t) step]
template <int Taps, typename A>
__device__ __forceinline__ void correlate_taps(A (&sums)[max_taps], const A (&fixed)[P], const A* in, int step) {
  SEGOPS_UNROLL for (int r = 0; r < P + Taps - 1; ++r) {
    const A v = in[r * step];
    SEGOPS_UNROLL for (int t = 0; t < Taps; ++t)
      if (r - t >= 0 && r - t < P) sums[t] += fixed[r - t] * v;
  }
}

template <typename Pass>
__device__ __forceinline__ void with_taps(int taps, Pass pass) {
  switch (taps) {
    case 7: return pass(std::integral_constant<int, 7>{});
    case 6: return pass(std::integral_constant<int, 6>{});
    case 5: return pass(std::integral_constant<int, 5>{});
    case 4: return pass(std::integral_constant<int, 4>{});
    case 3: return pass(std::integral_constant<int, 3>{});
    case 2: return pass(std::integral_constant<int, 2>{});
    default: return pass(std::integral_constant<int, 1>{});
  }
}

// One tile of one channel: what both directions share.
template <typename T>
struct Tile {
  using A = Accumulator<T>;
  const Call<T>& call;
  int64_t image, channel;
  int tile_index, y0, x0, y1, x1;
  A *taps, *biases, *memory;

  __device__ __forceinline__ explicit Tile(const Call<T>& call) : call(call) {
    int64_t rest = blockIdx.x;
    const int tiles = call.rows_of_tiles * call.columns_of_tiles;
    if (call.channels_fastest) channel = rest % call.channels, rest /= call.channels;
    tile_index = int(rest % tiles), rest /= tiles;
    if (!call.channels_fastest) channel = rest % call.channels, rest /= call.channels;
    image = rest;
    y0 = tile_index / call.columns_of_tiles * call.tile, x0 = tile_index % call.columns_of_tiles * call.tile;
    y1 = y0 + call.tile < call.height ? y0 + call.tile : call.height;
    x1 = x0 + call.tile < call.width ? x0 + call.tile : call.width;
    taps = reinterpret_cast<A*>(shared_memory()), biases = taps + call.taps_count;
    memory = taps + (call.entries + 3) / 4 * 4;
  }

  // The taps, in reverse order for the adjoint.
  __device__ __forceinline__ void load_taps() const {
    for (int i = threadIdx.x; i < call.taps_count; i += threads)
      taps[i] = accumulator(call.taps[channel * call.taps_c + i * call.taps_k], call.bfloat16);
    for (int i = threadIdx.x; i < 1 + 2 * call.pairs; i += threads)
      biases[i] = accumulator(call.biases[channel * call.biases_c + i * call.biases_k], call.bfloat16);
  }
  __device__ __forceinline__ bool inside(int y, int x) const {
    return y >= 0 && y < call.height && x >= 0 && x < call.width;
  }

  __device__ __forceinline__ void clear(const Plane<A>& plane) const {
    for (int i = threadIdx.x; i < plane_size(plane.rows, plane.columns); i += threads) plane.data[i] = 0;
  }
  __device__ __forceinline__ void fetch(const Plane<A>& plane, const Map<T>& map) const {
    for (int i = threadIdx.x; i < plane.rows * plane.columns; i += threads) {
      const int y = plane.top + i / plane.columns, x = plane.left + i % plane.columns;
      if (inside(y, x)) plane.at(y, x) = accumulator(map.data[map.at(image, channel, y, x)], call.bfloat16);
    }
  }

  // out (+)= start + window * in over all of out that is inside the map; zero outside it. Along W.
  __device__ __forceinline__ void along_rows(const Plane<A>& out, const Plane<A>& in, int kh, int kw, const A* window,
                                             A start, bool add) const {
    const int runs = (out.columns + P - 1) / P;
    for (int unit = threadIdx.x; unit < out.rows * runs; unit += threads) {
      const int y = out.top + unit % out.rows, x = out.left + unit / out.rows * P;
      A sums[P];
      SEGOPS_UNROLL for (int p = 0; p < P; ++p) sums[p] = start;
      for (int i = 0; i < kh; ++i)
        for (int t = 0; t < kw; t += max_taps)
          with_taps(kw - t < max_taps ? kw - t : max_taps, [&](auto count) {
            correlate<decltype(count)::value>(sums, window + i * kw + t, &in.at(y + i - kh / 2, x + t - kw / 2), 1);
          });
      SEGOPS_UNROLL for (int p = 0; p < P; ++p)
        if (x + p < out.left + out.columns) {
          A& to = out.at(y, x + p);
          const A sum = add ? to + sums[p] : sums[p];
          to = inside(y, x + p) ? sum : A(0);
        }
    }
  }
  // The same along H, for a k x 1 window.
  __device__ __forceinline__ void along_columns(const Plane<A>& out, const Plane<A>& in, int k, const A* window,
                                                A start, bool add) const {
    const int runs = (out.rows + P - 1) / P;
    for (int unit = threadIdx.x; unit < out.columns * runs; unit += threads) {
      const int x = out.left + unit % out.columns, y = out.top + unit / out.columns * P;
      A sums[P];
      SEGOPS_UNROLL for (int p = 0; p < P; ++p) sums[p] = start;
      for (int t = 0; t < k; t += max_taps)
        with_taps(k - t < max_taps ? k - t : max_taps, [&](auto count) {
          correlate<decltype(count)::value>(sums, window + t, &in.at(y + t - k / 2, x), in.pitch);
        });
      SEGOPS_UNROLL for (int p = 0; p < P; ++p)
        if (y + p < out.top + out.rows) {
          A& to = out.at(y + p, x);
          const A sum = add ? to + sums[p] : sums[p];
          to = inside(y + p, x) ? sum : A(0);
        }
    }
  }

  // Sums of kh x kw taps over the tile, fixed(p) in(p + offset), along W (or of k x 1, along H): a warp takes up to seven
  // taps of a row of them. `turn` deals the work out to the warps.
  __device__ __forceinline__ void sum_taps(A* sums, const Plane<A>& fixed, const Plane<A>& in, int kh, int kw, bool down,
                                           int& turn) const {
    const int lines = down ? call.tile : y1 - y0, runs = call.tile / P, k = down ? kh : kw;
    const int step = down ? in.pitch : 1;
    for (int i = 0; i < (down ? 1 : kh); ++i)
      for (int t = 0; t < k; t += max_taps) {
        if (turn++ % warps != int(threadIdx.x) / 32) continue;
        const int count = k - t < max_taps ? k - t : max_taps;
        A sum[max_taps] = {};
        for (int unit = threadIdx.x % 32; unit < lines * runs; unit += 32) {
          const int y = down ? y0 + unit / lines * P : y0 + unit % lines;
          const int x = down ? x0 + unit % lines : x0 + unit / lines * P;
          A still[P];
          SEGOPS_UNROLL for (int p = 0; p < P; ++p) {
            const int row = down ? y + p : y, column = down ? x : x + p;
            still[p] = row < y1 && column < x1 ? fixed.at(row, column) : A(0);
          }
          const A* const first = down ? &in.at(y + t - kh / 2, x) : &in.at(y + i - kh / 2, x + t - kw / 2);
          with_taps(count, [&](auto n) { correlate_taps<decltype(n)::value>(sum, still, first, step); });
        }
        SEGOPS_UNROLL for (int e = 0; e < max_taps; ++e) {
          const A total = over_warp(sum[e]);
          if (e < count && threadIdx.x % 32 == 0) sums[i * kw + t + e] = total;
        }
      }
  }
  // Sum of a map over the tile.
  __device__ __forceinline__ void sum_all(A* sum, const Plane<A>& map, int& turn) const {
    if (turn++ % warps != int(threadIdx.x) / 32) return;
    A total = 0;
    for (int i = threadIdx.x % 32; i < (y1 - y0) * (x1 - x0); i += 32)
      total += map.at(y0 + i / (x1 - x0), x0 + i % (x1 - x0));
    total = over_warp(total);
    if (threadIdx.x % 32 == 0) *sum = total;
  }
  __device__ __forceinline__ static A over_warp(A x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
  }
};

__host__ __device__ __forceinline__ int forward_size(int tile, int reach, int rh, int rw) {
  return plane_size(tile + 2 * (reach + rh), tile + 2 * (reach + rw)) + plane_size(tile + 2 * reach, tile + 2 * reach) +
         plane_size(tile + 2 * reach, tile) + plane_size(tile, tile);
}

__host__ __device__ __forceinline__ int backward_size(int tile, int reach, int rh, int rw) {
  const int wide = tile + 2 * (reach + rw);
  return plane_size(tile + 2 * (reach + rh), wide) + 2 * plane_size(tile + 2 * rh, wide) +
         plane_size(tile, tile + 2 * reach) + plane_size(tile, tile) + plane_size(tile + 2 * rh, tile + 2 * rw);
}

template <typename T>
__global__ void __launch_bounds__(threads) forward_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  const Tile<T> tile(call);
  const int size = call.tile, r = call.reach, rh = call.kh / 2, rw = call.kw / 2;
  A* memory = tile.memory;
  const Plane<A> x = take(memory, tile.y0 - r - rh, tile.x0 - r - rw, size + 2 * (r + rh), size + 2 * (r + rw));
  const Plane<A> a = take(memory, tile.y0 - r, tile.x0 - r, size + 2 * r, size + 2 * r);
  const Plane<A> h = take(memory, tile.y0 - r, tile.x0, size + 2 * r, size);
  const Plane<A> out = take(memory, tile.y0, tile.x0, size, size);
  tile.load_taps();
  tile.clear(x), tile.clear(a), tile.clear(h), tile.clear(out);
  __syncthreads();
  tile.fetch(x, call.x);
  __syncthreads();
  tile.along_rows(a, x, call.kh, call.kw, tile.taps, tile.biases[0], false);
  __syncthreads();
  const A* taps = tile.taps + call.kh * call.kw;
  for (int i = 0; i < call.pairs; ++i) {
    const int k = call.lengths[i];
    tile.along_rows(h, a, 1, k, taps, tile.biases[1 + 2 * i], false);
    __syncthreads();
    tile.along_columns(out, h, k, taps + k, tile.biases[2 + 2 * i], true);
    __syncthreads();
    taps += 2 * k;
  }
  for (int i = threadIdx.x; i < size * size; i += threads) {
    const int y = tile.y0 + i / size, column = tile.x0 + i % size;
    if (y < tile.y1 && column < tile.x1)
      call.out.data[call.out.at(tile.image, tile.channel, y, column)] =
          rounded<T>(a.at(y, column) + out.at(y, column), call.bfloat16);
  }
}

template <typename T>
__global__ void __launch_bounds__(threads) backward_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  const Tile<T> tile(call);
  const int size = call.tile, r = call.reach, rh = call.kh / 2, rw = call.kw / 2, wide = size + 2 * (r + rw);
  const int left = tile.x0 - r - rw;
  A* memory = tile.memory;
  const Plane<A> g = take(memory, tile.y0 - r - rh, left, size + 2 * (r + rh), wide);
  const Plane<A> x = take(memory, tile.y0 - rh, left, size + 2 * rh, wide);
  const Plane<A> u = take(memory, tile.y0 - rh, left, size + 2 * rh, wide);
  const Plane<A> a = take(memory, tile.y0, tile.x0 - r, size, size + 2 * r);
  const Plane<A> h = take(memory, tile.y0, tile.x0, size, size);
  const Plane<A> da = take(memory, tile.y0 - rh, tile.x0 - rw, size + 2 * rh, size + 2 * rw);
  A* const reversed = memory;
  const int tiles = call.rows_of_tiles * call.columns_of_tiles;
  A* const sums =
      call.partial + ((tile.channel * call.images + tile.image) * tiles + tile.tile_index) * call.entries;
  A* const bias_sums = sums + call.taps_count;
  tile.load_taps();
  tile.clear(g), tile.clear(x), tile.clear(u), tile.clear(a), tile.clear(h), tile.clear(da);
  __syncthreads();
  const auto reverse = [&](int first, int count) {
    for (int i = threadIdx.x; i < count; i += threads) reversed[first + i] = tile.taps[first + count - 1 - i];
  };
  reverse(0, call.kh * call.kw);
  for (int i = 0, first = call.kh * call.kw; i < call.pairs; first += 2 * call.lengths[i], ++i)
    reverse(first, call.lengths[i]), reverse(first + call.lengths[i], call.lengths[i]);
  tile.fetch(g, call.grad_out), tile.fetch(x, call.x);
  __syncthreads();
  tile.along_rows(a, x, call.kh, call.kw, tile.taps, tile.biases[0], false);
  for (int i = threadIdx.x; i < da.rows * da.columns; i += threads) {
    const int y = da.top + i / da.columns, column = da.left + i % da.columns;
    da.at(y, column) = g.at(y, column);
  }
  __syncthreads();
  int turn = 0;
  for (int i = 0, first = call.kh * call.kw; i < call.pairs; first += 2 * call.lengths[i], ++i) {
    const int k = call.lengths[i];
    tile.along_rows(h, a, 1, k, tile.taps + first, tile.biases[1 + 2 * i], false);
    tile.along_columns(u, g, k, reversed + first + k, A(0), false);
    __syncthreads();
    tile.along_rows(da, u, 1, k, reversed + first, A(0), true);
    tile.sum_taps(sums + first, a, u, 1, k, false, turn);
    tile.sum_taps(sums + first + k, h, g, k, 1, true, turn);
    tile.sum_all(bias_sums + 1 + 2 * i, u, turn);
    tile.sum_all(bias_sums + 2 + 2 * i, g, turn);
    __syncthreads();
  }
  tile.sum_taps(sums, x, da, call.kh, call.kw, false, turn);
  tile.sum_all(bias_sums, da, turn);
  tile.along_rows(h, da, call.kh, call.kw, reversed, A(0), false);
  __syncthreads();
  for (int i = threadIdx.x; i < size * size; i += threads) {
    const int y = tile.y0 + i / size, column = tile.x0 + i % size;
    if (y >= tile.y1 || column >= tile.x1) continue;
    A value = h.at(y, column);
    if (call.scaled.data)
      value += accumulator(call.scaled.data[call.scaled.at(tile.image, tile.channel, y, column)], call.bfloat16) *
               accumulator(call.scale.data[call.scale.at(tile.image, tile.channel, y, column)], call.bfloat16);
    call.out.data[call.out.at(tile.image, tile.channel, y, column)] = rounded<T>(value, call.bfloat16);
  }
}

template <typename T>
struct Gradients {
  T *taps, *biases;
  int64_t taps_c, taps_k, biases_c, biases_k;
};

// Entry by entry, the sums of a channel's tiles in order. Windows' taps stand in reverse order.
template <typename T>
__global__ void __launch_bounds__(threads) sum_kernel(const Call<T> call, const Gradients<T> to) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= int64_t(call.channels) * call.entries) return;
  const int64_t channel = index / call.entries;
  const int entry = int(index % call.entries);
  const int64_t count = call.images * call.rows_of_tiles * call.columns_of_tiles;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += double(call.partial[(channel * count + i) * call.entries + entry]);
  const T value = rounded<T>(static_cast<A>(sum), call.bfloat16);
  if (entry >= call.taps_count) {
    to.biases[channel * to.biases_c + (entry - call.taps_count) * to.biases_k] = value;
    return;
  }
  int first = 0, length = call.kh * call.kw;
  for (int i = 0; entry >= first + length; ++i) first += length, length = call.lengths[i / 2];
  to.taps[channel * to.taps_c + (2 * first + length - 1 - entry) * to.taps_k] = value;
}

template <typename T>
Map<T> map(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <typename T>
Call<T> prepare(const Tensor& x, const Tensor& taps, const Tensor& biases, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& strip_lengths) {
  STD_TORCH_CHECK(strip_lengths.size() <= max_pairs, "segops.multi_scale_strip_conv: the CUDA kernel takes up to ",
                  max_pairs, " pairs of strips, got ", strip_lengths.size());
  STD_TORCH_CHECK(x.size(2) < (1 << 30) && x.size(3) < (1 << 30), "segops.multi_scale_strip_conv: map too large");
  Call<T> call{};
  call.x = map<T>(x);
  call.taps = static_cast<const T*>(taps.data_ptr()), call.biases = static_cast<const T*>(biases.data_ptr());
  call.taps_c = taps.stride(0), call.taps_k = taps.stride(1);
  call.biases_c = biases.stride(0), call.biases_k = biases.stride(1);
  call.images = x.size(0), call.channels = static_cast<int>(x.size(1));
  call.height = static_cast<int>(x.size(2)), call.width = static_cast<int>(x.size(3));
  call.kh = static_cast<int>(kernel_size[0]), call.kw = static_cast<int>(kernel_size[1]);
  call.pairs = static_cast<int>(strip_lengths.size());
  for (int i = 0; i < call.pairs; ++i) {
    call.lengths[i] = static_cast<int>(strip_lengths[i]);
    call.reach = call.lengths[i] / 2 > call.reach ? call.lengths[i] / 2 : call.reach;
  }
  call.taps_count = static_cast<int>(taps.size(1)), call.entries = call.taps_count + 1 + 2 * call.pairs;
  call.channels_fastest = x.stride(1) == 1;
  call.bfloat16 = x.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  return call;
}

// The largest tile that shared memory holds, no larger than the map asks for; returns its bytes.
template <typename T, typename Size>
std::size_t choose_tile(Call<T>& call, Size size) {
  const int side = call.height > call.width ? call.height : call.width;
  for (call.tile = 64; call.tile >= P; call.tile /= 2) {
    const std::size_t elements = (call.entries + 3) / 4 * 4 + size(call.tile, call.reach, call.kh / 2, call.kw / 2) +
                                 std::size_t(call.taps_count) + P + max_taps;
    const std::size_t bytes = elements * sizeof(Accumulator<T>);
    if (bytes > max_shared || (call.tile > P && call.tile / 2 >= side)) continue;
    call.rows_of_tiles = (call.height + call.tile - 1) / call.tile;
    call.columns_of_tiles = (call.width + call.tile - 1) / call.tile;
    return bytes;
  }
  STD_TORCH_CHECK(false, "segops.multi_scale_strip_conv: windows of ", 2 * call.reach + 1,
                  " taps need more shared memory than a block has");
  return 0;
}

template <typename T>
unsigned blocks_of(const Call<T>& call) {
  const int64_t count = call.images * call.channels * call.rows_of_tiles * call.columns_of_tiles;
  STD_TORCH_CHECK(count <= max_grid_x, "segops.multi_scale_strip_conv: ", count, " tiles are more than a launch takes");
  return static_cast<unsigned>(count);
}

// Memory for sums of x's elements.
Tensor new_sums(const Tensor& x, int64_t count) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x, {count}, dtype);
}

void multi_scale_strip_conv(const Tensor& out, const Tensor& x, const Tensor& taps, const Tensor& biases,
                            std::vector<int64_t> kernel_size, std::vector<int64_t> strip_lengths) {
  if (x.numel() == 0) return;
  for_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Call<T> call = prepare<T>(x, taps, biases, kernel_size, strip_lengths);
    call.out = map<T>(out);
    const std::size_t bytes = choose_tile(call, forward_size);
    launch(forward_kernel<T>, blocks_of(call), threads, bytes, x, call);
  });
}

void multi_scale_strip_conv_backward(const Tensor& grad_x, const Tensor& grad_taps, const Tensor& grad_biases,
                                     const Tensor& grad_out, const Tensor& x, const Tensor& taps, const Tensor& biases,
                                     const std::optional<Tensor>& scaled, const std::optional<Tensor>& scale,
                                     std::vector<int64_t> kernel_size, std::vector<int64_t> strip_lengths) {
  for_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Call<T> call = prepare<T>(x, taps, biases, kernel_size, strip_lengths);
    call.out = map<T>(grad_x), call.grad_out = map<T>(grad_out);
    if (scaled) call.scaled = map<T>(*scaled), call.scale = map<T>(*scale);
    const std::size_t bytes = choose_tile(call, backward_size);
    const int64_t tiles = call.images * call.rows_of_tiles * call.columns_of_tiles;
    const Tensor partial = new_sums(x, call.channels * tiles * call.entries);
    call.partial = static_cast<A*>(partial.data_ptr());
    launch(backward_kernel<T>, blocks_of(call), threads, bytes, x, call);
    const Gradients<T> to{static_cast<T*>(grad_taps.data_ptr()), static_cast<T*>(grad_biases.data_ptr()),
                          grad_taps.stride(0), grad_taps.stride(1), grad_biases.stride(0), grad_biases.stride(1)};
    const int64_t entries = int64_t(call.channels) * call.entries;
    launch(sum_kernel<T>, static_cast<unsigned>((entries + threads - 1) / threads), threads, 0, x, call, to);
  });
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_IMPL(SEGOPS_NAMESPACE, SEGOPS_CUDA_KEY, m) {
  SEGOPS_IMPL(m, multi_scale_strip_conv, segops::multi_scale_strip_conv);
  SEGOPS_IMPL(m, multi_scale_strip_conv_backward, segops::multi_scale_strip_conv_backward);
}
