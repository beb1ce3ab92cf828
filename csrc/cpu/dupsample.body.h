// dupsample for one instruction set, and what its relatives share with it; see dupsample.cpp.
#include "cpu/dupsample_tiles.body.h"

inline void pack(const Dupsample& p, const Shared& shared, const Chunk& chunk, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<typename T>() {
    const Tiles<T> tiles(p, shared);
    for (int64_t t = begin; t < end; ++t) tiles.pack(chunk, t);
  });
}

inline void add_pieces(const Dupsample& p, const Shared& shared, const Chunk& chunk, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<typename T>() {
    const Tiles<T> tiles(p, shared);
    for (int64_t t = begin; t < end; ++t) tiles.add_pieces(chunk, t);
  });
}

inline void finish(const Dupsample& p, const Shared& shared, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<typename T>() { Tiles<T>(p, shared).finish(begin, end); });
}

// Logits out, or their gradient in: [classes][cells] of one sub-pixel.
template <typename T>
struct DupsampleTile {
  using A = typename Sum<T>::type;
  static constexpr int L = Simd<A>::lanes;
  static constexpr int64_t cells = tile_cells;

  const Upsampled& p;
  const Tiles<T>& tiles;
  LongSum product;  // sum z dz

  void tile(const Block<A>& b, const A* x, const Tile& at) {
    if (!p.backward || p.grad_temperature) tiles.logits(b, x, at.cells);
    for (int64_t s = 0; s < b.pixels; ++s) {
      const int64_t shift = (b.first + s) / p.scale * p.full.y + (b.first + s) % p.scale * p.full.x;
      T* out = static_cast<T*>(p.full.data) + shift;
      A* z = b.logits + s * p.classes * cells;
      p.full.c == 1 ? by_pixel(z, out, at) : by_class(z, out, at);
    }
  }

  // Classes of a pixel stand side by side.
  void by_pixel(A* z, T* full, const Tile& at) {
    const int64_t* offset = at.map(0);
    for (int64_t e = 0; e < at.cells; e += L) {
      const int64_t count = least(L, at.cells - e);
      for (int64_t c = 0; c < p.classes; c += L) {
        const int64_t classes = least(L, p.classes - c);
        Vec<A> square[L];
        if (p.backward) {
          for (int i = 0; i < L; ++i) {
            const T* in = full + offset[e + i] + c;
            square[i] = i >= count ? Vec<A>{} : classes == L ? widen(in) : widen(in, classes);
          }
          transpose<A>(square);
          for (int i = 0; i < classes; ++i) replace(z + (c + i) * cells + e, square[i]);
        } else {
          for (int i = 0; i < L; ++i) square[i] = load(z + (c + least(i, classes - 1)) * cells + e);
          transpose<A>(square);
          for (int i = 0; i < count; ++i) {
            T* out = full + offset[e + i] + c;
            classes == L ? narrow(square[i], out) : narrow(square[i], out, classes);
          }
        }
      }
    }
  }

  void replace(A* z, Vec<A> slope) {
    if (p.grad_temperature) product.add(load(z) * slope);
    store(z, slope);
  }

  void by_class(A* z, T* full, const Tile& at) {
    const int64_t* offset = at.map(0);
    alignas(64) T line[cells];
    for (int64_t c = 0; c < p.classes; ++c, full += p.full.c, z += cells) {
      if (p.backward) {
        for (int64_t e = 0; e < at.cells; ++e) line[e] = full[offset[e]];
        for (int64_t e = 0; e < at.cells; e += L)
          replace(z + e, at.cells - e >= L ? widen(line + e) : widen(line + e, at.cells - e));
      } else {
        for (int64_t e = 0; e < at.cells; e += L) narrow(load(z + e), line + e);
        for (int64_t e = 0; e < at.cells; ++e) full[offset[e]] = line[e];
      }
    }
  }
};

inline void work(const Upsampled& p, const Shared& shared, const Chunk& chunk, int64_t begin, int64_t end,
                 Scratch& scratch, double* products) {
  with_type(p.dtype, [&]<typename T>() {
    work<T>(p, shared, chunk, begin, end, scratch, [&](const Tiles<T>& tiles, int64_t piece, auto run) {
      DupsampleTile<T> op{p, tiles};
      run(op);
      products[chunk.index * p.pieces() + piece] = op.product.total();
    });
  });
}
