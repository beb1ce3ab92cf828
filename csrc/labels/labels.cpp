// segops._labels: the one-hot windows of label maps, and what their principal components need.
//
// A window has r*r ones among n = (dy*r + dx)*K + k < r*r*K entries, but label maps are piecewise constant: its mixed
// difference e(y,x) = v(y,x) - v(y-1,x) - v(y,x-1) + v(y-1,x-1) is zero except at corners of regions. Windows are kept as
// these entries, each +1 or -1 ("corners"), about a twentieth of r*r on street scenes and at most 4*r*r. Sums over the
// pixels above and to the left lead back to v: X = E S with E the corners and S exact sums, so every product with X is
// one with E between running sums that numpy takes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int32_t NONE = -1;              // no one in the window's entries
constexpr int64_t PIECES = 16;            // of a sum over windows; fixed, so results do not depend on the threads
constexpr int64_t BLOCK_BYTES = 1 << 20;  // rows of the Gram matrix that one task owns

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class Task>
void parallel(int64_t tasks, int threads, const Task& task) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, tasks); ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}

void expect(bool right, const char* what) {
  if (!right) throw std::invalid_argument(what);
}

// A corner is its entry n shifted by one, and its sign in the lowest bit (1: minus).
inline uint32_t entry(uint32_t corner) { return corner >> 1; }
inline int sign(uint32_t corner) { return 1 - 2 * static_cast<int>(corner & 1); }

struct Map {
  std::vector<uint32_t> corners;  // window after window, in the order of pixels within a window
  std::vector<uint32_t> starts{0};

  int64_t size() const { return static_cast<int64_t>(starts.size()) - 1; }
  const uint32_t* begin(int64_t window) const { return corners.data() + starts[window]; }
  const uint32_t* end(int64_t window) const { return corners.data() + starts[window + 1]; }
};

class Windows {
 public:
  Windows(int64_t num_classes, int64_t scale_factor) : classes_(num_classes), r_(scale_factor) {
    expect(num_classes >= 1 && scale_factor >= 1 && num_classes <= (int64_t{1} << 30) / (scale_factor * scale_factor),
           "num_classes and scale_factor must be at least 1, and their windows have at most 2^30 entries");
  }

  int64_t entries() const { return r_ * r_ * classes_; }
  int64_t num_classes() const { return classes_; }
  int64_t size() const { return size_; }
  int64_t corners() const { return corners_; }

  void clear() {
    maps_.clear();
    size_ = corners_ = 0;
  }

  // Ignored pixels count as class `ignored_as`, or as none for NONE. Returns the flat index of the first label out of
  // range, -1 if there is none; a map with such a label is not added.
  template <class T>
  int64_t add(const Array<T>& labels, int64_t ignore_index, int32_t ignored_as, bool drop) {
    expect(labels.ndim() == 2, "a label map has two axes");
    expect(ignored_as >= NONE && ignored_as < classes_, "ignored_as must be a class or -1");
    const int64_t height = labels.shape(0), width = labels.shape(1);
    expect(height == 0 || width < (int64_t{1} << 30) / height, "a label map has fewer than 2^30 pixels");
    const T* data = labels.data();
    py::gil_scoped_release release;
    const int64_t columns = (width + r_ - 1) / r_, stride = columns * r_;
    std::vector<int32_t> strip(r_ * stride);
    std::vector<uint8_t> dropped(columns);
    Map map;
    for (int64_t top = 0; top < height; top += r_) {
      std::fill(strip.begin(), strip.end(), ignored_as);
      std::fill(dropped.begin(), dropped.end(), drop && (height - top < r_));
      if (drop && width < stride) dropped.back() = 1;
      for (int64_t y = 0; y < std::min(r_, height - top); ++y) {
        for (int64_t x = 0; x < width; ++x) {
          const int64_t at = (top + y) * width + x;
          const int64_t label = static_cast<int64_t>(data[at]);
          if (label == ignore_index) {
            if (drop) dropped[x / r_] = 1;
          } else if (label < 0 || label >= classes_) {
            return at;
          } else {
            strip[y * stride + x] = static_cast<int32_t>(label);
          }
        }
      }
      for (int64_t column = 0; column < columns; ++column)
        if (!dropped[column]) append(strip.data() + column * r_, stride, map);
    }
    map.corners.shrink_to_fit();
    size_ += map.size();
    corners_ += static_cast<int64_t>(map.corners.size());
    maps_.push_back(std::move(map));
    return -1;
  }

  // Sum of E's rows, [N].
  Array<int64_t> sum() const {
    Array<int64_t> out(entries());
    int64_t* total = out.mutable_data();
    std::fill(total, total + entries(), 0);
    for (const Map& map : maps_)
      for (uint32_t corner : map.corners) total[entry(corner)] += sign(corner);
    return out;
  }

  // gram += E^T E, [N, N], modulo 2^32: after the running sums its entries are counts again.
  void add_gram(Array<uint32_t>& gram, int threads) const {
    const int64_t n = entries();
    expect(gram.ndim() == 2 && gram.shape(0) == n && gram.shape(1) == n, "gram must be [N, N]");
    uint32_t* out = gram.mutable_data();
    py::gil_scoped_release release;
    // Whole pixels: within a window their corners are sorted. A block of rows stays in cache and has one owner.
    const int64_t rows = classes_ * std::max<int64_t>(1, BLOCK_BYTES / (4 * n * classes_));
    parallel((n + rows - 1) / rows, threads, [&](int64_t block) {
      const int64_t low = block * rows, high = low + rows;
      for (const Map& map : maps_) {
        for (int64_t w = 0; w < map.size(); ++w) {
          const uint32_t *first = map.begin(w), *last = map.end(w);
          const uint32_t* from = std::partition_point(first, last, [&](uint32_t c) { return entry(c) < low; });
          for (; from != last && entry(*from) < high; ++from) {
            uint32_t* row = out + entry(*from) * n;
            for (const uint32_t* to = first; to != last; ++to)
              row[entry(*to)] += static_cast<uint32_t>(1) - 2 * ((*from ^ *to) & 1);
          }
        }
      }
    });
  }

  // E^T (E table), both [N].
  Array<double> gram_product(const Array<double>& table, int threads) const {
    const int64_t n = entries();
    expect(table.ndim() == 1 && table.shape(0) == n, "table must be [N]");
    const double* in = table.data();
    Array<double> result(n);
    double* out = result.mutable_data();
    py::gil_scoped_release release;
    const int64_t maps = static_cast<int64_t>(maps_.size()), pieces = std::min(PIECES, maps);
    std::vector<double> partial(pieces * n);
    parallel(pieces, threads, [&](int64_t piece) {
      double* sums = partial.data() + piece * n;
      for (int64_t m = maps * piece / pieces; m < maps * (piece + 1) / pieces; ++m) {
        const Map& map = maps_[m];
        for (int64_t w = 0; w < map.size(); ++w) {
          double dot = 0;
          for (const uint32_t* c = map.begin(w); c != map.end(w); ++c) dot += sign(*c) * in[entry(*c)];
          for (const uint32_t* c = map.begin(w); c != map.end(w); ++c) sums[entry(*c)] += sign(*c) * dot;
        }
      }
    });
    parallel(PIECES, threads, [&](int64_t part) {
      for (int64_t i = n * part / PIECES; i < n * (part + 1) / PIECES; ++i) {
        double total = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) total += partial[piece * n + i];
        out[i] = total;
      }
    });
    return result;
  }

  // E table, [windows, C], for a table [N, C].
  Array<double> product(const Array<double>& table, int threads) const {
    expect(table.ndim() == 2 && table.shape(0) == entries(), "table must be [N, C]");
    const int64_t channels = table.shape(1);
    const double* in = table.data();
    Array<double> result({size_, channels});
    double* out = result.mutable_data();
    const std::vector<int64_t> offsets = first_windows();
    py::gil_scoped_release release;
    parallel(static_cast<int64_t>(maps_.size()), threads, [&](int64_t m) {
      const Map& map = maps_[m];
      for (int64_t w = 0; w < map.size(); ++w) {
        double* row = out + (offsets[m] + w) * channels;
        std::fill(row, row + channels, 0.0);
        for (const uint32_t* c = map.begin(w); c != map.end(w); ++c) {
          const double* from = in + entry(*c) * channels;
          const double s = sign(*c);
          for (int64_t i = 0; i < channels; ++i) row[i] += s * from[i];
        }
      }
    });
    return result;
  }

  // The windows themselves, [count, N] ones and zeros.
  Array<float> one_hot(const Array<int64_t>& indices, int threads) const {
    expect(indices.ndim() == 1, "indices must be [count]");
    const int64_t n = entries(), count = indices.shape(0), row = r_ * classes_;
    const int64_t* index = indices.data();
    for (int64_t i = 0; i < count; ++i) expect(0 <= index[i] && index[i] < size_, "indices must be in [0, windows)");
    Array<float> result({count, n});
    float* out = result.mutable_data();
    const std::vector<int64_t> offsets = first_windows();
    py::gil_scoped_release release;
    parallel(count, threads, [&](int64_t i) {
      const int64_t m = std::upper_bound(offsets.begin(), offsets.end(), index[i]) - offsets.begin() - 1;
      const int64_t w = index[i] - offsets[m];
      float* v = out + i * n;
      std::fill(v, v + n, 0.0f);
      for (const uint32_t* c = maps_[m].begin(w); c != maps_[m].end(w); ++c) v[entry(*c)] += sign(*c);
      for (int64_t y = 0; y < r_; ++y)
        for (int64_t j = classes_; j < row; ++j) v[y * row + j] += v[y * row + j - classes_];
      for (int64_t j = row; j < n; ++j) v[j] += v[j - row];
    });
    return result;
  }

 private:
  void append(const int32_t* labels, int64_t stride, Map& map) const {
    for (int64_t y = 0; y < r_; ++y) {
      for (int64_t x = 0; x < r_; ++x) {
        const int32_t here = labels[y * stride + x];
        const int32_t above = y ? labels[(y - 1) * stride + x] : NONE;
        const int32_t left = x ? labels[y * stride + x - 1] : NONE;
        const int32_t corner = y && x ? labels[(y - 1) * stride + x - 1] : NONE;
        if ((here == left && corner == above) || (here == above && corner == left)) continue;
        const int64_t pixel = (y * r_ + x) * classes_;
        auto emit = [&](int32_t k, uint32_t minus) {
          if (k != NONE) map.corners.push_back(static_cast<uint32_t>(pixel + k) << 1 | minus);
        };
        if (here == left || here == above) {
          emit(corner, 0);
          emit(here == left ? above : left, 1);
        } else if (corner == left || corner == above) {
          emit(here, 0);
          emit(corner == left ? above : left, 1);
        } else {
          emit(here, 0);
          emit(corner, 0);
          emit(above, 1);
          emit(left, 1);
        }
      }
    }
    map.starts.push_back(static_cast<uint32_t>(map.corners.size()));
  }

  std::vector<int64_t> first_windows() const {
    std::vector<int64_t> offsets;
    int64_t offset = 0;
    for (const Map& map : maps_) {
      offsets.push_back(offset);
      offset += map.size();
    }
    return offsets;
  }

  int64_t classes_, r_, size_ = 0, corners_ = 0;
  std::vector<Map> maps_;
};

}  // namespace

PYBIND11_MODULE(_labels, module) {
  py::class_<Windows>(module, "Windows")
      .def(py::init<int64_t, int64_t>(), py::arg("num_classes"), py::arg("scale_factor"))
      .def("__len__", &Windows::size)
      .def_property_readonly("num_classes", &Windows::num_classes)
      .def_property_readonly("entries", &Windows::entries)
      .def_property_readonly("corners", &Windows::corners)
      .def("clear", &Windows::clear)
      .def("add", &Windows::add<uint8_t>, py::arg("labels").noconvert(), py::arg("ignore_index"), py::arg("ignored_as"),
           py::arg("drop"))
      .def("add", &Windows::add<int64_t>, py::arg("labels").noconvert(), py::arg("ignore_index"), py::arg("ignored_as"),
           py::arg("drop"))
      .def("sum", &Windows::sum)
      .def("add_gram", &Windows::add_gram, py::arg("gram").noconvert(), py::arg("threads"))
      .def("gram_product", &Windows::gram_product, py::arg("table").noconvert(), py::arg("threads"))
      .def("product", &Windows::product, py::arg("table").noconvert(), py::arg("threads"))
      .def("one_hot", &Windows::one_hot, py::arg("indices").noconvert(), py::arg("threads"));
}
