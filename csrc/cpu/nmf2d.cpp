// Non-negative matrix factorisation on the CPU (semantics: segops/reference/nmf2d.py).
//
//   C *= (X^T B) / (C (B^T B) + eps),   B *= (X C) / (B (C^T C) + eps),   out = B C^T
//
// A tile of pixels goes through a whole update while it lies in the cache: packed to [C][pixels] in the type of the sums,
// X^T B, the update of its coefficients, and its share of X C and C^T C, so that X is read once per iteration. Images are
// cut into pieces that do not depend on the number of threads; each piece sums its tiles in order, and the pieces are
// added in order. The rank is padded to whole vectors, where denominators are 1.
//
// Backward walks the updates in reverse. One unrolled iteration reads X once as well, and leaves dN of its coefficients
// and dM of its bases; the gradient of x, B_0 dN_0^T + dM_1 C_1^T + ..., is one pass over the tiles at the end.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "cpu/tensors.h"
#include "schemas.h"

namespace segops {
namespace {

constexpr int64_t tile_pixels = 96;  // a multiple of every vector and of the rows of every microkernel
constexpr int64_t base_rows = 64;    // of B, in one task

// Memory that is written before it is read.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(A) + 64) / 64 * 64))) {
    STD_TORCH_CHECK(data_, "segops.nmf2d: out of memory");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  operator A*() const { return data_; }

 private:
  A* data_;
};

template <typename A>
struct Matrices {  // of every image and, where there is a history, of every update; any strides
  A* data = nullptr;
  int64_t n = 0, t = 0, row = 0, column = 0;
  Matrices() = default;
  explicit Matrices(const torch::stable::Tensor& m) {
    const bool updates = m.dim() == 4;
    if (m.dim() < 3) return;
    data = static_cast<A*>(m.data_ptr()), n = m.stride(0), t = updates ? m.stride(1) : 0, row = m.stride(updates ? 2 : 1), column = m.stride(updates ? 3 : 2);
  }
  A* at(int64_t image, int64_t update) const { return data + image * n + update * t; }
};

template <typename A>
struct Problem {
  Strided x, y;  // y: out, or its gradient
  Strided grad_x;
  DType dtype;
  int64_t images, channels, height, width, pixels, rank;
  int64_t columns;        // the rank, padded
  int64_t tiles, pieces;  // of an image
  int64_t steps;
  bool one_step;
  A eps;
  Matrices<A> coefficients, history;

  // [images][channels][columns] of every update from 0 on, and B^T B or d(B^T B) + its transpose [images][columns]^2.
  A *bases, *gram;
  A *state;                       // [images][pixels][columns], coefficients or their gradient
  A *partial, *partial_gram;      // [images][pieces], what a piece adds to X C and to C^T C
  A *grad_bases, *grad_products;  // backward: dB [images][channels][columns], dM like bases, from update 1 on
  A *grad_numerators;             // backward: dN [images][steps + 1][pixels][columns]
  A *partial_grad_gram;           // backward: c^T dD
  A *fold;                        // backward: dK + dK^T [images][columns]^2

  A* bases_at(int64_t image, int64_t update) const { return bases + (update * images + image) * channels * columns; }
  A* grad_products_at(int64_t image, int64_t update) const {
    return grad_products + ((update - 1) * images + image) * channels * columns;
  }
  A* numerators_at(int64_t image, int64_t update) const {
    return grad_numerators + (image * (steps + 1) + update) * pixels * columns;
  }
  int64_t square() const { return columns * columns; }
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/nmf2d.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

template <typename A>
Problem<A> problem(const Tensor& x, const Tensor& bases, const Tensor& coefficients, const Tensor& history, int64_t steps,
                   bool one_step, double eps) {
  Problem<A> p{};
  p.x = Strided(x);
  p.dtype = dtype_of(x);
  p.images = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.pixels = p.height * p.width, p.rank = bases.size(2), p.columns = (p.rank + 15) / 16 * 16;
  p.tiles = (p.pixels + tile_pixels - 1) / tile_pixels;
  p.pieces = p.images ? 32 / p.images : 1;
  p.pieces = p.pieces > 16 ? 16 : p.pieces;
  p.pieces = p.pieces > p.tiles ? p.tiles : p.pieces;
  p.pieces = p.pieces < 1 ? 1 : p.pieces;
  p.steps = steps, p.one_step = one_step, p.eps = static_cast<A>(eps);
  p.coefficients = Matrices<A>(coefficients), p.history = Matrices<A>(history);
  return p;
}

template <typename Function>
void parallel(int64_t count, Function function) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

template <typename Function>
void over_pieces(int64_t images, int64_t pieces, int64_t scratch_bytes, Function function) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, images * pieces, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    char* memory = scratch.zeroed(scratch_bytes);
    for (int64_t i = begin; memory && i < end; ++i) function(i / pieces, i % pieces, memory);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.nmf2d: out of memory");
}

template <typename A>
int64_t scratch_bytes(const Problem<A>& p) {
  return (2 * p.channels + 8 * p.columns) * tile_pixels * int64_t(sizeof(A));
}

template <typename A>
void gram(const Problem<A>& p, const A* bases, A* out) {
  const int64_t blocks = p.columns / 16;
  parallel(p.images * blocks, [&](int64_t i) {
    SEGOPS_ISA_CALL(gram_rows, p, bases + i / blocks * p.channels * p.columns, out + i / blocks * p.square(),
                    i % blocks * 16);
  });
}

template <typename A>
void forward(const Tensor& out, const Tensor& coefficients, const Tensor& history, const Tensor& x, const Tensor& bases,
             int64_t steps, bool one_step, double eps) {
  Problem<A> p = problem<A>(x, bases, coefficients, history, steps, one_step, eps);
  expect_writes(out);
  p.y = Strided(out);
  const int64_t matrix = p.channels * p.columns, blocks = (p.channels + base_rows - 1) / base_rows;
  const Buffer<A> b(p.images * matrix), g(p.images * p.square()), state(p.images * p.pixels * p.columns),
      partial(p.images * p.pieces * matrix), partial_gram(p.images * p.pieces * p.square());
  p.bases = b, p.gram = g, p.state = state, p.partial = partial, p.partial_gram = partial_gram;
  const Matrices<A> given(bases);
  parallel(p.images, [&](int64_t i) { SEGOPS_ISA_CALL(take, given.at(i, 0), given.row, given.column, p.channels, p.rank,
                                                      p.columns, p.bases_at(i, 0)); });
  for (int64_t t = 0; t <= steps; ++t) {
    gram(p, p.bases, p.gram);
    over_pieces(p.images, p.pieces, scratch_bytes(p), [&](int64_t image, int64_t piece, char* memory) {
      SEGOPS_ISA_CALL(forward_piece, p, t, image, piece, memory);
    });
    if (t < steps) {
      parallel(p.images, [&](int64_t i) { SEGOPS_ISA_CALL(add_grams, p, p.partial_gram, i); });
      parallel(p.images * blocks, [&](int64_t i) { SEGOPS_ISA_CALL(update_bases, p, t, i / blocks, i % blocks); });
    }
  }
  if (one_step && history.numel())
    parallel(p.images, [&](int64_t i) { SEGOPS_ISA_CALL(keep_bases, p, i, int64_t(0)); });
}

template <typename A>
void backward(const Tensor& grad_x, const Tensor& grad_bases, const Tensor& grad_out, const Tensor& x,
              const Tensor& bases, const Tensor& coefficients, const Tensor& history, bool one_step, double eps) {
  const int64_t steps = one_step ? 0 : history.size(1);
  Problem<A> p = problem<A>(x, bases, coefficients, history, steps, one_step, eps);
  expect_writes(grad_x);
  p.y = Strided(grad_out), p.grad_x = Strided(grad_x);
  const bool for_bases = grad_bases.numel() != 0;
  const int64_t matrix = p.channels * p.columns, blocks = (p.channels + base_rows - 1) / base_rows;
  const Buffer<A> b((steps + 1) * p.images * matrix), g(p.images * p.square());
  p.bases = b, p.gram = g;
  const Matrices<A> given(bases);
  parallel(p.images * (steps + 1), [&](int64_t i) {
    const int64_t image = i % p.images, t = i / p.images;
    const bool from_history = one_step || t > 0;
    const Matrices<A>& from = from_history ? p.history : given;
    SEGOPS_ISA_CALL(take, from.at(image, from_history && !one_step ? t - 1 : 0), from.row, from.column, p.channels, p.rank,
                    p.columns, p.bases_at(image, t));
  });
  if (one_step) {
    gram(p, p.bases, p.gram);
    over_pieces(p.images, p.pieces, scratch_bytes(p), [&](int64_t image, int64_t piece, char* memory) {
      SEGOPS_ISA_CALL(one_step_piece, p, image, piece, memory);
    });
    return;
  }
  const Buffer<A> state(p.images * p.pixels * p.columns), partial(p.images * p.pieces * matrix),
      partial_gram(p.images * p.pieces * p.square()), partial_grad_gram(p.images * p.pieces * p.square()),
      carried(p.images * matrix), products(steps * p.images * matrix), fold(p.images * p.square()),
      numerators(p.images * (steps + 1) * p.pixels * p.columns);
  p.state = state, p.partial = partial, p.partial_gram = partial_gram, p.partial_grad_gram = partial_grad_gram;
  p.grad_bases = carried, p.grad_products = products, p.fold = fold, p.grad_numerators = numerators;
  for (int64_t t = steps; t >= 0; --t) {
    gram(p, p.bases_at(0, t), p.gram);
    over_pieces(p.images, p.pieces, scratch_bytes(p), [&](int64_t image, int64_t piece, char* memory) {
      SEGOPS_ISA_CALL(backward_piece, p, t, for_bases, image, piece, memory);
    });
    if (t == 0 && !for_bases) break;
    parallel(p.images, [&](int64_t i) {
      SEGOPS_ISA_CALL(add_grams, p, p.partial_gram, i);
      SEGOPS_ISA_CALL(add_grams, p, p.partial_grad_gram, i);
    });
    parallel(p.images * blocks, [&](int64_t i) {
      SEGOPS_ISA_CALL(update_grad_bases, p, t, i / blocks, i % blocks);
    });
    if (t == 0) break;
    parallel(p.images * p.columns / 16, [&](int64_t i) {
      SEGOPS_ISA_CALL(grad_gram_rows, p, t, i * 16 / p.columns, i * 16 % p.columns);
    });
    parallel(p.images, [&](int64_t i) { SEGOPS_ISA_CALL(fold_gram, p, i); });
  }
  over_pieces(p.images, p.pieces, scratch_bytes(p), [&](int64_t image, int64_t piece, char* memory) {
    SEGOPS_ISA_CALL(grad_x_piece, p, image, piece, memory);
  });
  const Matrices<A> wanted(grad_bases);
  if (for_bases)
    parallel(p.images, [&](int64_t i) { SEGOPS_ISA_CALL(give, p.grad_bases + i * matrix, p.columns, p.channels, p.rank,
                                                        wanted.at(i, 0), wanted.row, wanted.column); });
}

void nmf2d(const Tensor& out, const Tensor& coefficients, const Tensor& history, const Tensor& x, const Tensor& bases,
           int64_t steps, bool one_step, double eps) {
  if (!x.numel()) return;
  if (bases.scalar_type() == torch::headeronly::ScalarType::Double)
    forward<double>(out, coefficients, history, x, bases, steps, one_step, eps);
  else
    forward<float>(out, coefficients, history, x, bases, steps, one_step, eps);
}

void nmf2d_backward(const Tensor& grad_x, const Tensor& grad_bases, const Tensor& grad_out, const Tensor& x,
                    const Tensor& bases, const Tensor& coefficients, const Tensor& history, bool one_step, double eps) {
  if (!x.numel()) return;
  if (bases.scalar_type() == torch::headeronly::ScalarType::Double)
    backward<double>(grad_x, grad_bases, grad_out, x, bases, coefficients, history, one_step, eps);
  else
    backward<float>(grad_x, grad_bases, grad_out, x, bases, coefficients, history, one_step, eps);
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, nmf2d);
  SEGOPS_DEF(m, nmf2d_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, nmf2d, segops::nmf2d);
  SEGOPS_IMPL(m, nmf2d_backward, segops::nmf2d_backward);
}
