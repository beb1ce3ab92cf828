// Multi-scale strip convolution on the CPU (semantics: segops/reference/multi_scale_strip_conv.py).
//
//   forward    a = K * x + b,  h_i = w_i * a + b_i,  out = a + sum_i (v_i * h_i + b'_i)     w_i: 1 x k, v_i: k x 1
//   backward   u_i = v_i^T * g,  da = g + sum_i w_i^T * u_i,  dx = K^T * da
//              dv_i = <h_i, g>,  dw_i = <a, u_i>,  dK = <x, da>,  db' = sum g,  db_i = sum u_i,  db = sum da
//
// A task runs down the rows of a vector of channels of one image. A row of x is read once, whatever its strides and
// dtype, and becomes a row of pixels that are vectors of channels, between zeros; so do a, h_i (backward: g, u_i, da),
// in rings of as many rows as a strip sees, which stay in a core's cache. Every convolution, along W and along H, is
// one kernel: eight outputs and seven taps in registers, an input loaded once for all products that it takes part in.
// Backward needs no rows beyond the tile for a and h_i: gradients of taps are sums over the same inputs as those of
// maps, and are made beside them. The inner kernels run at two thirds of the peak of multiply-adds. With channels last
// every pixel is a cache line of its own, and pages are left after a few: tasks of an image run together, and lines are
// asked for one by one between products. Also tried: asking for a whole row at once (more than a core can wait for), and
// blocks of channels in the outer loop (a third slower with channels last).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/tensors.h"
#include "schemas.h"

namespace segops {
namespace {

struct Matrix {
  void* data = nullptr;
  int64_t row = 0, column = 0;
  Matrix() = default;
  explicit Matrix(const torch::stable::Tensor& t) : data(t.data_ptr()), row(t.stride(0)), column(t.stride(1)) {}
};

struct Problem {
  Strided x, out, grad_out, grad_x, scaled, scale;
  Matrix taps_of, biases_of, grad_taps, grad_biases;  // [C, ...]
  DType dtype;
  int64_t n, c, h, w, kh, kw, pairs;
  const int64_t* lengths;
  bool backward = false;
  int64_t pieces = 1;         // of the rows of a map
  double* partial = nullptr;  // [tasks][sums of taps and biases]
  void* tables = nullptr;     // [blocks][taps and biases]

  int64_t all_lengths() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < pairs; ++i) sum += lengths[i];
    return sum;
  }
  int64_t longest() const {
    int64_t found = 1;
    for (int64_t i = 0; i < pairs; ++i) found = lengths[i] > found ? lengths[i] : found;
    return found;
  }
  int64_t taps() const { return kh * kw + 2 * all_lengths(); }
  int64_t entries() const { return taps() + 1 + 2 * pairs; }
};

struct Plan {
  int64_t blocks, tasks, entries, table_bytes;  // blocks of channels; of each: tasks, their sums, its taps
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/multi_scale_strip_conv.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

Problem problem(const Tensor& x, const Tensor& taps, const Tensor& biases, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& strip_lengths) {
  Problem p;
  p.x = Strided(x), p.taps_of = Matrix(taps), p.biases_of = Matrix(biases);
  p.dtype = dtype_of(x);
  p.n = x.size(0), p.c = x.size(1), p.h = x.size(2), p.w = x.size(3);
  p.kh = kernel_size[0], p.kw = kernel_size[1];
  p.pairs = static_cast<int64_t>(strip_lengths.size()), p.lengths = strip_lengths.data();
  return p;
}

Plan plan(const Problem& p) { return SEGOPS_ISA_CALL(planned, p); }

struct Free {
  void operator()(void* data) const { std::free(data); }
};

void run(Problem& p, const char* op) {
  const Plan planned = plan(p);
  const std::size_t bytes = static_cast<std::size_t>((planned.blocks * planned.table_bytes + 63) / 64 * 64);
  const std::unique_ptr<void, Free> tables(std::aligned_alloc(64, bytes));
  p.tables = tables.get();
  std::atomic<bool> failed{p.tables == nullptr};
  if (p.tables)
    torch::stable::parallel_for(0, planned.blocks, 8, [&](int64_t begin, int64_t end) {
      SEGOPS_ISA_CALL(tabulate, p, begin, end);
    });
  torch::stable::parallel_for(0, failed ? 0 : planned.blocks * planned.tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    SEGOPS_ISA_CALL(run, p, begin, end, scratch);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.", op, ": out of memory");
}

void multi_scale_strip_conv(const Tensor& out, const Tensor& x, const Tensor& taps, const Tensor& biases,
                            std::vector<int64_t> kernel_size, std::vector<int64_t> strip_lengths) {
  Problem p = problem(x, taps, biases, kernel_size, strip_lengths);
  expect_writes(out);
  p.out = Strided(out);
  // Rows are split only where there is too little to share; a piece computes what its strips reach outside it once more.
  const Plan whole = plan(p);
  const int64_t threads = torch::stable::get_num_threads(), tasks = whole.blocks * whole.tasks;
  const int64_t longest = p.longest();
  double best = 0;
  for (int64_t pieces = 1; pieces == 1 || (pieces <= p.h / longest && pieces <= threads); ++pieces) {
    const double rows = double(p.h) / double(pieces) + (pieces > 1 ? double(longest) : 0);
    const double time = double((tasks * pieces + threads - 1) / threads) * rows;
    if (pieces == 1 || time < best) best = time, p.pieces = pieces;
  }
  run(p, "multi_scale_strip_conv");
}

void multi_scale_strip_conv_backward(const Tensor& grad_x, const Tensor& grad_taps, const Tensor& grad_biases,
                                     const Tensor& grad_out, const Tensor& x, const Tensor& taps, const Tensor& biases,
                                     const std::optional<Tensor>& scaled, const std::optional<Tensor>& scale,
                                     std::vector<int64_t> kernel_size, std::vector<int64_t> strip_lengths) {
  Problem p = problem(x, taps, biases, kernel_size, strip_lengths);
  expect_writes(grad_x);
  p.grad_out = Strided(grad_out), p.grad_x = Strided(grad_x);
  p.grad_taps = Matrix(grad_taps), p.grad_biases = Matrix(grad_biases);
  if (scaled) p.scaled = Strided(*scaled), p.scale = Strided(*scale);
  p.backward = true;
  // Sums of taps are sums over pieces: their number depends on the shape only.
  const Plan whole = plan(p);
  const int64_t tasks = whole.blocks * whole.tasks, most = p.h / (2 * p.longest());
  p.pieces = tasks == 0 || tasks >= 8 ? 1 : (8 + tasks - 1) / tasks;
  if (p.pieces > most) p.pieces = most > 1 ? most : 1;
  const Plan split = plan(p);
  std::vector<double> partial(static_cast<std::size_t>(split.blocks * split.tasks * split.entries));
  p.partial = partial.data();
  run(p, "multi_scale_strip_conv_backward");
  torch::stable::parallel_for(0, split.blocks, 1, [&](int64_t begin, int64_t end) {
    SEGOPS_ISA_CALL(sum_up, p, begin, end);
  });
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, multi_scale_strip_conv);
  SEGOPS_DEF(m, multi_scale_strip_conv_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, multi_scale_strip_conv, segops::multi_scale_strip_conv);
  SEGOPS_IMPL(m, multi_scale_strip_conv_backward, segops::multi_scale_strip_conv_backward);
}
