// The pixel losses of class-aware regularisation on the CPU (semantics: segops/reference/car_losses.py).
//
//   E_k = x . mu_k / sqrt(C), |mu_y|^2 / sqrt(C) at the own class,  B = softmax_k E,  v_k = [B_k > threshold, k != y]
//   forward    intra = sum |x - mu_y|,  e = sum_k v_k (B_k - threshold),  inner = sum_k v_k B_k
//   backward   dx = g sign(x - mu_y) + sum_{k != y} h B_k (v_k - inner) mu_k / sqrt(C) + dS_y
//
// A tile of pixels is packed to [C][pixels] in the type of the sums, so that the features are read once each way in any
// layout; its E [K][pixels] stays in the first cache, and backward computes it again. What the pixels' classes say of a
// channel is turned from rows of the tables in registers: a gather takes twice as long. Bound by the multiplications, 2 C
// per pixel and class; backward twice that. Sums of tiles are added in order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "cpu/labels.h"
#include "cpu/tensors.h"
#include "schemas.h"

namespace segops {
namespace {

constexpr int64_t tile_pixels = 64;
constexpr int64_t depth = 128;  // channels of a tile that stay in the first cache through a product

struct Problem {
  Strided x, grad_x;
  DType dtype;
  int64_t images, channels, height, width, pixels, tiles, classes;
  Labels labels;
  FirstIndex* wrong;
  const void *centers, *grad_sums;      // [classes][channels], of each image where the step is not 0
  int64_t centers_step, grad_sums_step;
  void *scaled, *own;                   // centers / sqrt(C) in rows of scaled_row, and |mu|^2 / sqrt(C), for each center
  int64_t scaled_row;
  void *lse, *inner;                    // [images][pixels]
  double threshold, grad_intra, grad_c2p;
  bool mask_ignored;

  int64_t groups() const { return centers_step ? images : 1; }
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/car_losses.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

const void* rows_of(const Tensor& t, const char* name, int64_t& step) {
  STD_TORCH_CHECK(t.is_contiguous(), "segops.car_losses: ", name, " is not contiguous");
  step = t.dim() == 3 ? t.size(1) * t.size(2) : 0;
  return t.data_ptr();
}

Problem problem(const Tensor& features, const Tensor& labels, const Tensor& centers, const Tensor& lse,
                const Tensor& inner, int64_t ignore_index, double threshold) {
  Problem p{};
  p.x = Strided(features);
  p.dtype = dtype_of(features);
  p.images = features.size(0), p.channels = features.size(1), p.height = features.size(2), p.width = features.size(3);
  p.pixels = p.height * p.width, p.tiles = (p.pixels + tile_pixels - 1) / tile_pixels;
  p.classes = centers.size(-2);
  p.labels = Labels(labels, p.classes, ignore_index);
  p.centers = rows_of(centers, "centers", p.centers_step);
  STD_TORCH_CHECK(lse.is_contiguous() && inner.is_contiguous(), "segops.car_losses: lse or inner is not contiguous");
  p.lse = lse.data_ptr(), p.inner = inner.data_ptr();
  p.threshold = threshold / double(p.classes - 1);
  p.scaled_row = (p.channels + 15) / 16 * 16 + 16;  // rows a page apart would share sets of the cache
  return p;
}

// Calls run(begin, end, scratch) for the tiles of all images, once the scaled centers are there.
template <typename Run>
void over_tiles(Problem& p, Run run) {
  const int64_t bytes = p.dtype == DType::float64 ? 8 : 4, rows = p.groups() * p.classes;
  std::vector<char> scaled(rows * p.scaled_row * bytes), own(rows * bytes);
  p.scaled = scaled.data(), p.own = own.data();
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) { SEGOPS_ISA_CALL(scale, p, begin, end); });
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, p.images * p.tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    run(begin, end, scratch);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.car_losses: out of memory");
}

void put(const Tensor& scalar, double value) {
  dtype_of(scalar) == DType::float64 ? (void)(*static_cast<double*>(scalar.data_ptr()) = value)
                                     : (void)(*static_cast<float*>(scalar.data_ptr()) = static_cast<float>(value));
}
double get(const Tensor& scalar) {
  return dtype_of(scalar) == DType::float64 ? *static_cast<const double*>(scalar.data_ptr())
                                            : double(*static_cast<const float*>(scalar.data_ptr()));
}

int64_t car_losses(const Tensor& intra, const Tensor& c2p, const Tensor& lse, const Tensor& inner,
                   const Tensor& features, const Tensor& labels, const Tensor& centers, int64_t ignore_index,
                   double c2p_threshold, bool mask_ignored_c2p) {
  Problem p = problem(features, labels, centers, lse, inner, ignore_index, c2p_threshold);
  FirstIndex wrong;
  p.wrong = &wrong, p.mask_ignored = mask_ignored_c2p;
  std::vector<double> sums(2 * p.images * p.tiles);
  over_tiles(p, [&](int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(losses, p, begin, end, scratch, sums.data());
  });
  double total[2] = {};
  for (std::size_t i = 0; i < sums.size(); ++i) total[i % 2] += sums[i];
  put(intra, total[0]), put(c2p, total[1]);
  return wrong.get();
}

void car_losses_backward(const Tensor& grad_features, const Tensor& grad_intra, const Tensor& grad_c2p,
                         const std::optional<Tensor>& grad_sums, const Tensor& features, const Tensor& labels,
                         const Tensor& centers, const Tensor& lse, const Tensor& inner, int64_t ignore_index,
                         double c2p_threshold) {
  Problem p = problem(features, labels, centers, lse, inner, ignore_index, c2p_threshold);
  expect_writes(grad_features);
  p.grad_x = Strided(grad_features);
  p.grad_intra = get(grad_intra), p.grad_c2p = get(grad_c2p);
  if (grad_sums) p.grad_sums = rows_of(*grad_sums, "grad_sums", p.grad_sums_step);
  over_tiles(p, [&](int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(gradients, p, begin, end, scratch);
  });
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, car_losses);
  SEGOPS_DEF(m, car_losses_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, car_losses, segops::car_losses);
  SEGOPS_IMPL(m, car_losses_backward, segops::car_losses_backward);
}
