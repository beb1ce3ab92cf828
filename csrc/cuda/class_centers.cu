// Sums of features by class on the GPU (semantics: segops/reference/class_centers.py).
//
//   S_k = sum of x_p over the pixels p of class k,   backward  dx_p = dS_{y_p}
//
// A block owns `block_channels` channels, a span of classes and some stretches of pixels. Tiles of pixels come into
// shared memory along whichever axis is dense; then a thread owns a channel and walks the pixels, so that no two threads
// add to one sum: no atomics. It adds up a run of equal labels in a register, since label maps are smooth, and a run to
// its class's row in shared memory. The blocks' sums are added in order by a second kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "common/launch.h"
#include "common/scalar.h"
#include "schemas.h"

namespace segops {
namespace {

using torch::stable::Tensor;

constexpr int block_channels = 64, tile_pixels = 32, stretch = 1024, threads = 256;
constexpr int pitch = tile_pixels + 1;  // so that a column's entries lie in different banks

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }

template <typename T>
struct Call {
  using A = Accumulator<T>;
  T* x;
  const void* labels;
  int64_t x_n, x_c, x_y, x_x, label_n, label_y, label_x;  // strides in elements
  int label_bytes;
  int64_t images, ignore_index;
  int channels, classes, width, pixels, stretches, channel_blocks, span, spans;  // span: classes of a block
  int64_t units, parts;              // of a group, an image or all: stretches, and sums of some of them
  A *sums, *partial;                 // partial [groups][parts][K][C]
  int64_t *counts, *partial_counts;  // [groups][parts][K]
  bool per_image, pixels_fastest, bfloat16;

  // The class of an image's pixel, -1 where it does not count.
  __device__ __forceinline__ int label(int64_t image, int pixel) const {
    const int64_t at = image * label_n + pixel / width * label_y + pixel % width * label_x;
    int64_t value = 0;
    switch (label_bytes) {
      case 1: value = static_cast<const uint8_t*>(labels)[at]; break;
      case 2: value = static_cast<const int16_t*>(labels)[at]; break;
      case 4: value = static_cast<const int32_t*>(labels)[at]; break;
      default: value = static_cast<const int64_t*>(labels)[at];
    }
    return value < 0 || value >= classes || value == ignore_index ? -1 : static_cast<int>(value);
  }
  __device__ __forceinline__ T* at(int64_t image, int channel, int pixel) const {
    return x + image * x_n + channel * x_c + pixel / width * x_y + pixel % width * x_x;
  }
};

template <typename T>
__global__ void __launch_bounds__(block_channels) partial_kernel(const __grid_constant__ Call<T> call) {
  using A = Accumulator<T>;
  A* const table = reinterpret_cast<A*>(shared_memory());  // [span][block_channels]
  A* const tile = table + call.span * block_channels;      // [block_channels][pitch]
  int* const label = reinterpret_cast<int*>(tile + block_channels * pitch);
  int64_t* const number = reinterpret_cast<int64_t*>(label + tile_pixels);  // [span], of the first block of channels

  const int lane = threadIdx.x;
  unsigned rest = blockIdx.x;
  const int first_channel = rest % call.channel_blocks * block_channels;
  rest /= call.channel_blocks;
  const int first_class = rest % call.spans * call.span;
  const int64_t part = rest / call.spans, group = part / call.parts, within = part % call.parts;
  for (int k = 0; k < call.span; ++k) table[k * block_channels + lane] = 0;
  if (lane == 0)
    for (int k = 0; k < call.span; ++k) number[k] = 0;

  A run = 0;
  int current = -1, length = 0;
  const auto finish = [&] {
    const int k = current - first_class;
    if (current < 0 || k < 0 || k >= call.span) return;
    table[k * block_channels + lane] += run;
    if (lane == 0) number[k] += length;
  };
  const int64_t last = group * call.units + (within + 1) * call.units / call.parts;
  for (int64_t unit = group * call.units + within * call.units / call.parts; unit < last; ++unit) {
    const int64_t image = unit / call.stretches;
    const int start = static_cast<int>(unit % call.stretches) * stretch, end = least(start + stretch, call.pixels);
    for (int first = start; first < end; first += tile_pixels) {
      if (lane < tile_pixels) label[lane] = first + lane < end ? call.label(image, first + lane) : -1;
      for (int i = lane; i < block_channels * tile_pixels; i += block_channels) {
        const int c = call.pixels_fastest ? i / tile_pixels : i % block_channels;
        const int p = call.pixels_fastest ? i % tile_pixels : i / block_channels;
        const bool exists = first + p < end && first_channel + c < call.channels;
        tile[c * pitch + p] = exists ? accumulator(*call.at(image, first_channel + c, first + p), call.bfloat16) : A(0);
      }
      __syncthreads();
      for (int p = 0; p < tile_pixels; ++p) {
        const A value = tile[lane * pitch + p];
        if (label[p] == current) {
          run += value, ++length;
        } else {
          finish();
          run = value, current = label[p], length = 1;
        }
      }
      __syncthreads();
    }
  }
  finish();

  const int classes = least(call.span, call.classes - first_class);
  const int64_t row = part * call.classes + first_class;
  if (first_channel + lane < call.channels)
    for (int k = 0; k < classes; ++k)
      call.partial[(row + k) * call.channels + first_channel + lane] = table[k * block_channels + lane];
  if (first_channel == 0 && lane == 0)
    for (int k = 0; k < classes; ++k) call.partial_counts[row + k] = number[k];
}

// Adds up the parts of each sum and count, [K][C] or [N][K][C], in order.
template <typename T>
__global__ void __launch_bounds__(threads) sum_kernel(const __grid_constant__ Call<T> call) {
  const int64_t table = int64_t(call.classes) * call.channels, groups = call.per_image ? call.images : 1;
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= groups * table) return;
  const int64_t group = i / table, entry = i % table, k = entry / call.channels;
  const int64_t first = group * call.parts;
  Accumulator<T> sum = 0;
  for (int64_t part = first; part < first + call.parts; ++part) sum += call.partial[part * table + entry];
  call.sums[i] = sum;
  if (entry % call.channels) return;
  int64_t count = 0;
  for (int64_t part = first; part < first + call.parts; ++part) count += call.partial_counts[part * call.classes + k];
  call.counts[group * call.classes + k] = count;
}

template <typename T>
__global__ void __launch_bounds__(threads) backward_kernel(const __grid_constant__ Call<T> call) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int64_t rest = call.pixels_fastest ? i / call.pixels : i / call.channels;
  const int64_t image = call.pixels_fastest ? rest / call.channels : rest / call.pixels;
  if (image >= call.images) return;
  const int pixel = static_cast<int>(call.pixels_fastest ? i % call.pixels : rest % call.pixels);
  const int channel = static_cast<int>(call.pixels_fastest ? rest % call.channels : i % call.channels);
  const int label = call.label(image, pixel);
  const int64_t row = (call.per_image ? image * call.classes : 0) + label;
  *call.at(image, channel, pixel) =
      rounded<T>(label < 0 ? Accumulator<T>(0) : call.sums[row * call.channels + channel], call.bfloat16);
}

template <typename T>
Call<T> prepare(const Tensor& x, const Tensor& sums, const Tensor& labels, int64_t ignore_index) {
  Call<T> call{};
  call.x = static_cast<T*>(x.data_ptr()), call.sums = static_cast<Accumulator<T>*>(sums.data_ptr());
  call.x_n = x.stride(0), call.x_c = x.stride(1), call.x_y = x.stride(2), call.x_x = x.stride(3);
  call.labels = labels.data_ptr(), call.label_bytes = static_cast<int>(labels.element_size());
  call.label_n = labels.stride(0), call.label_y = labels.stride(1), call.label_x = labels.stride(2);
  call.images = x.size(0), call.ignore_index = ignore_index;
  STD_TORCH_CHECK(x.size(1) < INT32_MAX && x.size(2) * x.size(3) < INT32_MAX - stretch,
                  "segops.class_centers: a map of ", x.size(1), " x ", x.size(2), " x ", x.size(3));
  call.channels = static_cast<int>(x.size(1)), call.classes = static_cast<int>(sums.size(-2));
  call.width = static_cast<int>(x.size(3)), call.pixels = static_cast<int>(x.size(2) * x.size(3));
  call.per_image = sums.dim() == 3, call.pixels_fastest = x.stride(1) != 1;
  call.bfloat16 = x.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  return call;
}

unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= max_grid_x, "segops.class_centers: ", blocks, " blocks are more than a launch takes");
  return static_cast<unsigned>(blocks);
}

int64_t class_centers(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels,
                      int64_t ignore_index) {
  for_dtype(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Call<T> call = prepare<T>(features, sums, labels, ignore_index);
    call.counts = static_cast<int64_t*>(counts.data_ptr());
    call.stretches = (call.pixels + stretch - 1) / stretch;
    call.channel_blocks = (call.channels + block_channels - 1) / block_channels;
    const int most = 256 * 4 / sizeof(A);  // 64 KiB
    call.span = call.classes < most ? call.classes : most;
    call.spans = (call.classes + call.span - 1) / call.span;
    const int64_t groups = call.per_image ? call.images : 1, all = call.images * call.stretches;
    call.units = call.per_image ? call.stretches : all;
    // What the parts take is little beside the features.
    const int64_t fit = features.numel() * features.element_size() / 16 / (sums.numel() * int64_t(sizeof(A)));
    call.parts = fit < 1 ? 1 : fit < call.units ? fit : call.units;
    const int64_t parts = groups * call.parts;
    const Tensor partial = torch::stable::new_empty(sums, {parts * call.classes * call.channels});
    const Tensor partial_counts = torch::stable::new_empty(counts, {parts * call.classes});
    call.partial = static_cast<A*>(partial.data_ptr());
    call.partial_counts = static_cast<int64_t*>(partial_counts.data_ptr());
    const std::size_t bytes = sizeof(A) * block_channels * (call.span + pitch) + sizeof(int) * tile_pixels +
                              sizeof(int64_t) * call.span;
    launch(partial_kernel<T>, grid(parts * call.channel_blocks * call.spans), block_channels, bytes, features, call);
    launch(sum_kernel<T>, grid((sums.numel() + threads - 1) / threads), threads, 0, features, call);
  });
  return -1;
}

void class_centers_backward(const Tensor& grad_features, const Tensor& grad_sums, const Tensor& labels,
                            int64_t ignore_index) {
  for_dtype(grad_features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call = prepare<T>(grad_features, grad_sums, labels, ignore_index);
    launch(backward_kernel<T>, grid((grad_features.numel() + threads - 1) / threads), threads, 0, grad_features, call);
  });
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_IMPL(SEGOPS_NAMESPACE, SEGOPS_CUDA_KEY, m) {
  SEGOPS_IMPL(m, class_centers, segops::class_centers);
  SEGOPS_IMPL(m, class_centers_backward, segops::class_centers_backward);
}
