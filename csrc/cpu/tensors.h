// What the kernels need of a tensor, and the memory they work in. Nothing here throws inside a worker.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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
