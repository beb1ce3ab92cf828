// Cross-entropy of bilinearly upsampled logits on the CPU (semantics: segops/reference/upsample_cross_entropy.py).
//
//   forward    z_k = bilinear(logits_k),  lse = log sum_k exp z_k
//              loss = (1 - e) w_y (lse - z_y) + e / K sum_k w_k (lse - z_k)
//   backward   dz_k = g (exp(z_k - lse) ((1 - e) w_y + e / K sum w) - (1 - e) w_y [k = y] - e / K w_k)
//              dlogits = bilinear^T(dz)
//
// Along a row the logits of the pixels between two columns are equally spaced, so their exponentials are a geometric
// sequence: two exponentials, then a product per pixel. A lane holds one interval between columns, and the pixels of
// an interval ("phases") follow one another in registers: interpolating needs neither gathers nor permutes. Backward
// sums what an interval gives to its four corners in registers, where the exponentials form a sequence from one
// output row to the next too. A source row is fetched once, as planes (z_k - max_k z_k) log2(e), whatever its strides
// and dtype. bilinear(max_k z) bounds every z, so nothing overflows; blocks with a column that spreads over more than
// 2^90 take the exponential of every pixel. Pixels and lanes are exchanged by interleaving, by gathers where
// intervals are uneven. Downwards a lane is a pixel with two columns of its own. Forward tasks are output rows,
// backward tasks source rows, which recompute the output rows that two tasks share: a source row is summed by one
// task in ascending order, however the work is split. Bound by the arithmetic of the exponentials and, with few
// classes, by the labels of the pixels. Tried: losses in the order of pixels (gathers took twice the time of the
// sums), sums of the four corners in planes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "cpu/bilinear.h"
#include "cpu/labels.h"
#include "cpu/tensors.h"
#include "schemas.h"

namespace segops {
namespace {

struct Problem {
  Strided logits, grad_logits, loss, lse, grad_loss;  // loss, lse, grad_loss: no c
  Labels labels;
  const void* class_weight = nullptr;
  DType dtype;
  int64_t n, classes;
  Line horizontal, vertical;
  bool per_pixel;
  double smoothing, all_weights;  // sum of the class weights
  double* sums = nullptr;         // [N * H][2]: loss and count of each output row
  FirstIndex* wrong = nullptr;
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/upsample_cross_entropy.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

// [N, H, W], or one value for all pixels.
Strided pixels(const Tensor& t) {
  Strided s;
  s.data = t.data_ptr();
  if (t.dim() == 3) s.n = t.stride(0), s.y = t.stride(1), s.x = t.stride(2);
  return s;
}

double sum_of(const Tensor& weights) {
  double sum = 0;
  const bool wide = dtype_of(weights) == DType::float64;
  for (int64_t k = 0; k < weights.size(0); ++k)
    sum += wide ? static_cast<const double*>(weights.data_ptr())[k] : static_cast<const float*>(weights.data_ptr())[k];
  return sum;
}

void put(const Tensor& t, double value) {
  if (dtype_of(t) == DType::float64) *static_cast<double*>(t.data_ptr()) = value;
  else *static_cast<float*>(t.data_ptr()) = static_cast<float>(value);
}

Problem problem(const Axis& horizontal, const Axis& vertical, const Tensor& logits, const Tensor& target,
                const std::optional<Tensor>& class_weight, const Tensor& lse, int64_t ignore_index, double smoothing) {
  Problem p{.logits = Strided(logits), .lse = pixels(lse), .labels = Labels(target, logits.size(1), ignore_index),
            .dtype = dtype_of(logits), .n = logits.size(0), .classes = logits.size(1), .horizontal = Line(horizontal),
            .vertical = Line(vertical), .smoothing = smoothing};
  p.class_weight = class_weight ? class_weight->data_ptr() : nullptr;
  p.all_weights = class_weight ? sum_of(*class_weight) : double(p.classes);
  return p;
}

void run(const Problem& p, bool backward) {
  std::atomic<bool> failed{false};
  const int64_t rows = p.n * (backward ? p.vertical.in : p.vertical.out);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    SEGOPS_ISA_CALL(run, p, backward, begin, end, scratch);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.upsample_cross_entropy: out of memory");
}

int64_t upsample_cross_entropy(const Tensor& loss, const Tensor& count, const Tensor& lse, const Tensor& logits,
                               const Tensor& target, const std::optional<Tensor>& class_weight, bool align_corners,
                               int64_t ignore_index, double label_smoothing) {
  const Axis horizontal(logits.size(3), target.size(2), align_corners);
  const Axis vertical(logits.size(2), target.size(1), align_corners);
  Problem p = problem(horizontal, vertical, logits, target, class_weight, lse, ignore_index, label_smoothing);
  p.loss = pixels(loss), p.per_pixel = loss.dim() == 3;
  std::vector<double> sums(2 * p.n * p.vertical.out);
  FirstIndex wrong;
  p.sums = sums.data(), p.wrong = &wrong;
  run(p, false);
  double loss_sum = 0, count_sum = 0;
  for (std::size_t i = 0; i < sums.size(); i += 2) loss_sum += sums[i], count_sum += sums[i + 1];
  if (!p.per_pixel) put(loss, loss_sum);
  put(count, count_sum);
  return wrong.get();
}

void upsample_cross_entropy_backward(const Tensor& grad_logits, const Tensor& grad_loss, const Tensor& logits,
                                     const Tensor& target, const std::optional<Tensor>& class_weight,
                                     const Tensor& lse, bool align_corners, int64_t ignore_index,
                                     double label_smoothing) {
  const Axis horizontal(logits.size(3), target.size(2), align_corners);
  const Axis vertical(logits.size(2), target.size(1), align_corners);
  Problem p = problem(horizontal, vertical, logits, target, class_weight, lse, ignore_index, label_smoothing);
  expect_writes(grad_logits);
  p.grad_logits = Strided(grad_logits), p.grad_loss = pixels(grad_loss), p.per_pixel = grad_loss.dim() == 3;
  run(p, true);
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, upsample_cross_entropy);
  SEGOPS_DEF(m, upsample_cross_entropy_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, upsample_cross_entropy, segops::upsample_cross_entropy);
  SEGOPS_IMPL(m, upsample_cross_entropy_backward, segops::upsample_cross_entropy_backward);
}
