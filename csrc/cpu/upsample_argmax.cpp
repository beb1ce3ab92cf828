// Argmax of bilinearly upsampled logits on the CPU (semantics: segops/reference/upsample_argmax.py).
//
//   one map    label = argmax_k bilinear(logits_k),  confidence = 1 / sum_k exp(z_k - max_k z)
//   several    label = argmax_k mean_m softmax_k(bilinear(logits_m)),  confidence = that mean
//
// One map: a lane holds one interval between columns and registers its pixels, as in upsample_cross_entropy: a
// multiply and add, a comparison and two selections per logit, which bound it; no exponential for labels alone.
// Several maps have intervals of their own, so blocks of pixels gather their columns and add up softmaxes. Logits are
// made finite as they are fetched (NaN as infinity), so that their differences are.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "cpu/bilinear.h"
#include "cpu/tensors.h"
#include "schemas.h"

namespace segops {
namespace {

struct Problem {
  Strided labels, confidence;  // no c
  const Strided* logits;       // [maps], and their axes
  const Line *horizontal, *vertical;
  int64_t maps, classes;
  DType dtype;
  bool narrow_labels, with_confidence;
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/upsample_argmax.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

Strided pixels(const Tensor& t) {
  Strided s;
  s.data = t.data_ptr();
  if (t.dim() == 3) s.n = t.stride(0), s.y = t.stride(1), s.x = t.stride(2);
  return s;
}

void upsample_argmax(const Tensor& labels, const Tensor& confidence, std::vector<Tensor> logits, bool align_corners) {
  std::vector<Axis> axes;
  std::vector<Strided> maps;
  for (const Tensor& z : logits) {
    axes.emplace_back(z.size(3), labels.size(2), align_corners);
    axes.emplace_back(z.size(2), labels.size(1), align_corners);
    maps.emplace_back(z);
  }
  std::vector<Line> horizontal, vertical;
  for (std::size_t i = 0; i < axes.size(); i += 2) horizontal.emplace_back(axes[i]), vertical.emplace_back(axes[i + 1]);
  const Problem p{pixels(labels), pixels(confidence), maps.data(), horizontal.data(), vertical.data(),
                  int64_t(maps.size()), logits[0].size(1), dtype_of(logits[0]),
                  labels.scalar_type() == torch::headeronly::ScalarType::Byte, confidence.dim() == 3};
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, labels.size(0) * labels.size(1), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    SEGOPS_ISA_CALL(run, p, begin, end, scratch);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.upsample_argmax: out of memory");
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) { SEGOPS_DEF(m, upsample_argmax); }
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) { SEGOPS_IMPL(m, upsample_argmax, segops::upsample_argmax); }
