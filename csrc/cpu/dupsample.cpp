// dupsample on the CPU (semantics: segops/reference/dupsample.py).
//
//   forward    out[k, r i + dy, r j + dx] = z_n(i, j),  z = (W x + b) / T,  n = (dy r + dx) K + k
//   backward   dx = W^T dz / T,  dW = dz x^T / T,  db = sum dz / T,  dT = -sum z dz / T
//
// The plan is in dupsample.h, the micro-kernels in dupsample_tiles.body.h: tiles of 64 cells, logits [row][cell] that
// stay in the first cache, rows by two vectors of sums in registers. A block holds whole rows of sub-pixels, so that
// the output is written line after line. Bound by the multiplications (2 C per output element; backward thrice that)
// and by the bytes of the output. Tried: blocks of single sub-pixels, which touch every line of the output r times.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dupsample.h"
#include "schemas.h"

namespace segops {
namespace {

struct Upsampled : Dupsample {
  using Dupsample::Dupsample;
  Strided full;  // the output, or its gradient
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/dupsample.body.h"
#include "cpu/for_each_isa.h"

namespace segops {

void run(const Dupsample& p, const char* op, const Work& work) {
  const Shared shared(p);
  std::atomic<bool> failed{!shared.good};
  if (p.backward && shared.good)
    torch::stable::parallel_for(0, p.rows(), 256, [&](int64_t begin, int64_t end) {
      SEGOPS_ISA_CALL(zero_sums, p, shared, begin, end);
    });
  for (const Chunk& chunk : p.chunks) {
    if (failed.load()) break;
    torch::stable::parallel_for(0, chunk.tiles(), 1, [&](int64_t begin, int64_t end) {
      SEGOPS_ISA_CALL(pack, p, shared, chunk, begin, end);
    });
    torch::stable::parallel_for(0, p.pieces(), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(failed);
      work(shared, chunk, begin, end, scratch);
    });
    if (p.backward)
      torch::stable::parallel_for(0, chunk.tiles(), 1, [&](int64_t begin, int64_t end) {
        SEGOPS_ISA_CALL(add_pieces, p, shared, chunk, begin, end);
      });
  }
  STD_TORCH_CHECK(!failed.load(), "segops.", op, ": out of memory");
  if (p.backward)
    torch::stable::parallel_for(0, p.rows(), 256, [&](int64_t begin, int64_t end) {
      SEGOPS_ISA_CALL(finish, p, shared, begin, end);
    });
}

namespace {

using torch::stable::Tensor;

Upsampled problem(const Tensor& full, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& temperature, int64_t scale_factor) {
  Upsampled p(x, weight, bias, temperature, scale_factor, full.size(2), full.size(3));
  p.full = Strided(full);
  p.add_map(p.full.n, p.full.y, p.full.x);
  return p;
}

double run(Upsampled& p, const char* op) {
  p.plan(p.full.x == 1 && p.full.c != 1);
  std::vector<double> products(p.chunks.size() * p.pieces());
  run(p, op, [&](auto& shared, auto& chunk, int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(work, p, shared, chunk, begin, end, scratch, products.data());
  });
  double total = 0;
  for (double product : products) total += product;
  return total;
}

void dupsample(const Tensor& out, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& temperature, int64_t scale_factor) {
  expect_writes(out);
  Upsampled p = problem(out, x, weight, bias, temperature, scale_factor);
  run(p, "dupsample");
}

void dupsample_backward(const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad_bias,
                        const Tensor& grad_temperature, const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature,
                        int64_t scale_factor) {
  Upsampled p = problem(grad_out, x, weight, bias, temperature, scale_factor);
  p.gradients(grad_x, grad_weight, grad_bias, grad_temperature);
  const double product = run(p, "dupsample_backward");
  if (p.grad_temperature) put(grad_temperature, -product / p.temperature);
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, dupsample);
  SEGOPS_DEF(m, dupsample_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, dupsample, segops::dupsample);
  SEGOPS_IMPL(m, dupsample_backward, segops::dupsample_backward);
}
