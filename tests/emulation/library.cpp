// The namespace segops_emulated: the ops of segops_C, how they are scheduled, and kernels that do one thing wrong each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "common/launch.h"
#include "common/scalar.h"
#include "schemas.h"

namespace segops {

namespace schemas {
// order: 0 forward, 1 reverse, 2 shuffled by `seed`.
inline constexpr std::string_view schedule = "(int order, int seed, bool reverse_blocks) -> ()";
// Takes out the __syncthreads() of a line of the kernels' source; 0 none.
inline constexpr std::string_view drop_barrier = "(int line) -> ()";
// From now on launches are noted instead of run; what the i-th was: blocks, threads or bytes of shared memory.
inline constexpr std::string_view dry_run = "(bool on) -> ()";
inline constexpr std::string_view launched = "(int i, int what) -> int";
inline constexpr std::string_view probe_limits = "(Tensor on, int[] grid, int[] block, int shared) -> ()";
inline constexpr std::string_view probe_alignment = "(Tensor x, int offset) -> ()";
inline constexpr std::string_view probe_barrier = "(Tensor on, bool skipped) -> ()";
inline constexpr std::string_view probe_shared = "(Tensor(a!) seen) -> ()";
inline constexpr std::string_view probe_overrun = "(Tensor on, int shared) -> ()";
}  // namespace schemas

namespace {

using torch::stable::Tensor;

void schedule(int64_t order, int64_t seed, bool reverse_blocks) {
  emulator::schedule.threads = static_cast<emulator::Order>(order);
  emulator::schedule.seed = static_cast<unsigned>(seed);
  emulator::schedule.reverse_blocks = reverse_blocks;
}

void drop_barrier(int64_t line) { emulator::schedule.dropped_barrier = static_cast<int>(line); }

void dry_run(bool on) {
  emulator::schedule.dry = on;
  emulator::launched.clear();
}

int64_t launched(int64_t i, int64_t what) {
  const auto& l = emulator::launched.at(static_cast<std::size_t>(i));
  return static_cast<int64_t>(what == 0 ? l.blocks : what == 1 ? l.threads : l.shared);
}

__global__ void empty_kernel() {}

void probe_limits(const Tensor& on, std::vector<int64_t> grid, std::vector<int64_t> block, int64_t shared) {
  const auto dim = [](const std::vector<int64_t>& v) { return dim3(unsigned(v[0]), unsigned(v[1]), unsigned(v[2])); };
  launch(empty_kernel, dim(grid), dim(block), static_cast<std::size_t>(shared), on);
}

__global__ void load_kernel(const float* x) { (void)load_vector(x); }

void probe_alignment(const Tensor& x, int64_t offset) {
  launch(load_kernel, 1, 32, 0, x, static_cast<const float*>(x.data_ptr()) + offset);
}

__global__ void barrier_kernel(bool skipped) {
  if (!skipped || threadIdx.x != 7) __syncthreads();
}

void probe_barrier(const Tensor& on, bool skipped) { launch(barrier_kernel, 1, 64, 0, on, skipped); }

// Every thread reads its float of shared memory, then leaves a number there for the next block to find.
__global__ void shared_kernel(float* seen) {
  float* place = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
  seen[blockIdx.x * blockDim.x + threadIdx.x] = *place;
  *place = 1.0f;
}

void probe_shared(const Tensor& seen) {
  launch(shared_kernel, static_cast<unsigned>(seen.size(0)), 32, 32 * sizeof(float), seen,
         static_cast<float*>(seen.data_ptr()));
}

__global__ void overrun_kernel(int64_t shared) { shared_memory()[shared + threadIdx.x] = 0; }

void probe_overrun(const Tensor& on, int64_t shared) {
  launch(overrun_kernel, 1, 32, static_cast<std::size_t>(shared), on, shared);
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY(segops_emulated, m) {
  SEGOPS_DEF(m, local_attention);
  SEGOPS_DEF(m, local_attention_backward);
  SEGOPS_DEF(m, multi_scale_strip_conv);
  SEGOPS_DEF(m, multi_scale_strip_conv_backward);
  SEGOPS_DEF(m, class_centers);
  SEGOPS_DEF(m, class_centers_backward);
  SEGOPS_DEF(m, schedule);
  SEGOPS_DEF(m, drop_barrier);
  SEGOPS_DEF(m, dry_run);
  SEGOPS_DEF(m, launched);
  SEGOPS_DEF(m, probe_limits);
  SEGOPS_DEF(m, probe_alignment);
  SEGOPS_DEF(m, probe_barrier);
  SEGOPS_DEF(m, probe_shared);
  SEGOPS_DEF(m, probe_overrun);
}
STABLE_TORCH_LIBRARY_IMPL(segops_emulated, CompositeExplicitAutograd, m) {
  SEGOPS_IMPL(m, schedule, segops::schedule);
  SEGOPS_IMPL(m, drop_barrier, segops::drop_barrier);
  SEGOPS_IMPL(m, dry_run, segops::dry_run);
  SEGOPS_IMPL(m, launched, segops::launched);
}
STABLE_TORCH_LIBRARY_IMPL(segops_emulated, CPU, m) {
  SEGOPS_IMPL(m, probe_limits, segops::probe_limits);
  SEGOPS_IMPL(m, probe_alignment, segops::probe_alignment);
  SEGOPS_IMPL(m, probe_barrier, segops::probe_barrier);
  SEGOPS_IMPL(m, probe_shared, segops::probe_shared);
  SEGOPS_IMPL(m, probe_overrun, segops::probe_overrun);
}
