// What the kernels need of a tensor, and the memory they work in. Nothing here throws inside a worker.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace segops {

enum class DType { float32, float64, bfloat16, float16 };

inline DType dtype_of(const torch::stable::Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::float32;
    case torch::headeronly::ScalarType::Double: return DType::float64;
    case torch::headeronly::ScalarType::BFloat16: return DType::bfloat16;
    case torch::headeronly::ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "segops: unsupported dtype"); return DType::float32;
  }
}

// An NCHW tensor of any strides, in elements.
struct Strided {
  void* data = nullptr;
  int64_t n = 0, c = 0, y = 0, x = 0;
  Strided() = default;
  explicit Strided(const torch::stable::Tensor& t)
      : data(t.data_ptr()), n(t.stride(0)), c(t.stride(1)), y(t.stride(2)), x(t.stride(3)) {}
};

// Fresh large outputs are written page by page for the first time: in 2 MiB pages that costs a tenth of the faults.
inline void advise_huge_pages(const torch::stable::Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(t.data_ptr());
  const auto first = (begin + 4095) & ~std::uintptr_t(4095);
  const auto last = (begin + static_cast<std::uintptr_t>(t.numel()) * t.element_size()) & ~std::uintptr_t(4095);
  if (last > first + 2 * page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

// One worker's memory. A worker that gets none raises the flag and returns: an exception inside parallel_for would lose
// its message.
class Scratch {
 public:
  explicit Scratch(std::atomic<bool>& failed) : failed_(failed) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  char* zeroed(int64_t bytes) {
    data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<std::size_t>(bytes)));
    data_ ? (void)std::memset(data_, 0, static_cast<std::size_t>(bytes)) : failed_.store(true);
    return data_;
  }

 private:
  std::atomic<bool>& failed_;
  char* data_ = nullptr;
};

}  // namespace segops
