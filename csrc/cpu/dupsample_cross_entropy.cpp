// Cross entropy of dupsample's logits, which are never stored (semantics: segops/reference/dupsample_cross_entropy.py).
//
//   forward    z = (W x + b) / T,  lse = log sum_k exp z_k
//              loss = (1 - e) w_y (lse - z_y) + e / K sum_k w_k (lse - z_k)
//   backward   dz_k = g (exp(z_k - lse) ((1 - e) w_y + e / K sum w) - (1 - e) w_y [k = y] - e / K w_k),  then as dupsample
//
// The plan is in dupsample.h. A block holds all classes of some sub-pixels: a tile's logits [sub-pixel][class][cell]
// become losses, or gradients in place, while they are in the first cache. Backward computes them again and divides by
// the sum of its own exponentials, so that the rounding of a large lse cancels. Bound by the multiplications (2 C per
// logit; backward thrice that) and one exponential per logit.
#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

#include "cpu/dupsample.h"
#include "cpu/labels.h"
#include "schemas.h"

namespace segops {
namespace {

struct CrossEntropy : Dupsample {
  using Dupsample::Dupsample;
  Labels labels;
  FirstIndex* wrong = nullptr;
  void *loss = nullptr, *lse = nullptr;  // loss: backward, its gradient
  int64_t loss_y = 0, loss_x = 0, lse_y = 0, lse_x = 0;
  const void* class_weight = nullptr;
  double label_smoothing = 0, sum_of_weights = 0;
  bool per_pixel = false;
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/dupsample_cross_entropy.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

template <typename A>
double sum(const Tensor& t) {
  double total = 0;
  for (int64_t i = 0; i < t.size(0); ++i) total += static_cast<const A*>(t.data_ptr())[i * t.stride(0)];
  return total;
}

CrossEntropy problem(const Tensor& x, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& temperature, const std::optional<Tensor>& class_weight,
                     const Tensor& loss, const Tensor& lse, int64_t scale_factor, int64_t ignore_index,
                     double label_smoothing) {
  CrossEntropy p(x, weight, bias, temperature, scale_factor, target.size(1), target.size(2));
  p.labels = Labels(target, p.classes, ignore_index);
  p.label_smoothing = label_smoothing, p.sum_of_weights = double(p.classes);
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->is_contiguous(), "segops.dupsample_cross_entropy: class_weight is not contiguous");
    p.class_weight = class_weight->data_ptr();
    p.sum_of_weights = p.dtype == DType::float64 ? sum<double>(*class_weight) : sum<float>(*class_weight);
  }
  p.loss = loss.data_ptr(), p.lse = lse.data_ptr(), p.per_pixel = loss.dim() == 3;
  p.lse_y = lse.stride(1), p.lse_x = lse.stride(2);
  p.add_map(target.stride(0), target.stride(1), target.stride(2));
  p.add_map(lse.stride(0), lse.stride(1), lse.stride(2));
  if (p.per_pixel) p.loss_y = loss.stride(1), p.loss_x = loss.stride(2);
  p.add_map(p.per_pixel ? loss.stride(0) : 0, p.loss_y, p.loss_x);
  p.add_map(p.height * p.width, p.width, 1);  // the flat index
  return p;
}

// Sum of the loss and of the weights of its pixels; backward, sum z dz.
std::pair<double, double> run(CrossEntropy& p, const char* op) {
  p.plan();
  std::vector<double> sums(2 * p.chunks.size() * p.pieces());
  run(p, op, [&](auto& shared, auto& chunk, int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(work, p, shared, chunk, begin, end, scratch, sums.data());
  });
  std::pair<double, double> total;
  for (std::size_t i = 0; i < sums.size(); i += 2) total.first += sums[i], total.second += sums[i + 1];
  return total;
}

int64_t dupsample_cross_entropy(const Tensor& loss, const Tensor& count, const Tensor& lse, const Tensor& x,
                                const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& temperature, const std::optional<Tensor>& class_weight,
                                int64_t scale_factor, int64_t ignore_index, double label_smoothing) {
  CrossEntropy p = problem(x, weight, target, bias, temperature, class_weight, loss, lse, scale_factor, ignore_index,
                           label_smoothing);
  FirstIndex wrong;
  p.wrong = &wrong;
  const auto [total, weights] = run(p, "dupsample_cross_entropy");
  if (!p.per_pixel) put(loss, total);
  put(count, weights);
  return wrong.get();
}

void dupsample_cross_entropy_backward(const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad_bias,
                                      const Tensor& grad_temperature, const Tensor& grad_loss, const Tensor& x,
                                      const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& temperature,
                                      const std::optional<Tensor>& class_weight, const Tensor& lse,
                                      int64_t scale_factor, int64_t ignore_index, double label_smoothing) {
  CrossEntropy p = problem(x, weight, target, bias, temperature, class_weight, grad_loss, lse, scale_factor,
                           ignore_index, label_smoothing);
  p.gradients(grad_x, grad_weight, grad_bias, grad_temperature);
  const auto [product, count] = run(p, "dupsample_cross_entropy_backward");
  if (p.grad_temperature) put(grad_temperature, -product / p.temperature);
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, dupsample_cross_entropy);
  SEGOPS_DEF(m, dupsample_cross_entropy_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, dupsample_cross_entropy, segops::dupsample_cross_entropy);
  SEGOPS_IMPL(m, dupsample_cross_entropy_backward, segops::dupsample_cross_entropy_backward);
}
