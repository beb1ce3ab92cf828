// How a kernel is launched, and its words for shared memory. Compiled by nvcc this is CUDA; compiled by g++ the words
// of CUDA (threadIdx, __syncthreads, __shfl_xor_sync, ...) come from tests/emulation/emulator.h, which runs the same
// kernels on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define SEGOPS_UNROLL _Pragma("unroll")
#define SEGOPS_UNROLL_2 _Pragma("unroll 2")
#else
#include "emulator.h"
#define SEGOPS_UNROLL _Pragma("GCC unroll 16")
#define SEGOPS_UNROLL_2
#endif

namespace segops {

// What every architecture from 8.0 on grants; shared memory is the least of them (8.6 and 8.9 give a block 99 KiB).
inline constexpr unsigned max_threads = 1024, max_grid_x = 0x7fffffff, max_grid_yz = 65535;
inline constexpr std::size_t max_shared = 99 << 10, max_shared_unasked = 48 << 10;

inline void check_launch(const dim3& grid, const dim3& block, std::size_t shared) {
  STD_TORCH_CHECK(grid.x <= max_grid_x && grid.y <= max_grid_yz && grid.z <= max_grid_yz,
                  "segops: grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks");
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  STD_TORCH_CHECK(threads >= 1 && threads <= max_threads && threads % 32 == 0,
                  "segops: a block has ", threads, " threads, not whole warps up to ", max_threads);
  STD_TORCH_CHECK(shared <= max_shared, "segops: ", shared, " bytes of shared memory per block exceed ", max_shared);
}

// Launches on the current stream of the device that holds `on`. An empty grid is no launch.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, const torch::stable::Tensor& on,
            const std::type_identity_t<Parameters>&... parameters) {
  check_launch(grid, block, shared);
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return;
#ifdef __CUDACC__
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared > max_shared_unasked)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, grid, block, arguments, shared, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "segops: kernel launch: ", cudaGetErrorString(error));
#else
  (void)on;
  emulator::run(grid, block, shared, [&] { kernel(parameters...); });
#endif
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) char segops_shared[];
  return segops_shared;
#else
  return emulator::shared_memory();
#endif
}

}  // namespace segops
