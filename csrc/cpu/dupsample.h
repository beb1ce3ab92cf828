// What the dupsample kernels share outside the instruction sets: the problem, its split into pieces, the running order.
//
// The low-resolution pixels ("cells") of all images stand in one row. Cells of the last row and column of a map whose
// size is no multiple of r have fewer sub-pixels: each such region is a problem of its own, so that no kernel masks.
// A region is worked on a chunk of cells at a time; a chunk's pieces are (range of sub-pixels, range of cells). Every
// piece owns its rows of the weight gradient over all its chunks, and a share of grad_x that is added up afterwards in
// the order of the pieces. The split depends on the problem alone, so results do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/tensors.h"

namespace segops {

constexpr int64_t tile_cells = 64;  // cells that the kernels work on at a time

// What a step of one image, row and column adds to an offset: of the small map, or of the full one.
struct Map {
  int64_t n = 0, y = 0, x = 0;
};

struct Region {
  int64_t top, bottom, left, right;  // cells
  int64_t rows, columns;             // sub-pixels of each that are not cropped
  int64_t cells(int64_t images) const { return images * (bottom - top) * (right - left); }
};

struct Chunk {
  const Region* region;
  int64_t first, cells, index;
  int64_t tiles() const { return (cells + tile_cells - 1) / tile_cells; }
};

struct Dupsample {
  static constexpr int max_maps = 4;
  DType dtype;
  int64_t images, channels, classes, scale, h, w, height, width;
  Strided x, grad_x;
  const void *weight, *bias = nullptr;
  int64_t weight_row, weight_channel, bias_row = 0;
  void *grad_weight = nullptr, *grad_bias = nullptr;
  int64_t grad_weight_row = 0, grad_weight_channel = 0, grad_bias_row = 0;
  double temperature = 1;
  bool backward = false, grad_temperature = false;
  Map maps[max_maps];  // full-resolution maps of the op
  int map_count = 0;

  std::vector<Region> regions;
  std::vector<Chunk> chunks;
  int64_t block_pixels, block_classes;  // a block: the sub-pixels, and of those the classes, that are computed together
  int64_t pixel_blocks, class_blocks, block_pieces, cell_pieces, chunk_cells;

  int64_t rows() const { return scale * scale * classes; }
  int64_t blocks() const { return pixel_blocks * class_blocks; }
  int64_t pieces() const { return block_pieces * cell_pieces; }
  int64_t padded_channels() const { return (channels + 31) / 32 * 32; }

  Dupsample(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
            const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& temperature,
            int64_t scale, int64_t height, int64_t width)
      : dtype(dtype_of(x)), images(x.size(0)), channels(x.size(1)), classes(weight.size(0) / (scale * scale)),
        scale(scale), h(x.size(2)), w(x.size(3)), height(height), width(width), x(x), weight(weight.data_ptr()),
        weight_row(weight.stride(0)), weight_channel(weight.stride(1)) {
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "segops.dupsample: weight has not the dtype of x");
    if (bias) {
      STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "segops.dupsample: bias has not the dtype of x");
      this->bias = bias->data_ptr(), bias_row = bias->stride(0);
    }
    if (temperature)
      this->temperature = dtype == DType::float64 ? *static_cast<const double*>(temperature->data_ptr())
                                                  : *static_cast<const float*>(temperature->data_ptr());
  }

  void gradients(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                 const torch::stable::Tensor& bias, const torch::stable::Tensor& temperature) {
    backward = true, grad_temperature = temperature.numel() > 0;
    expect_writes(x);
    grad_x = Strided(x);
    grad_weight = weight.data_ptr(), grad_weight_row = weight.stride(0), grad_weight_channel = weight.stride(1);
    if (bias.numel()) grad_bias = bias.data_ptr(), grad_bias_row = bias.stride(0);
  }

  void add_map(int64_t n, int64_t y, int64_t x) { maps[map_count++] = {n, y, x}; }
  int64_t size_of_sum() const { return dtype == DType::float64 ? 8 : 4; }
  bool sums_in_place() const {  // the weight gradient itself can take the sums
    return (dtype == DType::float32 || dtype == DType::float64) && cell_pieces == 1 && grad_weight_channel == 1;
  }

  // whole_rows: a block holds whole rows of sub-pixels, of some classes; otherwise all classes of some sub-pixels.
  void plan(bool whole_rows = false) {
    const int64_t pixels = scale * scale, one = channels * size_of_sum(), mib = 1024 * 1024;
    // About a hundred rows at a time keep the micro-kernels busy and a tile of logits in the first cache.
    block_pixels = whole_rows ? scale * std::clamp<int64_t>(96 / (scale * classes), 1, scale)
                              : std::clamp<int64_t>(96 / classes, 1, pixels);
    block_classes = whole_rows ? std::clamp<int64_t>(112 / block_pixels, 1, classes) : classes;
    pixel_blocks = (pixels + block_pixels - 1) / block_pixels;
    class_blocks = (classes + block_classes - 1) / block_classes;
    const int64_t most = backward ? std::clamp<int64_t>(8 * mib / (256 * one), 4, 32) : 64;
    block_pieces = std::min(blocks(), most);
    const int64_t room = backward || block_pieces < 16 ? 4 * mib / (backward ? block_pieces : 1) : mib / 2;
    const int64_t tiles = std::max<int64_t>(room / one / tile_cells, 4);
    const int64_t whole = (split_into_regions() + tile_cells - 1) / tile_cells;
    chunk_cells = std::min(tiles, whole) * tile_cells;
    cell_pieces = std::min(most / block_pieces, chunk_cells / tile_cells / 4);
    if (backward) cell_pieces = std::min(cell_pieces, 4 * mib / (rows() * one));
    cell_pieces = std::max<int64_t>(cell_pieces, 1);
    for (const Region& region : regions)
      for (int64_t first = 0, all = region.cells(images); first < all; first += chunk_cells)
        chunks.push_back({&region, first, std::min(chunk_cells, all - first), int64_t(chunks.size())});
  }

 private:
  int64_t split_into_regions() {  // returns the cells of the largest
    const int64_t rows = height - scale * (h - 1), columns = width - scale * (w - 1);  // of the last row, column
    const int64_t inner_h = rows < scale ? h - 1 : h, inner_w = columns < scale ? w - 1 : w;
    int64_t most = 0;
    const auto add = [&](Region region) {
      const int64_t cells = region.cells(images);
      if (cells > 0) regions.push_back(region);
      most = std::max(most, cells);
    };
    add({0, inner_h, 0, inner_w, scale, scale});
    add({0, inner_h, inner_w, w, scale, columns});
    add({inner_h, h, 0, inner_w, rows, scale});
    add({inner_h, h, inner_w, w, rows, columns});
    return most;
  }
};

// Memory that all workers share: a chunk's input by tiles, [channel][cell] and, backward, [cell][channel]; each piece's
// share of grad_x; sums of the weight and bias gradients.
struct Shared {
  void *x = nullptr, *x_by_cell = nullptr, *grad_x = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;
  int64_t *x_offset = nullptr, *grad_offset = nullptr, *offset = nullptr;  // of each cell; [map][cell] for the maps
  bool good = true;

  explicit Shared(const Dupsample& p) {
    const int64_t one = p.size_of_sum(), cells = p.chunk_cells;
    x = take(p.channels * cells * one);
    offset = static_cast<int64_t*>(take(cells * p.map_count * 8));
    x_offset = static_cast<int64_t*>(take(cells * 8));
    if (!p.backward) return;
    grad_offset = static_cast<int64_t*>(take(cells * 8));
    x_by_cell = take(p.padded_channels() * cells * one);
    grad_x = take(p.block_pieces * p.channels * cells * one);
    grad_weight = p.sums_in_place() ? p.grad_weight : take(p.cell_pieces * p.rows() * p.channels * one);
    grad_bias = take(p.cell_pieces * p.rows() * one);
  }

 private:
  void* take(int64_t bytes) {
    const std::size_t size = static_cast<std::size_t>((bytes + 127) / 64 * 64);
    owned_.emplace_back(std::aligned_alloc(64, size));
    good = good && owned_.back();
    return owned_.back().get();
  }
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::vector<std::unique_ptr<void, Free>> owned_;
};

// An op's share of the work: pieces begin .. end-1 of a chunk. A worker that gets no memory says so through `scratch`.
using Work = std::function<void(const Shared&, const Chunk&, int64_t begin, int64_t end, Scratch& scratch)>;

// Runs all chunks and stores the gradients of x, weight and bias.
void run(const Dupsample& p, const char* op, const Work& work);

// Writes `value` into a tensor of one element of the type sums run in.
inline void put(const torch::stable::Tensor& t, double value) {
  if (t.scalar_type() == torch::headeronly::ScalarType::Double)
    *static_cast<double*>(t.data_ptr()) = value;
  else
    *static_cast<float*>(t.data_ptr()) = float(value);
}

}  // namespace segops
