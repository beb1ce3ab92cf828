// Label maps of any integer dtype and strides, read as classes.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>

namespace segops {

// The lowest of the indices that workers report, whatever their order; -1 for none.
class FirstIndex {
 public:
  void report(int64_t index) {
    int64_t seen = lowest_.load(std::memory_order_relaxed);
    while (index < seen && !lowest_.compare_exchange_weak(seen, index, std::memory_order_relaxed)) {}
  }
  int64_t get() const {
    const int64_t lowest = lowest_.load();
    return lowest == INT64_MAX ? -1 : lowest;
  }

 private:
  std::atomic<int64_t> lowest_{INT64_MAX};
};

struct Labels {
  enum class Kind { uint8, int16, int32, int64 };
  const void* data = nullptr;
  int64_t n = 0, y = 0, x = 0;  // strides, in elements
  int64_t height = 0, width = 0, classes = 0, ignore_index = 0;
  Kind kind = Kind::int64;

  Labels() = default;
  Labels(const torch::stable::Tensor& t, int64_t classes, int64_t ignore_index)
      : data(t.data_ptr()), n(t.stride(0)), y(t.stride(1)), x(t.stride(2)), height(t.size(1)), width(t.size(2)),
        classes(classes), ignore_index(ignore_index) {
    switch (t.scalar_type()) {
      case torch::headeronly::ScalarType::Byte: kind = Kind::uint8; break;
      case torch::headeronly::ScalarType::Short: kind = Kind::int16; break;
      case torch::headeronly::ScalarType::Int: kind = Kind::int32; break;
      case torch::headeronly::ScalarType::Long: kind = Kind::int64; break;
      default: STD_TORCH_CHECK(false, "segops: labels must be uint8, int16, int32 or int64");
    }
  }

  // out[i] = the class of pixel (image, row, first + i * step), -1 where it does not count; labels that are neither a
  // class nor ignore_index are reported to `wrong` (may be null) by their flat index. Inlined, so that a kernel's
  // instruction set vectorises it.
  [[gnu::always_inline]] void read(int64_t image, int64_t row, int64_t first, int64_t step, int64_t count, int32_t* out,
                                   FirstIndex* wrong) const {
    switch (kind) {
      case Kind::uint8: return read_as<uint8_t>(image, row, first, step, count, out, wrong);
      case Kind::int16: return read_as<int16_t>(image, row, first, step, count, out, wrong);
      case Kind::int32: return read_as<int32_t>(image, row, first, step, count, out, wrong);
      case Kind::int64: return read_as<int64_t>(image, row, first, step, count, out, wrong);
    }
  }

 private:
  template <typename T>
  [[gnu::always_inline]] void read_as(int64_t image, int64_t row, int64_t first, int64_t step, int64_t count,
                                      int32_t* out, FirstIndex* wrong) const {
    const T* in = static_cast<const T*>(data) + image * n + row * y + first * x;
    const int64_t stride = step * x;
    const bool bad = stride == 1 ? scan(in, 1, count, out) : scan(in, stride, count, out);
    if (!bad || !wrong) return;
    for (int64_t i = 0; i < count; ++i)
      if (out[i] < 0 && int64_t(in[i * stride]) != ignore_index) {
        wrong->report((image * height + row) * width + first + i * step);
        break;
      }
  }

  // Whether a label is wrong.
  template <typename T>
  [[gnu::always_inline]] bool scan(const T* in, int64_t stride, int64_t count, int32_t* out) const {
    int32_t bad = 0;
    const uint64_t end = uint64_t(classes);
    const int64_t ignored = ignore_index;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t label = in[i * stride];
      const bool ignore = label == ignored, outside = uint64_t(label) >= end;
      out[i] = ignore || outside ? -1 : int32_t(label);
      bad |= outside && !ignore;
    }
    return bad != 0;
  }
};

}  // namespace segops
