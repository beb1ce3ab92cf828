// Counts of (target, prediction) pairs on the CPU (semantics: segops/reference/confusion_matrix.py).
//
//   counts[t][p] = number of pixels with target t and prediction p, where t is counted
//
// Each piece of the maps counts into tables of its own, which are added up at the end. Label maps are smooth: 16 equal
// pairs in a row are one addition; other pixels go one by one, round robin into four tables where they are small, since
// an increment waits for the last one of the same counter. The pieces are few where the tables are large.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "cpu/labels.h"
#include "schemas.h"

namespace segops {
namespace {

struct Problem {
  Labels target, prediction;
  int64_t images, classes, ways;
  int64_t stretches, stretch;  // of a row, and the pixels in one
  FirstIndex* wrong;
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/confusion_matrix.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

int64_t confusion_matrix(const Tensor& counts, const Tensor& prediction, const Tensor& target, int64_t ignore_index) {
  const int64_t classes = counts.size(0), table = classes * classes + 1;
  FirstIndex wrong;
  Problem p{Labels(target, classes, ignore_index), Labels(prediction, classes, -1), target.size(0), classes,
            classes <= 32 ? 4 : 1, 0, 16384, &wrong};
  p.stretches = (p.target.width + p.stretch - 1) / p.stretch;
  const int64_t total = p.images * p.target.height * p.stretches, room = (16 << 20) / (8 * table * p.ways);
  int64_t pieces = torch::stable::get_num_threads();
  pieces = pieces > room ? room : pieces;
  pieces = pieces > total ? total : pieces;
  pieces = pieces < 1 ? 1 : pieces;
  std::vector<int64_t> tables(pieces * p.ways * table);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      SEGOPS_ISA_CALL(run, p, i * total / pieces, (i + 1) * total / pieces, tables.data() + i * p.ways * table);
  });
  for (int64_t t = 0; t < classes; ++t)
    for (int64_t k = 0; k < classes; ++k) {
      int64_t sum = 0;
      for (int64_t i = 0; i < pieces * p.ways; ++i) sum += tables[i * table + t * classes + k];
      static_cast<int64_t*>(counts.data_ptr())[t * counts.stride(0) + k * counts.stride(1)] = sum;
    }
  return wrong.get();
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) { SEGOPS_DEF(m, confusion_matrix); }
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) { SEGOPS_IMPL(m, confusion_matrix, segops::confusion_matrix); }
