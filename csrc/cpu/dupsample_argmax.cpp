// The winning class of dupsample's logits, which are never stored (semantics: segops/reference/dupsample_argmax.py).
//
//   labels = argmax_k (W x + b) / T, the lowest class of equal ones;  confidence = 1 / sum_k exp(z_k - max z)
//
// The plan is in dupsample.h. As dupsample_cross_entropy's forward, with a running maximum and its class, four vectors
// of cells at a time, in place of the exponentials. Bound by the multiplications (2 C per logit).
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dupsample.h"
#include "schemas.h"

namespace segops {
namespace {

struct Argmax : Dupsample {
  using Dupsample::Dupsample;
  void *labels = nullptr, *confidence = nullptr;
  int64_t labels_y = 0, labels_x = 0, confidence_y = 0, confidence_x = 0;
  bool bytes = true;  // labels are uint8, else int64
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/dupsample_argmax.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

void dupsample_argmax(const Tensor& labels, const Tensor& confidence, const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature,
                      int64_t scale_factor) {
  Argmax p(x, weight, bias, temperature, scale_factor, labels.size(1), labels.size(2));
  p.labels = labels.data_ptr(), p.labels_y = labels.stride(1), p.labels_x = labels.stride(2);
  p.bytes = labels.scalar_type() == torch::headeronly::ScalarType::Byte;
  p.add_map(labels.stride(0), p.labels_y, p.labels_x);
  if (confidence.dim() == 3) {
    p.confidence = confidence.data_ptr();
    p.confidence_y = confidence.stride(1), p.confidence_x = confidence.stride(2);
    p.add_map(confidence.stride(0), p.confidence_y, p.confidence_x);
  }
  p.plan();
  run(p, "dupsample_argmax", [&](auto& shared, auto& chunk, int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(work, p, shared, chunk, begin, end, scratch);
  });
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) { SEGOPS_DEF(m, dupsample_argmax); }
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) { SEGOPS_IMPL(m, dupsample_argmax, segops::dupsample_argmax); }
