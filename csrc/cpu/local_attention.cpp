// Dilated local attention on the CPU (semantics: segops/reference/local_attention.py).
//
//   forward    S(p, n) = scale <q(p), k(p + off_n)>,  A = softmax_n S,  out(p) = sum_n A(p, n) v(p + off_n)
//   backward   dS(p, n) = A(p, n) (<g(p), v(p + off_n)> - delta(p)),   delta(p) = <g(p), out(p)> - g_lse(p)
//              dq(p) = scale sum_n dS(p, n) k(p + off_n)
//              dk(u) = scale sum_n dS(u - off_n, n) q(u - off_n),   dv(u) = sum_n A(u - off_n, n) g(u - off_n)
//
// Rows y, y + dilation, y + 2 dilation, ... of one head are a dense problem that shares nothing with the others: the
// unit of work is a stretch of one such phase. A row is converted and padded once, into a planar [channel][pixel] ring
// of the rows the window needs, which absorbs dtype, strides and all three border rules; the inner loops then see only
// float (or double) rows with the pixels in vectors, five taps by four vectors of sums in registers. They are bound by
// unaligned loads (one per multiply-add) and by the latency of fetching each row. Backward gathers: a key row sums over
// the query rows that see it in ascending order, so the result does not depend on how the work is split. Also tried:
// pairs of query rows sharing each load of a key (no faster: the loads saved return as work per pair), fetching ahead a
// few lines at a time between passes (slower), huge pages for the outputs (faster once warm, three times slower cold).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "cpu/tensors.h"
#include "schemas.h"

namespace segops {
namespace {

enum class Border { zero, mask, shift };

struct Problem {
  Strided query, key, value, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value;
  DType dtype;
  int64_t n, heads, d, dv, h, w, kernel_h, kernel_w, dilation_h, dilation_w;
  double scale;
  Border border;
  int64_t phases, pieces;  // tasks per head: phases * pieces
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/local_attention.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

Problem problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& dilation, int64_t num_heads,
                double scale, int64_t border) {
  Problem p;
  p.query = Strided(query), p.key = Strided(key), p.value = Strided(value), p.out = Strided(out), p.lse = Strided(lse);
  p.dtype = dtype_of(query);
  p.n = query.size(0), p.heads = num_heads, p.h = query.size(2), p.w = query.size(3);
  p.d = query.size(1) / num_heads, p.dv = value.size(1) / num_heads;
  p.kernel_h = kernel_size[0], p.kernel_w = kernel_size[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.scale = scale, p.border = static_cast<Border>(border);
  p.phases = p.dilation_h < p.h ? p.dilation_h : p.h;
  // Enough tasks to share among the threads; a piece is at least two windows long, since its neighbours' rows are read
  // (backward: computed) once more.
  const int64_t tasks = p.n * p.heads * p.phases, wanted = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t longest = p.h / p.phases / (2 * p.kernel_h);
  p.pieces = tasks >= wanted || tasks == 0 ? 1 : (wanted + tasks - 1) / tasks;
  if (p.pieces > longest) p.pieces = longest > 1 ? longest : 1;
  return p;
}

void run(const Problem& p, bool backward) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, p.n * p.heads * p.phases * p.pieces, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    SEGOPS_ISA_CALL(run, p, backward, begin, end, scratch);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.local_attention: out of memory");
}

void local_attention(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key, const Tensor& value,
                     std::vector<int64_t> kernel_size, std::vector<int64_t> dilation, int64_t num_heads, double scale,
                     int64_t border) {
  expect_writes(out);
  run(problem(query, key, value, out, lse, kernel_size, dilation, num_heads, scale, border), false);
}

void local_attention_backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                              const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                              const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                              std::vector<int64_t> kernel_size, std::vector<int64_t> dilation, int64_t num_heads,
                              double scale, int64_t border) {
  Problem p = problem(query, key, value, out, lse, kernel_size, dilation, num_heads, scale, border);
  for (const Tensor* gradient : {&grad_query, &grad_key, &grad_value}) expect_writes(*gradient);
  p.grad_out = Strided(grad_out);
  if (grad_lse) p.grad_lse = Strided(*grad_lse);
  p.grad_query = Strided(grad_query), p.grad_key = Strided(grad_key), p.grad_value = Strided(grad_value);
  run(p, true);
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, local_attention);
  SEGOPS_DEF(m, local_attention_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, local_attention, segops::local_attention);
  SEGOPS_IMPL(m, local_attention_backward, segops::local_attention_backward);
}
