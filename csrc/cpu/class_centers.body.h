// Sums of features by class for one instruction set; see class_centers.cpp.
#include "cpu/class_rows.body.h"

inline bool pixels_in_a_row(const Problem& p) { return p.x.x == 1 && (p.x.y == p.width || p.height == 1); }

inline void plan(Problem& p) {
  const int64_t lanes = p.dtype == DType::float64 ? Simd<double>::lanes : Simd<float>::lanes;
  const int64_t fits = most(1, (512 << 10) / (64 * p.classes)) * lanes;
  p.columns = pixels_in_a_row(p) || p.x.c != 1 ? lanes : least(round_up(p.channels, lanes), fits);
  p.blocks = (p.channels + p.columns - 1) / p.columns;
  const int64_t wanted = 32 / most(1, p.groups * p.blocks), few = p.group_images() * p.pixels / (16 * p.classes);
  p.pieces = most(1, least(least(wanted, few), least(16, p.group_images() * p.stretches)));
}

inline void read_labels(Problem& p, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image)
    for (int64_t y = 0; y < p.height; ++y) {
      int32_t* out = p.label.data() + image * p.pixels + y * p.width;
      p.labels.read(image, y, 0, 1, p.width, out, p.wrong);
      for (int64_t x = 0; x < p.width; ++x) out[x] = out[x] < 0 ? int32_t(p.classes) : out[x];
    }
}

template <typename T>
struct Summing {
  using A = typename Sum<T>::type;
  static constexpr int L = Simd<A>::lanes;

  const Problem& p;
  A *table, *total;  // [classes + 1][columns]

  Summing(const Problem& p, Arena& arena)
      : p(p), table(arena.take<A>((p.classes + 1) * p.columns)), total(arena.take<A>((p.classes + 1) * p.columns)) {}

  [[gnu::always_inline]] static void add_to(A* row, Vec<A> v) { store(row, load(row) + v); }

  // Pixels first .. end-1 of some channels, each channel's in a row. Label maps are smooth, and an addition waits for the
  // last one to the same row: equal ones are added up first.
  void add_turned(const T* x, const int32_t* label, int64_t first, int64_t end, int64_t channels) {
    for (int64_t at = first; at < end; at += L) {
      const int64_t count = least(L, end - at);
      const T* from = x + at;
      Vec<A> pixel[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i, from += p.x.c)
        pixel[i] = i >= channels ? Vec<A>{} : count == L ? widen(from) : widen(from, count);
      transpose<A>(pixel);
      bool alike = count == L;
      for (int64_t j = 1; j < count; ++j) alike &= label[at + j] == label[at];
      if (alike) {
#pragma GCC unroll 4
        for (int half = L / 2; half; half /= 2)
#pragma GCC unroll 8
          for (int j = 0; j < half; ++j) pixel[j] += pixel[j + half];
        add_to(table + label[at] * L, pixel[0]);
      } else if (count == L) {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) add_to(table + label[at + j] * L, pixel[j]);
      } else {
        for (int64_t j = 0; j < count; ++j) add_to(table + label[at + j] * L, pixel[j]);
      }
    }
  }

  // The same where each pixel's channels are in a row, four pixels at a time if they are alike.
  void add_rows(const T* x, const int32_t* label, int64_t first, int64_t end, int64_t channels) {
    const int64_t whole = channels / L * L;
    for (int64_t at = first; at < end;) {
      const int32_t* k = label + at;
      A* to = table + *k * p.columns;
      const T* row = x + offset(p, p.x, at);
      if (at + 4 <= end && k[0] == k[1] && k[0] == k[2] && k[0] == k[3]) {
        const T *row1 = x + offset(p, p.x, at + 1), *row2 = x + offset(p, p.x, at + 2), *row3 = x + offset(p, p.x, at + 3);
        for (int64_t c = 0; c < whole; c += L)
          add_to(to + c, (widen(row + c) + widen(row1 + c)) + (widen(row2 + c) + widen(row3 + c)));
        if (whole < channels)
          for (int64_t j = 0; j < 4; ++j)
            add_to(to + whole, widen(x + offset(p, p.x, at + j) + whole, channels - whole));
        at += 4;
      } else {
        for (int64_t c = 0; c < whole; c += L) add_to(to + c, widen(row + c));
        if (whole < channels) add_to(to + whole, widen(row + whole, channels - whole));
        ++at;
      }
    }
  }

  void add_strided(const T* x, const int32_t* label, int64_t first, int64_t end, int64_t channels) {
    for (int64_t at = first; at < end; ++at) {
      const T* from = x + offset(p, p.x, at);
      for (int64_t c = 0; c < channels; ++c) table[label[at] * p.columns + c] += widen(from + c * p.x.c, 1)[0];
    }
  }

  void piece(int64_t group, int64_t block, int64_t index) {
    const int64_t length = (p.classes + 1) * p.columns, channel = block * p.columns, all = p.group_images() * p.stretches;
    const int64_t channels = least(p.columns, p.channels - channel);
    __builtin_memset(total, 0, length * sizeof(A));
    for (int64_t i = all * index / p.pieces; i < all * (index + 1) / p.pieces; ++i) {
      const int64_t image = group + i / p.stretches, first = i % p.stretches * stretch;
      __builtin_memset(table, 0, length * sizeof(A));
      const int64_t end = least(p.pixels, first + stretch);
      const T* x = static_cast<const T*>(p.x.data) + image * p.x.n + channel * p.x.c;
      const int32_t* label = p.label.data() + image * p.pixels;
      if (pixels_in_a_row(p))
        add_turned(x, label, first, end, channels);
      else if (p.x.c == 1)
        add_rows(x, label, first, end, channels);
      else
        add_strided(x, label, first, end, channels);
      for (int64_t e = 0; e < length; e += L) store(total + e, load(total + e) + load(table + e));
    }
    A* out = static_cast<A*>(p.partial) + (index * p.groups + group) * p.classes * p.channels + channel;
    for (int64_t k = 0; k < p.classes; ++k)
      __builtin_memcpy(out + k * p.channels, total + k * p.columns, channels * sizeof(A));
  }
};

inline void sum(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  with_type(p.dtype, [&]<typename T>() {
    Arena arena{nullptr};
    (void)Summing<T>(p, arena);
    arena = {scratch.zeroed(arena.used)};
    if (!arena.base) return;
    Summing<T> summing(p, arena);
    for (int64_t i = begin; i < end; ++i)
      summing.piece(i / p.pieces / p.blocks, i / p.pieces % p.blocks, i % p.pieces);
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
