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

inline void zero_sums(const Dupsample& p, const Shared& shared, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<typename T>() { Tiles<T>(p, shared).zero_sums(begin, end); });
}

inline void finish(const Dupsample& p, const Shared& shared, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<typename T>() { Tiles<T>(p, shared).finish(begin, end); });
}

// Logits out, or their gradient in.
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
    int64_t count;
    for (int64_t s = 0; s < b.pixels; s += count) {
      const int64_t dy = (b.pixel + s) / p.scale, dx = (b.pixel + s) % p.scale;
      T* full = static_cast<T*>(p.full.data) + b.first_class * p.full.c + dy * p.full.y + dx * p.full.x;
      A* z = b.logits + s * b.classes * cells;
      count = least(b.pixels - s, p.scale - dx);
      if (p.full.x == 1 && count >= 4) {
        const int64_t step = b.classes * cells;
        for (int64_t c = 0; c < b.classes; ++c) squares(z + c * cells, step, count, full + c * p.full.c, at);
      } else if (p.full.c == 1 && b.classes >= 4) {
        count = 1;
        squares(z, cells, b.classes, full, at);
      } else {
        count = 1;
        for (int64_t c = 0; c < b.classes; ++c) singles(z + c * cells, full + c * p.full.c, at);
      }
    }
  }

  // Values of a cell that stand side by side in memory, and in `count` rows of z: a row of sub-pixels, or the classes.
  void squares(A* z, int64_t step, int64_t count, T* full, const Tile& at) {
    for (int64_t first = 0; first < count; first += L, z += L * step, full += L)
      for (int64_t e = 0; e < at.cells; e += L) {
        if (count - first >= L && at.cells - e >= L)
          p.backward ? square_in<true>(z + e, step, L, full, at.map(0) + e, L)
                     : square_out<true>(z + e, step, L, full, at.map(0) + e, L);
        else
          p.backward ? square_in<false>(z + e, step, least(L, count - first), full, at.map(0) + e, at.cells - e)
                     : square_out<false>(z + e, step, least(L, count - first), full, at.map(0) + e, at.cells - e);
      }
  }
  template <bool Whole>
  void square_out(const A* z, int64_t step, int64_t count, T* out, const int64_t* offset, int64_t cells_left) const {
    Vec<A> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = Whole || i < count ? load(z + i * step) : Vec<A>{};
    transpose<A>(square);
    if (Whole) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) narrow(square[i], out + offset[i]);
    } else {
      for (int i = 0; i < least(L, cells_left); ++i) narrow(square[i], out + offset[i], count);
    }
  }
  template <bool Whole>
  void square_in(A* z, int64_t step, int64_t count, const T* in, const int64_t* offset, int64_t cells_left) {
    Vec<A> square[L];
    if (Whole) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = widen(in + offset[i]);
    } else {
      for (int i = 0; i < L; ++i) square[i] = i < cells_left ? widen(in + offset[i], count) : Vec<A>{};
    }
    transpose<A>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (Whole || i < count) replace(z + i * step, square[i]);
  }

  void singles(A* z, T* full, const Tile& at) {
    const int64_t* offset = at.map(0);
    alignas(64) T line[cells];
    if (p.backward) {
      for (int64_t e = 0; e < at.cells; ++e) line[e] = full[offset[e]];
      for (int64_t e = 0; e < at.cells; e += L)
        replace(z + e, at.cells - e >= L ? widen(line + e) : widen(line + e, at.cells - e));
    } else {
      for (int64_t e = 0; e < at.cells; e += L) narrow(load(z + e), line + e);
      for (int64_t e = 0; e < at.cells; ++e) full[offset[e]] = line[e];
    }
  }

  void replace(A* z, Vec<A> slope) {
    if (p.grad_temperature) product.add(load(z) * slope);
    store(z, slope);
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
