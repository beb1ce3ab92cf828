// The winning class of dupsample's logits for one instruction set; see dupsample_argmax.cpp.
#include "cpu/dupsample_tiles.body.h"

template <typename T>
struct ArgmaxTile {
  using A = typename Sum<T>::type;
  using B = typename Simd<A>::bits;
  using Index = decltype(+B{}[0]);
  static constexpr int L = Simd<A>::lanes;
  static constexpr int64_t cells = tile_cells;

  const Argmax& p;
  const Tiles<T>& tiles;

  void tile(const Block<A>& b, const A* x, const Tile& at) const {
    alignas(64) Index winner[cells];
    alignas(64) A confidence[cells];
    tiles.logits(b, x, at.cells);
    for (int64_t s = 0; s < b.pixels; ++s) {
      const int64_t dy = (b.pixel + s) / p.scale, dx = (b.pixel + s) % p.scale;
      const A* z = b.logits + s * p.classes * cells;
      for (int64_t e = 0; e < at.cells; e += 4 * L) {  // four at a time: each comparison waits for the last
        Vec<A> top[4];
        B index[4] = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) top[i] = load(z + e + i * L);
        for (int64_t c = 1; c < p.classes; ++c)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const Vec<A> value = load(z + c * cells + e + i * L);
            index[i] = value > top[i] ? B{} + Index(c) : index[i];
            top[i] = larger(value, top[i]);
          }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          *reinterpret_cast<B*>(winner + e + i * L) = index[i];
          store(confidence + e + i * L, top[i]);
        }
      }
      if (p.confidence)
        for (int64_t e = 0; e < at.cells; e += L) {
          const Vec<A> top = load(confidence + e);
          Vec<A> sum = {};
          for (int64_t c = 0; c < p.classes; ++c) sum += bounded_exp(load(z + c * cells + e) - top);
          store(confidence + e, 1 / sum);
        }
      const int64_t shift = dy * p.labels_y + dx * p.labels_x;
      if (p.bytes)
        scatter(winner, static_cast<uint8_t*>(p.labels) + shift, at.map(0), at.cells);
      else
        scatter(winner, static_cast<int64_t*>(p.labels) + shift, at.map(0), at.cells);
      if (p.confidence)
        scatter(confidence, static_cast<A*>(p.confidence) + dy * p.confidence_y + dx * p.confidence_x, at.map(1),
                at.cells);
    }
  }

  template <typename From, typename To>
  static void scatter(const From* in, To* out, const int64_t* offset, int64_t count) {
    for (int64_t e = 0; e < count; ++e) out[offset[e]] = To(in[e]);
  }
};

inline void work(const Argmax& p, const Shared& shared, const Chunk& chunk, int64_t begin, int64_t end,
                 Scratch& scratch) {
  with_type(p.dtype, [&]<typename T>() {
    work<T>(p, shared, chunk, begin, end, scratch, [&](const Tiles<T>& tiles, int64_t, auto run) {
      const ArgmaxTile<T> op{p, tiles};
      run(op);
    });
  });
}
