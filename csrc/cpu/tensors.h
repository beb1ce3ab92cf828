// What the kernels need of a tensor, and the memory they work in. Nothing here throws inside a worker.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Says that all of a dense tensor is about to be written. glibc maps blocks of over 32 MiB anew on every call, and the
// first touch of a page takes longer than writing it: huge pages, where the system leaves the choice to us, are touched
// 512 at a time. A hint; it may be refused.
inline void expect_writes(const torch::stable::Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096, fresh = 32 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), bytes = t.numel() * t.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (bytes >= fresh) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
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
    const std::size_t size = static_cast<std::size_t>((bytes + 63) / 64 * 64);
    data_ = static_cast<char*>(std::aligned_alloc(64, size));
    data_ ? (void)std::memset(data_, 0, size) : failed_.store(true);
    return data_;
  }

 private:
  std::atomic<bool>& failed_;
  char* data_ = nullptr;
};

}  // namespace segops
