// Sums of features by class for one instruction set; see class_centers.cpp.
#include "cpu/class_rows.body.h"

inline bool pixels_in_a_row(const Problem& p) { return p.x.x == 1 && (p.x.y == p.width || p.height == 1); }

inline void plan(Problem& p) {
  const int64_t lanes = p.dtype == DType::float64 ? Simd<double>::lanes : Simd<float>::lanes;
  p.vectors = !pixels_in_a_row(p) && p.x.c == 1 && p.channels > lanes ? 4 : 1;  // channels_last: whole cache lines
  p.blocks = (p.channels + p.vectors * lanes - 1) / (p.vectors * lanes);
  const int64_t wanted = 32 / most(1, p.groups * p.blocks);
  p.pieces = most(1, least(wanted, least(8, p.group_images() * p.stretches)));
}

inline void read_labels(Problem& p, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image)
    for (int64_t y = 0; y < p.height; ++y) {
      int32_t* out = p.label.data() + image * p.pixels + y * p.width;
      p.labels.read(image, y, 0, 1, p.width, out, p.wrong);
      for (int64_t x = 0; x < p.width; ++x) out[x] = out[x] < 0 ? int32_t(p.classes) : out[x];
    }
}

template <typename T, int Vectors>
struct Summing {
  using A = typename Sum<T>::type;
  static constexpr int L = Simd<A>::lanes;
  static constexpr int64_t width = Vectors * L;

  const Problem& p;
  A *table, *total;  // [classes + 1][width]

  Summing(const Problem& p, Arena& arena)
      : p(p), table(arena.take<A>((p.classes + 1) * width)), total(arena.take<A>((p.classes + 1) * width)) {}

  // square[j] = the channels c .. c + L of pixel `first` + j, of `count` pixels.
  [[gnu::always_inline]] void square(const T* x, int64_t first, int64_t count, int64_t c, Vec<A>* square) const {
    const int64_t channels = least(p.channels - c, L);
    if (pixels_in_a_row(p)) {
      const T* from = x + c * p.x.c + first;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i, from += p.x.c)
        square[i] = i >= channels ? Vec<A>{} : count >= L ? widen(from) : widen(from, count);
      transpose<A>(square);
    } else {
      for (int64_t j = 0; j < L; ++j) {
        const T* from = x + offset(p, p.x, first + (j < count ? j : 0)) + c * p.x.c;
        if (p.x.c == 1) {
          square[j] = channels == L ? widen(from) : widen(from, channels);
        } else {
          square[j] = Vec<A>{};
          for (int64_t i = 0; i < channels; ++i) square[j][i] = widen(from + i * p.x.c, 1)[0];
        }
      }
    }
  }

  void add(int64_t image, int64_t first, int64_t end, int64_t channel) {
    const T* x = static_cast<const T*>(p.x.data) + image * p.x.n;
    const int32_t* label = p.label.data() + image * p.pixels;
    for (int64_t at = first; at < end; at += L) {
      const int64_t count = least(L, end - at);
      bool alike = count == L;
      for (int64_t j = 1; j < count; ++j) alike &= label[at + j] == label[at];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t c = channel + v * L;
        if (c >= p.channels) break;
        Vec<A> pixel[L];
        square(x, at, count, c, pixel);
        A* row = table + v * L;
        if (alike) {  // label maps are smooth, and an addition waits for the last one to the same row
#pragma GCC unroll 4
          for (int half = L / 2; half; half /= 2)
#pragma GCC unroll 8
            for (int j = 0; j < half; ++j) pixel[j] += pixel[j + half];
          row += label[at] * width;
          store(row, load(row) + pixel[0]);
        } else if (count == L) {
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) {
            A* to = row + label[at + j] * width;
            store(to, load(to) + pixel[j]);
          }
        } else {
          for (int64_t j = 0; j < count; ++j) {
            A* to = row + label[at + j] * width;
            store(to, load(to) + pixel[j]);
          }
        }
      }
    }
  }

  void piece(int64_t group, int64_t block, int64_t index) {
    const int64_t length = (p.classes + 1) * width, channel = block * width, all = p.group_images() * p.stretches;
    __builtin_memset(total, 0, length * sizeof(A));
    for (int64_t i = all * index / p.pieces; i < all * (index + 1) / p.pieces; ++i) {
      const int64_t image = group + i / p.stretches, first = i % p.stretches * stretch;
      __builtin_memset(table, 0, length * sizeof(A));
      add(image, first, least(p.pixels, first + stretch), channel);
      for (int64_t e = 0; e < length; e += L) store(total + e, load(total + e) + load(table + e));
    }
    A* out = static_cast<A*>(p.partial) + (index * p.groups + group) * p.classes * p.channels + channel;
    const int64_t channels = least(width, p.channels - channel);
    for (int64_t k = 0; k < p.classes; ++k)
      __builtin_memcpy(out + k * p.channels, total + k * width, channels * sizeof(A));
  }
};

template <typename T, int Vectors>
void sum_as(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  Arena arena{nullptr};
  (void)Summing<T, Vectors>(p, arena);
  arena = {scratch.zeroed(arena.used)};
  if (!arena.base) return;
  Summing<T, Vectors> summing(p, arena);
  for (int64_t i = begin; i < end; ++i)
    summing.piece(i / p.pieces / p.blocks, i / p.pieces % p.blocks, i % p.pieces);
}

inline void sum(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  with_type(p.dtype, [&]<typename T>() {
    p.vectors == 1 ? sum_as<T, 1>(p, begin, end, scratch) : sum_as<T, 4>(p, begin, end, scratch);
  });
}

inline void add_pieces(const Problem& p, int64_t table) {
  with_type(p.dtype, [&]<typename T>() {
    using A = typename Sum<T>::type;
    A* out = static_cast<A*>(p.sums);
    const A* in = static_cast<const A*>(p.partial);
    for (int64_t i = 0; i < table; ++i) {
      A value = in[i];
      for (int64_t piece = 1; piece < p.pieces; ++piece) value += in[piece * table + i];
      out[i] = value;
    }
  });
}

// Tiles begin .. end-1 of the gradient: each pixel gets its class's row of dS.
inline void spread(const Problem& p, int64_t tiles, int64_t begin, int64_t end, Scratch& scratch) {
  with_type(p.dtype, [&]<typename T>() {
    using A = typename Sum<T>::type;
    constexpr int L = Simd<A>::lanes;
    A* tile = reinterpret_cast<A*>(scratch.zeroed(round_up(p.channels, L) * tile_pixels * int64_t(sizeof(A))));
    if (!tile) return;
    alignas(64) int32_t label[tile_pixels];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / tiles;
      const Span at(p, i % tiles);
      read_tile(p.labels, image, at.first, at.count, label, nullptr);
      const A* rows = static_cast<const A*>(p.sums) + (p.per_image ? image : 0) * p.classes * p.channels;
      for (int64_t c = 0; c < p.channels; c += L)
        for (int64_t e = 0; e < tile_pixels; e += L) {
          Vec<A> square[L];
          class_rows<A>(rows + c, p.channels, label + e, p.channels - c, square);
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) store(tile + (c + j) * tile_pixels + e, square[j]);
        }
      unpack<T>(p, tile, p.x, image, at);
    }
  });
}
