// Axial attention on the CPU (semantics: segops/reference/axial_attention.py).
//
//   forward    S(p, j) = scale <q(p), k(j)>,  A = exp(S - lse),  out(p) = sum_j A(p, j) v(j),  j on p's line
//   backward   dS(p, j) = A(p, j) (<g(p), v(j)> - delta(p)),   delta(p) = sum_j A(p, j) <g(p), v(j)>
//              dq(p) = scale sum_j dS(p, j) k(j),   dk(j) = scale sum_p dS(p, j) q(p),   dv(j) = sum_p A(p, j) g(p)
//
// One pass per axis; a line and a head are a dense problem of their own. Its maps are read where they lie, whatever the
// strides and the dtype: the scalars of a product may have any order, and its vectors are of channels where those are
// innermost, so that these operands stay in place; the others are copied in the order they have, or turned where they
// are narrow. Scores stand as [key][32 queries]: the softmax runs down the rows without a reduction across lanes and
// feeds the next product as it is. Every product keeps up to 14 x 2 vectors of sums in registers and writes them to
// their place. Bound by the products, once memory keeps up: what comes next is asked of it between blocks of sums, and
// heads (channels innermost) or lines (elsewhere) that share pages or cache lines are taken together, a column of an
// NCHW map with up to 31 others. Panels of scalars, copies between the blocks and a whole line's scores were slower.
// Values whose packed line is larger than a core's own cache go in chunks, with the scores of a round of queries kept
// between them: memory is linear in a line's length.
//
// Composed, the second axis replaces the first one's result line by line; backward walks the axes in reverse, and
// grad_value holds the gradient of that result between them. Joint, the column's pass leaves a result and a
// log-sum-exp, and the row's pass merges its own in. Long lines are cut into pieces, few enough to be independent of
// the threads; what pieces add to dk and dv is added up in order at the end.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <string_view>

#include "cpu/tensors.h"
#include "schemas.h"

namespace segops {
namespace {

// A map seen along one axis: strides of images, channels, lines, and pixels of a line.
struct Map {
  void* data = nullptr;
  int64_t n = 0, c = 0, line = 0, pixel = 0;
  Map() = default;
  Map(const Strided& s, bool vertical)
      : data(s.data), n(s.n), c(s.c), line(vertical ? s.x : s.y), pixel(vertical ? s.y : s.x) {}
  bool innermost() const { return c == 1 && pixel != 1; }  // channels lie together
  // Lines lie side by side: one of them is a column of cache lines.
  bool interleaved() const { return pixel != 1 && c != 1 && line == 1; }
};

struct Pass {
  Map query, key, value, out, lse, grad_out, grad_query, grad_key, grad_value, delta;
  DType dtype;
  int64_t n, heads, d, dv, lines, length;
  double scale;
  bool skip_itself;   // joint, the column: the pixel itself is in its row
  bool merge, add;    // forward: into what out holds, by both log-sum-exps; or added to it. Backward: add to dq and dk
  bool add_value;     // backward: dv too
  bool delta_of_out, delta_given;  // joint, backward: delta is of both axes; the first pass takes it from out

  int64_t groups;      // of lines, packed together
  int64_t head_group;  // heads of a line, too
  int64_t chunk;       // channels of the values at a time
  int64_t pieces;      // of a line's queries
  int64_t round;       // queries whose scores are held at a time
  void* partial;       // backward, unless one round holds a line: what every piece adds to dk and dv

  int64_t group() const { return (lines + groups - 1) / groups; }  // lines of the largest
  int64_t first_line(int64_t of) const { return of * lines / groups; }
  int64_t piece_length() const { return ((length + pieces - 1) / pieces + 31) / 32 * 32; }
  bool whole() const { return pieces == 1 && round >= length; }
};

}  // namespace
}  // namespace segops

#define SEGOPS_BODY "cpu/axial_attention.body.h"
#include "cpu/for_each_isa.h"

namespace segops {
namespace {

using torch::stable::Tensor;

constexpr int64_t cache = 3 << 19;     // bytes that packed lines may take: a core's own cache
constexpr int64_t room = 7 << 20;      // the same of lines that share pages, which cost more to find than to read
constexpr int64_t part = 24;           // forward: and the part of all maps that they may take
constexpr int64_t together = 1 << 20;  // the same of heads or lines that lie together
constexpr int64_t held = 8 << 20;      // bytes that the scores of a round may take

int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// From shapes, strides and dtype alone.
void plan(Pass& p, bool backward, std::initializer_list<Map> maps) {
  const int64_t size = larger(bytes_of(p.dtype), 4), passes = backward ? 2 : 1;
  bool interleaved = false;
  for (const Map& map : maps) interleaved |= map.interleaved();
  const auto bytes = [&](int64_t chunk) {  // of a packed line
    const bool chunks = chunk < p.dv;
    const int64_t channels = backward ? 6 * (p.d + chunk) : chunks ? 2 * larger(p.d, chunk) : 2 * p.d + 3 * chunk;
    return p.length * size * channels + (chunks ? smaller(p.length * p.length * size * passes, held / 8) : 0);
  };
  p.chunk = p.dv;
  while (p.chunk > 128 && bytes(p.chunk) * (interleaved ? 16 : 1) > cache)
    p.chunk = p.chunk > 256 ? p.chunk / 2 / 16 * 16 : 64;
  const bool chunks = p.chunk < p.dv;
  const int64_t line = bytes(p.chunk);
  const int64_t all = p.n * p.heads * p.lines * p.length * 2 * (p.d + p.dv) * bytes_of(p.dtype);
  // Equal groups, of which a few threads get as much work each.
  p.groups = p.lines, p.head_group = 1;
  const int64_t several = 8 / larger(p.n * p.heads, 1);
  const auto groups = [&](int64_t most) { return smaller(larger((p.lines + most - 1) / most, several), p.lines); };
  if (interleaved) {
    const int64_t space = backward ? room : smaller(room, all / part);
    p.groups = smaller(groups(larger(4, smaller(32, space / line))), (p.lines + 3) / 4);
  } else if (!chunks && p.value.innermost()) {
    while (p.head_group < p.heads && p.heads % (2 * p.head_group) == 0 && 2 * p.head_group * line <= together &&
           p.n * p.heads * p.lines >= 16 * p.head_group)
      p.head_group *= 2;
  } else if (!chunks) {
    p.groups = groups(larger(1, smaller(4, together / line)));
  }
  const int64_t tasks = larger(p.n * p.heads / p.head_group * p.groups, 1);
  p.pieces = p.length < 512 ? 1 : larger(1, smaller((backward ? 4 : 8) / tasks, p.length / 256));
  const int64_t tiles = held / (p.group() * p.length * 32 * size * passes);
  p.round = chunks ? smaller(larger(tiles, 1) * 32, p.piece_length()) : p.piece_length();
}

// Memory for the time of a call.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(bytes ? std::calloc(1, static_cast<std::size_t>(bytes)) : nullptr) {
    STD_TORCH_CHECK(data_ || !bytes, "segops.axial_attention: out of memory");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void* data() const { return data_; }

 private:
  void* data_;
};

template <typename Function>
void parallel(int64_t count, Function function) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(failed);
    function(begin, end, scratch);
  });
  STD_TORCH_CHECK(!failed.load(), "segops.axial_attention: out of memory");
}

void run_forward(const Pass& p) {
  parallel(p.n * (p.heads / p.head_group) * p.groups * p.pieces, [&](int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(forward, p, begin, end, scratch);
  });
}

void run_backward(Pass p) {
  const int64_t size = larger(bytes_of(p.dtype), 4);
  const int64_t sums = SEGOPS_ISA_CALL(partial_size, p);
  const Buffer partial(p.whole() ? 0 : p.n * p.heads * p.lines * p.pieces * sums * size);
  p.partial = partial.data();
  parallel(p.n * (p.heads / p.head_group) * p.groups * p.pieces, [&](int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(backward, p, begin, end, scratch);
  });
  if (p.whole()) return;
  p.groups = p.lines, p.head_group = 1;
  parallel(p.n * p.heads * p.lines, [&](int64_t begin, int64_t end, Scratch& scratch) {
    SEGOPS_ISA_CALL(add_pieces, p, begin, end, scratch);
  });
}

Strided softmax_of(const Tensor& lse, int64_t which) {
  Strided s;
  s.data = static_cast<char*>(lse.data_ptr()) + which * lse.stride(2) * (dtype_of(lse) == DType::float64 ? 8 : 4);
  s.n = lse.stride(0), s.c = lse.stride(1), s.y = lse.stride(3), s.x = lse.stride(4);
  return s;
}

Pass pass(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_heads, double scale, bool vertical) {
  Pass p{};
  p.dtype = dtype_of(query);
  p.n = query.size(0), p.heads = num_heads, p.d = query.size(1) / num_heads, p.dv = value.size(1) / num_heads;
  p.lines = query.size(vertical ? 3 : 2), p.length = query.size(vertical ? 2 : 3);
  p.scale = scale;
  p.query = Map(Strided(query), vertical), p.key = Map(Strided(key), vertical);
  p.value = Map(Strided(value), vertical);
  return p;
}

// axes: 0 height, 1 width, 2 height then width, 3 width then height. combine: 0 compose, 1 sum, 2 joint.
struct Axes {
  int count;
  bool vertical[2];
  explicit Axes(int64_t axes) : count(axes < 2 ? 1 : 2), vertical{axes % 2 == 0, axes == 3} {}
};

void axial_attention(const Tensor& out, const Tensor& first, const Tensor& lse, const Tensor& query, const Tensor& key,
                     const Tensor& value, int64_t num_heads, double scale, int64_t combine, int64_t axes) {
  if (!out.numel()) return;
  for (const Tensor* written : {&out, &first}) expect_writes(*written);
  const Axes order(axes);
  Pass passes[2];
  for (int i = 0; i < order.count; ++i) {
    Pass& p = passes[i] = pass(query, key, value, num_heads, scale, order.vertical[i]);
    p.out = Map(Strided(out), order.vertical[i]);
    p.lse = Map(softmax_of(lse, combine == 2 ? 0 : i), order.vertical[i]);
    p.skip_itself = combine == 2 && i == 0;
    p.add = combine == 1 && i == 1, p.merge = combine == 2 && i == 1;
  }
  // The first result: kept; or in the place of the output, where a line is replaced at once; or for the time between.
  const bool composed = order.count == 2 && combine == 0;
  Strided between = first.numel() ? Strided(first) : Strided(out);
  if (composed) passes[0].out = Map(between, order.vertical[0]), passes[1].value = Map(between, order.vertical[1]);
  for (int i = 0; i < order.count; ++i)
    plan(passes[i], false, {passes[i].query, passes[i].key, passes[i].value, passes[i].out});
  const bool apart = composed && !first.numel() && !passes[1].whole();
  const Buffer kept(apart ? out.numel() * bytes_of(passes[0].dtype) : 0);
  if (apart) {
    between.data = kept.data();
    between.x = 1, between.y = out.size(3), between.c = between.y * out.size(2), between.n = between.c * out.size(1);
    passes[0].out = Map(between, order.vertical[0]), passes[1].value = Map(between, order.vertical[1]);
    for (int i = 0; i < 2; ++i)
      plan(passes[i], false, {passes[i].query, passes[i].key, passes[i].value, passes[i].out});
  }
  for (int i = 0; i < order.count; ++i) run_forward(passes[i]);
}

void axial_attention_backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                              const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
                              const Tensor& out, const Tensor& first, const Tensor& lse, int64_t num_heads,
                              double scale, int64_t combine, int64_t axes) {
  if (!out.numel()) return;
  for (const Tensor* gradient : {&grad_query, &grad_key, &grad_value}) expect_writes(*gradient);
  const Axes order(axes);
  const bool composed = order.count == 2 && combine == 0;
  const int64_t size = bytes_of(dtype_of(lse)), pixels = query.size(2) * query.size(3);
  const Buffer deltas(combine == 2 ? query.size(0) * num_heads * pixels * size : 0);
  Strided delta;
  delta.data = deltas.data();
  delta.x = 1, delta.y = query.size(3), delta.c = pixels, delta.n = pixels * num_heads;
  for (int i = order.count - 1; i >= 0; --i) {
    const bool vertical = order.vertical[i], last = i == order.count - 1;
    Pass p = pass(query, key, value, num_heads, scale, vertical);
    if (composed && i == 1) p.value = Map(Strided(first), vertical);
    p.lse = Map(softmax_of(lse, combine == 2 ? 0 : i), vertical);
    p.grad_out = Map(Strided(composed && i == 0 ? grad_value : grad_out), vertical);
    p.grad_query = Map(Strided(grad_query), vertical), p.grad_key = Map(Strided(grad_key), vertical);
    p.grad_value = Map(Strided(grad_value), vertical);
    p.add = !last, p.add_value = !last && !composed;
    p.skip_itself = combine == 2 && i == 0;
    p.delta = Map(delta, vertical), p.out = Map(Strided(out), vertical);
    p.delta_of_out = combine == 2 && last, p.delta_given = combine == 2 && !last;
    plan(p, true, {p.query, p.key, p.value, p.grad_out, p.grad_query, p.grad_key, p.grad_value});
    run_backward(p);
  }
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) {
  SEGOPS_DEF(m, axial_attention);
  SEGOPS_DEF(m, axial_attention_backward);
}
STABLE_TORCH_LIBRARY_IMPL(segops_C, CPU, m) {
  SEGOPS_IMPL(m, axial_attention, segops::axial_attention);
  SEGOPS_IMPL(m, axial_attention_backward, segops::axial_attention_backward);
}
