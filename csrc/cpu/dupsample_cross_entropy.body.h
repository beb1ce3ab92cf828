// Cross entropy of dupsample's logits for one instruction set; see dupsample_cross_entropy.cpp.
#include "cpu/dupsample_tiles.body.h"

// out[i] = the label at in[offset[i]], -1 where it does not count. Returns the lowest flat[i] of a label that is neither
// a class nor ignored, INT64_MAX for none.
template <typename I>
[[gnu::noinline]] int64_t gather_labels(const I* in, const int64_t* offset, const int64_t* flat, int64_t cells,
                                        int64_t classes, int64_t ignored, int32_t* out) {
  int64_t wrong = 0;
  for (int64_t e = 0; e < cells; ++e) {
    const int64_t label = in[offset[e]];
    const bool valid = uint64_t(label) < uint64_t(classes) && label != ignored;
    wrong |= !valid && label != ignored;
    out[e] = valid ? int32_t(label) : -1;
  }
  int64_t lowest = INT64_MAX;
  if (wrong)
    for (int64_t e = 0; e < cells; ++e)
      if (out[e] < 0 && int64_t(in[offset[e]]) != ignored) lowest = least(lowest, flat[e]);
  return lowest;
}

template <typename T>
struct CrossEntropyTile {
  using A = typename Sum<T>::type;
  static constexpr int L = Simd<A>::lanes;
  static constexpr int64_t cells = tile_cells;

  const CrossEntropy& p;
  const Tiles<T>& tiles;
  LongSum loss, count, product;  // product: sum z dz,
  double at_labels = 0;          // but for what labels take from it
  alignas(64) int32_t label[cells];
  alignas(64) A first[cells], second[cells], third[cells], tops[cells];

  // Labels of one sub-pixel of the tile's cells.
  void read_labels(const Tile& at, int64_t y, int64_t x) {
    const Labels& from = p.labels;
    const auto gather = [&](const auto* in) {
      return gather_labels(in + y * from.y + x * from.x, at.map(0), at.map(3), at.cells, from.classes,
                           from.ignore_index, label);
    };
    const int64_t wrong = from.kind == Labels::Kind::uint8   ? gather(static_cast<const uint8_t*>(from.data))
                          : from.kind == Labels::Kind::int16 ? gather(static_cast<const int16_t*>(from.data))
                          : from.kind == Labels::Kind::int32 ? gather(static_cast<const int32_t*>(from.data))
                                                             : gather(static_cast<const int64_t*>(from.data));
    if (wrong != INT64_MAX && p.wrong) p.wrong->report(wrong + y * p.width + x);
    for (int64_t e = at.cells; e < cells; ++e) label[e] = -1;
  }

  void tile(const Block<A>& b, const A* x, const Tile& at) {
    tiles.logits(b, x, at.cells);
    for (int64_t s = 0; s < b.pixels; ++s) {
      const int64_t y = (b.pixel + s) / p.scale, x = (b.pixel + s) % p.scale;
      A* z = b.logits + s * p.classes * cells;
      read_labels(at, y, x);
      p.backward ? gradient(z, at, y, x) : losses(z, at, y, x);
    }
  }

  void losses(const A* z, const Tile& at, int64_t y, int64_t x) {
    const A* class_weight = static_cast<const A*>(p.class_weight);
    A *weight = first, *picked = second, *log_sum = third;
    for (int e = 0; e < cells; ++e) {
      const int32_t c = label[e] < 0 ? 0 : label[e];
      picked[e] = z[c * int32_t(cells) + e];
      weight[e] = label[e] < 0 ? A(-1) : A(1);
    }
    if (class_weight)
      for (int64_t e = 0; e < at.cells; ++e) weight[e] = label[e] < 0 ? A(-1) : class_weight[label[e]];
    for (int64_t e = 0; e < at.cells; e += 4 * L) {  // four at a time: each maximum waits for the last
      Vec<A> top[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) top[i] = load(z + e + i * L);
      for (int64_t c = 1; c < p.classes; ++c)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) top[i] = larger(load(z + c * cells + e + i * L), top[i]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(tops + e + i * L, top[i]);
    }
    for (int64_t e = 0; e < at.cells; e += L) {
      const Vec<A> top = load(tops + e);
      Vec<A> sum = {};
      for (int64_t c = 0; c < p.classes; ++c) sum += bounded_exp(load(z + c * cells + e) - top);
      store(log_sum + e, sum);
    }
    const A share = A(p.label_smoothing / p.classes), rest = A(1 - p.label_smoothing);
    Vec<A> total = {}, weights = {};
    for (int64_t e = 0; e < at.cells; e += L) {
      const Vec<A> lse = load(tops + e) + vlog<A>(load(log_sum + e));
      store(log_sum + e, lse);
      const Vec<A> w = load(weight + e);
      Vec<A> l = rest * w * (lse - load(picked + e));
      if (p.label_smoothing != 0) {
        Vec<A> all = {};
        for (int64_t c = 0; c < p.classes; ++c)
          all += (lse - load(z + c * cells + e)) * (class_weight ? class_weight[c] : A(1));
        l += share * all;
      }
      const auto counts = w >= 0;
      l = counts ? l : Vec<A>{};
      total += l;
      weights += counts ? w : Vec<A>{};
      if (p.per_pixel) store(picked + e, l);
    }
    loss.add(total), count.add(weights);
    scatter(log_sum, static_cast<A*>(p.lse), at.map(1), y * p.lse_y + x * p.lse_x, at.cells);
    if (p.per_pixel) scatter(picked, static_cast<A*>(p.loss), at.map(2), y * p.loss_y + x * p.loss_x, at.cells);
  }

  static void scatter(const A* in, A* out, const int64_t* offset, int64_t shift, int64_t count) {
    out += shift;
    for (int64_t e = 0; e < count; ++e) out[offset[e]] = in[e];
  }

  // z becomes d loss / d z = p [(1-e) w_y + e/K sum w] - (1-e) w_y [c = y] - e/K w_c, times grad_loss.
  void gradient(A* z, const Tile& at, int64_t y, int64_t x) {
    const A* class_weight = static_cast<const A*>(p.class_weight);
    const A *lse = static_cast<const A*>(p.lse) + y * p.lse_y + x * p.lse_x;
    const A *grad = static_cast<const A*>(p.loss) + y * p.loss_y + x * p.loss_x;
    const A share = A(p.label_smoothing / p.classes), rest = A(1 - p.label_smoothing);
    const A whole = share * A(p.sum_of_weights);
    A *own = first, *all = second, *log_sum = third;
    for (int64_t e = 0; e < at.cells; ++e) log_sum[e] = lse[at.map(1)[e]];
    for (int64_t e = 0; e < at.cells; ++e) all[e] = grad[at.map(2)[e]];
    for (int64_t e = at.cells; e < cells; ++e) all[e] = 0, log_sum[e] = A(__builtin_inf());  // whose gradient is 0
    for (int64_t e = 0; e < cells; ++e) {
      all[e] = label[e] < 0 ? 0 : all[e];
      own[e] = all[e] * rest;
    }
    if (class_weight)
      for (int64_t e = 0; e < at.cells; ++e) own[e] *= class_weight[label[e] < 0 ? 0 : label[e]];
    if (p.grad_temperature)
      for (int64_t e = 0; e < at.cells; ++e) at_labels -= label[e] < 0 ? 0 : double(z[label[e] * cells + e]) * own[e];
    for (int64_t e = 0; e < at.cells; e += L) {
      const Vec<A> g = load(all + e), low = load(log_sum + e);
      Vec<A> sum = {}, mean = {}, weighted = {};  // of exp(z - lse), 1 but for lse's rounding; of z times it; of w z
      if (p.grad_temperature)
        for (int64_t c = 0; c < p.classes; ++c) {
          const Vec<A> value = load(z + c * cells + e), ratio = bounded_exp(value - low);
          sum += ratio, mean += value * ratio, weighted += (class_weight ? class_weight[c] : A(1)) * value;
          store(z + c * cells + e, ratio);
        }
      else
        for (int64_t c = 0; c < p.classes; ++c) {
          const Vec<A> ratio = bounded_exp(load(z + c * cells + e) - low);
          sum += ratio;
          store(z + c * cells + e, ratio);
        }
      const Vec<A> factor = (load(own + e) + g * whole) / sum;
      if (p.label_smoothing == 0)
        for (int64_t c = 0; c < p.classes; ++c) store(z + c * cells + e, load(z + c * cells + e) * factor);
      else
        for (int64_t c = 0; c < p.classes; ++c) {
          const A weight = class_weight ? class_weight[c] : A(1);
          store(z + c * cells + e, load(z + c * cells + e) * factor - weight * share * g);
        }
      if (p.grad_temperature) product.add(mean * factor - share * g * weighted);
    }
    for (int64_t e = 0; e < at.cells; ++e)
      z[(label[e] < 0 ? 0 : label[e]) * int32_t(cells) + e] -= own[e];
  }
};

inline void work(const CrossEntropy& p, const Shared& shared, const Chunk& chunk, int64_t begin, int64_t end,
                 Scratch& scratch, double* sums) {
  with_type(p.dtype, [&]<typename T>() {
    work<T>(p, shared, chunk, begin, end, scratch, [&](const Tiles<T>& tiles, int64_t piece, auto run) {
      CrossEntropyTile<T> op{p, tiles};
      run(op);
      double* at = sums + 2 * (chunk.index * p.pieces() + piece);
      at[0] = p.backward ? op.product.total() + op.at_labels : op.loss.total(), at[1] = op.count.total();
    });
  });
}
