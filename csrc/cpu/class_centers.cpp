// Sums of features by class on the CPU (semantics: segops/reference/class_centers.py).
//
//   S_k = sum of x_p over the pixels p of class k,   backward  dx_p = dS_{y_p}
//
// Bound by one read of the features. A square of pixels and channels is turned in registers, so that each pixel is one
// vector added to its class's row of a table that stays in the first cache; channels go in blocks, for that and for the
// threads. In channels_last there is nothing to turn, and a block is as wide as its table fits the second cache. A table
// is emptied into its total now and then: less error in long sums. Each piece of the pixels has a total of its own, and
// pieces, which do not depend on the number of threads, are added in order. Matrix products with one-hot rows would be
// 2 K flops per feature.
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
constexpr int64_t stretch = 4096;  // pixels of an image that are summed before a table is emptied

struct Problem {
  Strided x;  // backward: its gradient
  DType dtype;
  int64_t images, channels, height, width, pixels, classes;
  bool per_image;
  Labels labels;
  FirstIndex* wrong;
  std::vector<int32_t> label;  // [images][pixels], `classes` where it does not count

  int64_t stretches, groups, columns, blocks, pieces;  // columns: channels in a block
  void *sums, *partial;                                // partial [pieces][groups][classes][channels]

  int64_t group_images() const { return per_image ? 1 : images; }
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/class_centers.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

Problem problem(const Tensor& x, const Tensor& sums, const Tensor& labels, int64_t ignore_index) {
  Problem p{};
  p.x = Strided(x);
  p.dtype = dtype_of(x);
  p.images = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.pixels = p.height * p.width;
  p.per_image = sums.dim() == 3;
  p.groups = p.per_image ? p.images : 1;
  p.classes = sums.size(-2);
  p.labels = Labels(labels, p.classes, ignore_index);
  STD_TORCH_CHECK(sums.is_contiguous(), "segops.class_centers: the sums are not contiguous");
  p.sums = sums.data_ptr();
  return p;
}

template <typename Function>
void parallel(int64_t count, const Function& function) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    function(begin, end, scratch);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.class_centers: out of memory");
}

int64_t class_centers(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels,
                      int64_t ignore_index) {
  Problem p = problem(features, sums, labels, ignore_index);
  FirstIndex wrong;
  p.wrong = &wrong;
  p.stretches = (p.pixels + stretch - 1) / stretch;
  SEGOPS_ISA_CALL(plan, p);
  p.label.resize(p.images * p.pixels);
  parallel(p.images, [&](int64_t begin, int64_t end, Scratch&) { SEGOPS_ISA_CALL(read_labels, p, begin, end); });
  int64_t* count = static_cast<int64_t*>(counts.data_ptr());
  std::vector<int64_t> numbers(p.groups * (p.classes + 1));
  for (int64_t i = 0; i < p.images * p.pixels; ++i)
    ++numbers[(p.per_image ? i / p.pixels : 0) * (p.classes + 1) + p.label[i]];
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t k = 0; k < p.classes; ++k) count[g * p.classes + k] = numbers[g * (p.classes + 1) + k];

  const int64_t table = p.groups * p.classes * p.channels, bytes = p.dtype == DType::float64 ? 8 : 4;
  std::vector<char> partial(p.pieces > 1 ? p.pieces * table * bytes : 0);
  p.partial = p.pieces > 1 ? partial.data() : p.sums;
  parallel(p.groups * p.blocks * p.pieces, [&](int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(sum, p, begin, end, scratch);
  });
  if (p.pieces > 1) SEGOPS_ISA_CALL(add_pieces, p, table);
  return wrong.get();
}

void class_centers_backward(const Tensor& grad_features, const Tensor& grad_sums, const Tensor& labels,
                            int64_t ignore_index) {
  expect_writes(grad_features);
  Problem p = problem(grad_features, grad_sums, labels, ignore_index);
  const int64_t tiles = (p.pixels + tile_pixels - 1) / tile_pixels;
  parallel(p.images * tiles, [&](int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(spread, p, tiles, begin, end, scratch);
  });
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, class_centers);
  SEGOPS_DEF(m, class_centers_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, class_centers, segops::class_centers);
  SEGOPS_IMPL(m, class_centers_backward, segops::class_centers_backward);
}
