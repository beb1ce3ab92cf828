// Tiles of dupsample's logits for one instruction set, and the gradients that follow from theirs; see dupsample.h.

#include "cpu/arena.body.h"

constexpr int max_rows = SEGOPS_VECTOR_REGISTERS == 32 ? 14 : 6;  // by two vectors: what sums fit the registers

// sums[i] = (start ? start[i] : sums[i]) + sum_t a[i * Row + t * a_step] * b[t * b_step ...], two vectors wide.
template <typename A, int Rows, int Row>
[[gnu::noinline]] void multiply(const A* a, int64_t a_step, const A* b, int64_t b_step, int64_t count, const A* start,
                                A* sums, int64_t sums_step) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> acc[Rows][2] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < count; ++t, a += a_step, b += b_step) {
    const Vec<A> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      acc[i][0] += a[i * Row] * b0;
      acc[i][1] += a[i * Row] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i, sums += sums_step) {
    store(sums, (start ? Vec<A>{} + start[i] : load(sums)) + acc[i][0]);
    store(sums + L, (start ? Vec<A>{} + start[i] : load(sums + L)) + acc[i][1]);
  }
}

// Calls kernel.operator()<Rows>(first) for `rows` rows in equal parts of at most max_rows.
template <typename Kernel>
[[gnu::always_inline]] inline void for_rows(int64_t rows, Kernel kernel) {
  const int64_t parts = (rows + max_rows - 1) / max_rows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
    switch (count) {
#if SEGOPS_VECTOR_REGISTERS == 32
      case 14: kernel.template operator()<14>(first); break;
      case 13: kernel.template operator()<13>(first); break;
      case 12: kernel.template operator()<12>(first); break;
      case 11: kernel.template operator()<11>(first); break;
      case 10: kernel.template operator()<10>(first); break;
      case 9: kernel.template operator()<9>(first); break;
      case 8: kernel.template operator()<8>(first); break;
      case 7: kernel.template operator()<7>(first); break;
#endif
      case 6: kernel.template operator()<6>(first); break;
      case 5: kernel.template operator()<5>(first); break;
      case 4: kernel.template operator()<4>(first); break;
      case 3: kernel.template operator()<3>(first); break;
      case 2: kernel.template operator()<2>(first); break;
      default: kernel.template operator()<1>(first); break;
    }
  }
}

// The larger of a and b; b if either is NaN. One instruction, which the compiler does not find for vectors.
[[gnu::always_inline]] inline Vec<float> larger(Vec<float> a, Vec<float> b) {
#if SEGOPS_X86_ISAS && SEGOPS_VECTOR_BYTES == 64
  return __builtin_ia32_maxps512_mask(a, b, a, -1, 4);
#elif SEGOPS_X86_ISAS && SEGOPS_VECTOR_BYTES == 32
  return __builtin_ia32_maxps256(a, b);
#elif SEGOPS_X86_ISAS
  return __builtin_ia32_maxps(a, b);
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline Vec<double> larger(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

// exp(x) for x below about 80, no less than exp(exp_min); NaN for NaN. Float: a minimax polynomial, exact at 0.
[[gnu::always_inline]] inline Vec<float> bounded_exp(Vec<float> x) {
  using S = Simd<float>;
  x = larger(Vec<float>{} + S::exp_min, x);
  const Vec<float> shifted = x * S::log2e + (S::round_magic + S::bias);
  const Vec<float> n = shifted - (S::round_magic + S::bias);
  const Vec<float> r = (x - n * S::ln2_hi) - n * S::ln2_lo;
  Vec<float> p = r * 0x1.6a23d0p-10f + 0x1.123a20p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * __builtin_bit_cast(Vec<float>, __builtin_bit_cast(S::bits, shifted) << S::mantissa);
}
[[gnu::always_inline]] inline Vec<double> bounded_exp(Vec<double> x) {
  return vexp<double>(larger(Vec<double>{} + Simd<double>::exp_min, x));
}

// Calls function.operator()<T>() for the storage type.
template <typename Function>
[[gnu::always_inline]] inline void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32: return function.template operator()<float>();
    case DType::float64: return function.template operator()<double>();
    case DType::bfloat16: return function.template operator()<bf16>();
    case DType::float16: return function.template operator()<fp16>();
  }
}

template <typename A>
[[gnu::always_inline]] inline double sum_of(Vec<A> v) {
  double total = 0;
  for (int i = 0; i < Simd<A>::lanes; ++i) total += double(v[i]);
  return total;
}

// A sum of many vectors, in double.
struct LongSum {
  Vec<double> low = {}, high = {};
  [[gnu::always_inline]] void add(Vec<double> v) { low += v; }
  [[gnu::always_inline]] void add(Vec<float> v) {
    typedef float Half __attribute__((vector_size(SEGOPS_VECTOR_BYTES / 2)));
    struct Halves { Half low, high; };
    const Halves halves = __builtin_bit_cast(Halves, v);
    low += __builtin_convertvector(halves.low, Vec<double>), high += __builtin_convertvector(halves.high, Vec<double>);
  }
  double total() const { return sum_of<double>(low + high); }
};

// Memory of one worker for the block of sub-pixels at hand.
template <typename A>
struct Block {
  A *weight, *weight_by_channel, *bias, *logits, *grad_weight;
  A* grad_bias;  // [row][lane]
  int64_t pixel, pixels, first_class, classes, rows;  // rows = pixels * classes
};

// The tile at hand: cells, and what the op's maps add for each.
struct Tile {
  const int64_t* offset;  // [map][cell]
  int64_t offset_step, cells;
  const int64_t* map(int index) const { return offset + index * offset_step; }
};

template <typename T>
struct Tiles {
  using A = typename Sum<T>::type;
  static constexpr int L = Simd<A>::lanes;
  static constexpr int64_t tile = tile_cells, panel = 2 * L;

  const Dupsample& p;
  const Shared& shared;
  const int64_t channels_step, rows_step;  // of weight and of weight_by_channel; rows a page apart would share sets
  const int64_t padded;                    // channels of x_by_cell and the block's grad_weight

  Tiles(const Dupsample& p, const Shared& shared)
      : p(p), shared(shared), channels_step(spread(p.channels)), rows_step(spread(p.block_pixels * p.block_classes)),
        padded(round_up(p.channels, panel)) {}
  static int64_t spread(int64_t count) {
    const int64_t whole = round_up(count, L);
    return whole * int64_t(sizeof(A)) % 1024 ? whole : whole + L;
  }

  A* x_tile(int64_t t) const { return static_cast<A*>(shared.x) + t * p.channels * tile; }
  A* x_by_cell(int64_t t) const { return static_cast<A*>(shared.x_by_cell) + t * padded * tile; }
  A* grad_x_tile(int64_t block_piece, int64_t t) const {
    return static_cast<A*>(shared.grad_x) + (block_piece * (p.chunk_cells / tile) + t) * p.channels * tile;
  }

  // ---- a chunk's input ----

  void pack(const Chunk& chunk, int64_t t) const {
    const Region& region = *chunk.region;
    const int64_t rows = region.bottom - region.top, columns = region.right - region.left;
    int64_t *x_offset = shared.x_offset + t * tile, *grad_offset = shared.grad_offset + t * tile;
    const int64_t cells = least(tile, chunk.cells - t * tile);
    for (int64_t e = 0; e < tile; ++e) {
      const int64_t cell = chunk.first + t * tile + least(e, cells - 1);
      const int64_t n = cell / columns / rows, i = region.top + cell / columns % rows, j = region.left + cell % columns;
      x_offset[e] = n * p.x.n + i * p.x.y + j * p.x.x;
      if (p.backward) grad_offset[e] = n * p.grad_x.n + i * p.grad_x.y + j * p.grad_x.x;
      for (int m = 0; m < p.map_count; ++m) {
        const Map& map = p.maps[m];
        shared.offset[m * p.chunk_cells + t * tile + e] = n * map.n + p.scale * (i * map.y + j * map.x);
      }
    }
    A* out = x_tile(t);
    const A factor = A(1 / p.temperature);
    for (int64_t e = 0; e < tile; e += L) {
      const int64_t count = most(0, least(L, cells - e));
      load_cells(out + e, static_cast<const T*>(p.x.data), x_offset + e, count, factor);
    }
    if (!p.backward) return;
    A* turned = x_by_cell(t);
    for (int64_t e = 0; e < tile; e += L)
      for (int64_t c = 0; c < padded; c += L) {
        Vec<A> square[L];
        for (int i = 0; i < L; ++i) square[i] = c + i < p.channels ? load(out + (c + i) * tile + e) : Vec<A>{};
        transpose<A>(square);
        for (int i = 0; i < L; ++i) store(turned + (e + i) * padded + c, square[i]);
      }
  }

  static bool in_a_row(const int64_t* offset, int64_t count) {
    for (int64_t i = 1; i < count; ++i)
      if (offset[i] != offset[0] + i) return false;
    return true;
  }

  // out[c][0 .. L) = the channels of `count` cells, zero beyond.
  void load_cells(A* out, const T* x, const int64_t* offset, int64_t count, A factor) const {
    const int64_t step = p.x.c;
    if (count == 0) {
      for (int64_t c = 0; c < p.channels; ++c) store(out + c * tile, Vec<A>{});
    } else if (in_a_row(offset, count)) {
      const T* in = x + offset[0];
      if (count == L)
        for (int64_t c = 0; c < p.channels; ++c) store(out + c * tile, widen(in + c * step) * factor);
      else
        for (int64_t c = 0; c < p.channels; ++c) store(out + c * tile, widen(in + c * step, count) * factor);
    } else if (step == 1) {
      for (int64_t c = 0; c < p.channels; c += L) {
        const int64_t channels = least(L, p.channels - c);
        Vec<A> square[L];
        for (int i = 0; i < L; ++i) {
          const T* in = x + offset[i] + c;
          square[i] = i >= count ? Vec<A>{} : channels == L ? widen(in) : widen(in, channels);
          square[i] *= factor;
        }
        transpose<A>(square);
        for (int i = 0; i < channels; ++i) store(out + (c + i) * tile, square[i]);
      }
    } else {
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t i = 0; i < L; ++i)
          out[c * tile + i] = i < count ? widen(x + offset[i] + c * step, 1)[0] * factor : 0;
    }
  }

  // ---- a block of sub-pixels ----

  Block<A> block_memory(Arena& arena) const {
    const int64_t rows = round_up(p.block_pixels * p.block_classes, L), channels = round_up(p.channels, L);
    Block<A> b;
    b.weight = arena.take<A>(rows * channels_step);
    b.weight_by_channel = arena.take<A>(channels * rows_step);
    b.bias = arena.take<A>(rows);
    b.logits = arena.take<A>(rows * tile);
    b.grad_weight = arena.take<A>(p.backward ? rows * padded : 0);
    b.grad_bias = arena.take<A>(p.backward ? rows * L : 0);
    return b;
  }

  int64_t weight_row(const Block<A>& b, int64_t i) const {
    return (b.pixel + i / b.classes) * p.classes + b.first_class + i % b.classes;
  }

  void load_block(Block<A>& b) const {
    const A factor = A(1 / p.temperature);
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t row = weight_row(b, i);
      const T* in = static_cast<const T*>(p.weight) + row * p.weight_row;
      A* out = b.weight + i * channels_step;
      int64_t c = 0;
      if (p.weight_channel == 1) {
        for (; c + L <= p.channels; c += L) store(out + c, widen(in + c));
        if (c < p.channels) store(out + c, widen(in + c, p.channels - c));
      } else {
        for (; c < p.channels; ++c) out[c] = widen(in + c * p.weight_channel, 1)[0];
      }
      b.bias[i] = bias ? widen(bias + row * p.bias_row, 1)[0] * factor : 0;
    }
    for (int64_t i = 0; i < b.rows; i += L)
      for (int64_t c = 0; c < p.channels; c += L) {
        Vec<A> square[L];
#pragma GCC unroll 16
        for (int e = 0; e < L; ++e) square[e] = load(b.weight + (i + e) * channels_step + c);
        transpose<A>(square);
#pragma GCC unroll 16
        for (int e = 0; e < L; ++e) store(b.weight_by_channel + (c + e) * rows_step + i, square[e]);
      }
  }

  // logits[row][cell] = (W x + b) / temperature, summed over some channels at a time: less error in long sums.
  void logits(const Block<A>& b, const A* x, int64_t cells) const {
    for (int64_t c = 0; c < p.channels; c += 256)
      for_rows(b.rows, [&]<int Rows>(int64_t first) {
        for (int64_t e = 0; e < cells; e += panel)
          multiply<A, Rows, 1>(b.weight_by_channel + c * rows_step + first, rows_step, x + c * tile + e, tile,
                               least(256, p.channels - c), c ? nullptr : b.bias + first, b.logits + first * tile + e,
                               tile);
      });
  }

  // From the gradient g that stands in b.logits: grad_x += W^T g, grad_weight += g x^T, grad_bias += sum g.
  void spread_gradient(const Block<A>& b, int64_t t, int64_t cells, A* grad_x) const {
    for (int64_t i = 0; i < (p.grad_bias ? b.rows : 0); ++i) {
      Vec<A> sum = load(b.grad_bias + i * L);
      for (int64_t e = 0; e < cells; e += L) sum += load(b.logits + i * tile + e);
      store(b.grad_bias + i * L, sum);
    }
    for_rows(p.channels, [&]<int Rows>(int64_t first) {
      for (int64_t e = 0; e < cells; e += panel)
        multiply<A, Rows, 1>(b.weight + first, channels_step, b.logits + e, tile, b.rows, nullptr,
                             grad_x + first * tile + e, tile);
    });
    for_rows(b.rows, [&]<int Rows>(int64_t first) {
      for (int64_t c = 0; c < padded; c += panel)
        multiply<A, Rows, tile>(b.logits + first * tile, 1, x_by_cell(t) + c, padded, cells, nullptr,
                                b.grad_weight + first * padded + c, padded);
    });
  }

  A* weight_sums(int64_t cell_piece, int64_t row) const {
    const int64_t step = p.sums_in_place() ? p.grad_weight_row : p.channels;
    return static_cast<A*>(shared.grad_weight) + (cell_piece * p.rows() + row) * step;
  }
  A* bias_sum(int64_t cell_piece, int64_t row) const {
    return static_cast<A*>(shared.grad_bias) + cell_piece * p.rows() + row;
  }

  void add_weight_gradient(const Block<A>& b, int64_t cell_piece) const {
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t row = weight_row(b, i);
      const A* in = b.grad_weight + i * padded;
      A* sums = weight_sums(cell_piece, row);
      for (int64_t c = 0; c < p.channels; ++c) sums[c] += in[c];
      if (p.grad_bias) *bias_sum(cell_piece, row) += A(sum_of<A>(load(b.grad_bias + i * L)));
    }
  }

  // One piece of a chunk: op.tile(block, x, tile) turns a tile of inputs into results, backward into their gradient.
  template <typename Op>
  void piece(const Chunk& chunk, int64_t index, Block<A>& b, Op& op) const {
    const int64_t block_piece = index % p.block_pieces, cell_piece = index / p.block_pieces, tiles = chunk.tiles();
    const int64_t first = tiles * cell_piece / p.cell_pieces, last = tiles * (cell_piece + 1) / p.cell_pieces;
    if (p.backward)
      __builtin_memset(grad_x_tile(block_piece, first), 0, (last - first) * p.channels * tile * sizeof(A));
    const int64_t end = p.blocks() * (block_piece + 1) / p.block_pieces;
    for (int64_t block = p.blocks() * block_piece / p.block_pieces; block < end && first < last; ++block) {
      const int64_t part = block % p.class_blocks, pixel0 = block / p.class_blocks * p.block_pixels;
      const int64_t pixel1 = least(pixel0 + p.block_pixels, p.scale * p.scale);
      b.first_class = p.classes * part / p.class_blocks;
      b.classes = p.classes * (part + 1) / p.class_blocks - b.first_class;
      const auto exists = [&](int64_t s) {
        return s / p.scale < chunk.region->rows && s % p.scale < chunk.region->columns;
      };
      for (int64_t s = pixel0, next; s < pixel1; s = next) {
        for (next = s; next < pixel1 && exists(next);) ++next;
        b.pixel = s, b.pixels = next - s, b.rows = b.pixels * b.classes;
        b.rows ? block_of_tiles(chunk, block_piece, cell_piece, first, last, b, op) : (void)++next;
      }
    }
  }

  template <typename Op>
  void block_of_tiles(const Chunk& chunk, int64_t block_piece, int64_t cell_piece, int64_t first, int64_t last,
                      Block<A>& b, Op& op) const {
    load_block(b);
    if (p.backward) {
      __builtin_memset(b.grad_weight, 0, b.rows * padded * sizeof(A));
      __builtin_memset(b.grad_bias, 0, b.rows * L * sizeof(A));
    }
    for (int64_t t = first; t < last; ++t) {
      const Tile at{shared.offset + t * tile, p.chunk_cells, least(tile, chunk.cells - t * tile)};
      op.tile(b, x_tile(t), at);
      if (p.backward) spread_gradient(b, t, at.cells, grad_x_tile(block_piece, t));
    }
    if (p.backward) add_weight_gradient(b, cell_piece);
  }

  // ---- what is left after the pieces of a chunk, and after all chunks ----

  void add_pieces(const Chunk& chunk, int64_t t) const {
    A* sums = grad_x_tile(0, t);
    for (int64_t piece = 1; piece < p.block_pieces; ++piece) {
      const A* in = grad_x_tile(piece, t);
      for (int64_t e = 0; e < p.channels * tile; e += L) store(sums + e, load(sums + e) + load(in + e));
    }
    const int64_t cells = least(tile, chunk.cells - t * tile);
    const A factor = A(1 / p.temperature);
    for (int64_t e = 0; e < cells; e += L)
      store_cells(sums + e, static_cast<T*>(p.grad_x.data), shared.grad_offset + t * tile + e, least(L, cells - e),
                  factor);
  }

  void store_cells(const A* in, T* x, const int64_t* offset, int64_t count, A factor) const {
    const int64_t step = p.grad_x.c;
    if (in_a_row(offset, count)) {
      T* out = x + offset[0];
      if (count == L)
        for (int64_t c = 0; c < p.channels; ++c) narrow(load(in + c * tile) * factor, out + c * step);
      else
        for (int64_t c = 0; c < p.channels; ++c) narrow(load(in + c * tile) * factor, out + c * step, count);
    } else if (step == 1) {
      for (int64_t c = 0; c < p.channels; c += L) {
        const int64_t channels = least(L, p.channels - c);
        Vec<A> square[L];
        for (int i = 0; i < L; ++i) square[i] = load(in + (c + least(i, channels - 1)) * tile) * factor;
        transpose<A>(square);
        for (int i = 0; i < count; ++i) {
          T* out = x + offset[i] + c;
          channels == L ? narrow(square[i], out) : narrow(square[i], out, channels);
        }
      }
    } else {
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t i = 0; i < count; ++i)
          narrow(Vec<A>{} + in[c * tile + i] * factor, x + offset[i] + c * step, 1);
    }
  }

  void zero_sums(int64_t begin, int64_t end) const {
    for (int64_t piece = 0; piece < p.cell_pieces; ++piece)
      for (int64_t row = begin; row < end; ++row) {
        A* sums = weight_sums(piece, row);
        for (int64_t c = 0; c < p.channels; ++c) sums[c] = 0;
        *bias_sum(piece, row) = 0;
      }
  }

  // Rows of the weight gradient: pieces are added up and stored.
  void finish(int64_t begin, int64_t end) const {
    const A factor = A(1 / p.temperature);
    for (int64_t row = begin; row < end; ++row) {
      A *sums = weight_sums(0, row), *bias = bias_sum(0, row);
      for (int64_t piece = 1; piece < p.cell_pieces; ++piece) {
        const A* in = weight_sums(piece, row);
        for (int64_t c = 0; c < p.channels; ++c) sums[c] += in[c];
        *bias += *bias_sum(piece, row);
      }
      if (p.grad_bias) narrow(Vec<A>{} + *bias * factor, static_cast<T*>(p.grad_bias) + row * p.grad_bias_row, 1);
      if (p.sums_in_place()) continue;
      T* out = static_cast<T*>(p.grad_weight) + row * p.grad_weight_row;
      if (p.grad_weight_channel == 1) {
        int64_t c = 0;
        for (; c + L <= p.channels; c += L) narrow(load(sums + c), out + c);
        if (c < p.channels) narrow(widen(sums + c, p.channels - c), out + c, p.channels - c);
      } else {
        for (int64_t c = 0; c < p.channels; ++c) narrow(Vec<A>{} + sums[c], out + c * p.grad_weight_channel, 1);
      }
    }
  }
};

// Pieces begin .. end-1 of a chunk, in one worker's memory: each(tiles, piece, run) makes the op and calls run(op).
template <typename T, typename Each>
void work(const Dupsample& p, const Shared& shared, const Chunk& chunk, int64_t begin, int64_t end, Scratch& scratch,
          Each each) {
  const Tiles<T> tiles(p, shared);
  Arena arena{nullptr};
  (void)tiles.block_memory(arena);
  arena = {scratch.zeroed(arena.used)};
  if (!arena.base) return;
  auto block = tiles.block_memory(arena);
  for (int64_t piece = begin; piece < end; ++piece)
    each(tiles, piece, [&](auto& op) { tiles.piece(chunk, piece, block, op); });
}
