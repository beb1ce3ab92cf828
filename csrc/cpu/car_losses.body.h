// The pixel losses of class-aware regularisation for one instruction set; see car_losses.cpp.
#include "cpu/class_rows.body.h"

template <typename T>
struct Pixels {
  using A = typename Sum<T>::type;
  static constexpr int L = Simd<A>::lanes;
  static constexpr int64_t P = tile_pixels;

  const Problem& p;
  A *x, *energy, *part;  // [channels][P], [classes][P], backward: [depth][P]
  alignas(64) int32_t label[P];

  Pixels(const Problem& p, Arena& arena)
      : p(p), x(arena.take<A>(round_up(p.channels, L) * P)), energy(arena.take<A>(p.classes * P)),
        part(p.grad_x.data ? arena.take<A>(depth * P) : nullptr) {}

  // Reads a tile, and its E but for the own classes'.
  Span read(int64_t image, int64_t tile) {
    const Span at(p, tile);
    read_tile(p.labels, image, at.first, at.count, label, p.wrong);
    pack<T>(p, p.x, image, at, x);
    const A* rows = scaled(image);
    for (int64_t c = 0; c < p.channels; c += depth) {
      const int64_t channels = least(depth, p.channels - c);
      if (c == 0)
        product<false>(energy, P, rows, p.scaled_row, int64_t(1), x, P, p.classes, channels, P);
      else
        product<true>(energy, P, rows + c, p.scaled_row, int64_t(1), x + c * P, P, p.classes, channels, P);
    }
    return at;
  }

  const A* centers(int64_t image) const { return static_cast<const A*>(p.centers) + image * p.centers_step; }
  int64_t group(int64_t image) const { return p.centers_step ? image : 0; }
  const A* scaled(int64_t image) const {
    return static_cast<const A*>(p.scaled) + group(image) * p.classes * p.scaled_row;
  }

  // sum of |mu_y - x| over counted pixels and all channels.
  double distance(const A* mu) const {
    Vec<double> total = {};
    for (int64_t e = 0; e < P; e += L) {
      Vec<A> sum = {};
      for (int64_t c = 0; c < p.channels; c += L) {
        Vec<A> own[L];
        class_rows<A>(mu + c, p.channels, label + e, p.channels - c, own);
        const int64_t channels = least(L, p.channels - c);
        if (channels == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) sum += magnitude(own[i] - load(x + (c + i) * P + e));
        } else {
          for (int64_t i = 0; i < channels; ++i) sum += magnitude(own[i] - load(x + (c + i) * P + e));
        }
      }
      for (int j = 0; j < L; ++j) total[j % Simd<double>::lanes] += label[e + j] < 0 ? 0 : double(sum[j]);
    }
    double sum = 0;
    for (int j = 0; j < Simd<double>::lanes; ++j) sum += total[j];
    return sum;
  }

  [[gnu::always_inline]] static Vec<A> magnitude(Vec<A> v) { return v < 0 ? -v : v; }

  void losses(int64_t image, int64_t tile, double* sums) {
    const Span at = read(image, tile);
    sums[0] = distance(centers(image));
    const A* own = static_cast<const A*>(p.own) + group(image) * p.classes;
    for (int64_t e = 0; e < P; ++e)
      if (label[e] >= 0) energy[label[e] * P + e] = own[label[e]];
    const A threshold = A(p.threshold), low = A(1e-7), high = A(1 - 1e-7);
    alignas(64) A lse[P], inner[P];
    sums[1] = 0;
    for (int64_t e = 0; e < P; e += L) {
      Vec<A> top = load(energy + e), sum = {}, excess = {}, above = {};
      for (int64_t k = 1; k < p.classes; ++k) {
        const Vec<A> value = load(energy + k * P + e);
        top = value > top ? value : top;
      }
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> value = vexp<A>(load(energy + k * P + e) - top);
        sum += value;
        store(energy + k * P + e, value);
      }
      for (int64_t j = e; j < e + L; ++j)
        if (label[j] >= 0) energy[label[j] * P + j] = 0;
      const Vec<A> inverse = 1 / sum;
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> share = load(energy + k * P + e) * inverse;
        excess += share <= threshold ? Vec<A>{} : share - threshold;  // this way round, NaN stays
        above += share <= threshold ? Vec<A>{} : share;
      }
      store(lse + e, top + vlog<A>(sum));
      for (int64_t j = 0; j < least(L, at.count - e); ++j) {
        const A value = excess[j];
        const bool counts = label[e + j] >= 0 || !p.mask_ignored;
        if (counts) sums[1] += double(value < low ? low : value > high ? high : value);
        inner[e + j] = counts && !(value < low || value > high) ? above[j] : A(-1);
      }
    }
    const int64_t offset = image * p.pixels + at.first;
    __builtin_memcpy(static_cast<A*>(p.lse) + offset, lse, at.count * sizeof(A));
    __builtin_memcpy(static_cast<A*>(p.inner) + offset, inner, at.count * sizeof(A));
  }

  // energy becomes d c2p / dE.
  void energy_gradient(int64_t image, Span at) {
    alignas(64) A lse[P], inner[P], sums[P];
    const int64_t offset = image * p.pixels + at.first;
    for (int64_t e = 0; e < P; ++e) lse[e] = 0, inner[e] = A(-1);
    __builtin_memcpy(lse, static_cast<const A*>(p.lse) + offset, at.count * sizeof(A));
    __builtin_memcpy(inner, static_cast<const A*>(p.inner) + offset, at.count * sizeof(A));
    const A* own = static_cast<const A*>(p.own) + group(image) * p.classes;
    for (int64_t e = 0; e < P; ++e)
      if (label[e] >= 0) energy[label[e] * P + e] = own[label[e]];
    const A threshold = A(p.threshold), grad = A(p.grad_c2p);
    for (int64_t e = 0; e < P; e += L) {
      Vec<A> sum = {};  // 1 but for the rounding of lse
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> value = vexp<A>(load(energy + k * P + e) - load(lse + e));
        sum += value;
        store(energy + k * P + e, value);
      }
      store(sums + e, sum);
    }
    for (int64_t e = 0; e < P; ++e)
      if (label[e] >= 0) energy[label[e] * P + e] = 0;
    for (int64_t e = 0; e < P; e += L) {
      const Vec<A> mean = load(inner + e), inverse = 1 / load(sums + e);
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> share = load(energy + k * P + e) * inverse;
        store(energy + k * P + e, mean < 0 ? Vec<A>{} : grad * share * (share > threshold ? 1 - mean : -mean));
      }
    }
  }

  void gradients(int64_t image, int64_t tile) {
    const Span at = read(image, tile);
    energy_gradient(image, at);
    const A *mu = centers(image), *rows = scaled(image);
    const A* sums = p.grad_sums ? static_cast<const A*>(p.grad_sums) + image * p.grad_sums_step : nullptr;
    for (int64_t c = 0; c < p.channels; c += depth) {
      const int64_t channels = least(depth, p.channels - c);
      product<false>(part, P, rows + c, int64_t(1), p.scaled_row, energy, P, channels, p.classes, P);
      for (int64_t e = 0; e < P; e += L) {
        Vec<A> pull, unknown;
        for (int j = 0; j < L; ++j) {
          pull[j] = label[e + j] < 0 ? A(0) : A(p.grad_intra);
          unknown[j] = label[e + j] < 0 ? A(0) : A(__builtin_nan(""));
        }
        for (int64_t b = 0; b < channels; b += L) {
          const int64_t count = least(L, channels - b);
          Vec<A> own[L];
          class_rows<A>(mu + c + b, p.channels, label + e, p.channels - c - b, own);
          A *to = x + (c + b) * P + e, *from = part + b * P + e;
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            if (i >= count) break;
            const Vec<A> difference = load(to + i * P) - own[i];
            const Vec<A> none = difference == 0 ? pull * 0 : unknown;
            store(to + i * P, load(from + i * P) + (difference > 0 ? pull : difference < 0 ? -pull : none));
          }
          if (!sums) continue;
          class_rows<A>(sums + c + b, p.channels, label + e, p.channels - c - b, own);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            if (i >= count) break;
            store(to + i * P, load(to + i * P) + own[i]);
          }
        }
      }
    }
    unpack<T>(p, x, p.grad_x, image, at);
  }
};

// Rows begin .. end-1 of the centers.
inline void scale(const Problem& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<typename T>() {
    using A = typename Sum<T>::type;
    const A factor = A(1 / __builtin_sqrt(double(p.channels)));
    for (int64_t k = begin; k < end; ++k) {
      const A* from = static_cast<const A*>(p.centers) + k * p.channels;
      A* to = static_cast<A*>(p.scaled) + k * p.scaled_row;
      double square = 0;
      for (int64_t c = 0; c < p.channels; ++c) to[c] = from[c] * factor, square += double(from[c]) * from[c];
      static_cast<A*>(p.own)[k] = A(square / __builtin_sqrt(double(p.channels)));
    }
  });
}

template <typename Each>
[[gnu::always_inline]] inline void for_tiles(const Problem& p, int64_t begin, int64_t end, Scratch& scratch,
                                             Each each) {
  with_type(p.dtype, [&]<typename T>() {
    Arena arena{nullptr};
    (void)Pixels<T>(p, arena);
    arena = {scratch.zeroed(arena.used)};
    if (!arena.base) return;
    Pixels<T> pixels(p, arena);
    for (int64_t i = begin; i < end; ++i) each(pixels, i);
  });
}

inline void losses(const Problem& p, int64_t begin, int64_t end, Scratch& scratch, double* sums) {
  for_tiles(p, begin, end, scratch, [&](auto& pixels, int64_t i) { pixels.losses(i / p.tiles, i % p.tiles, sums + 2 * i); });
}

inline void gradients(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  for_tiles(p, begin, end, scratch, [&](auto& pixels, int64_t i) { pixels.gradients(i / p.tiles, i % p.tiles); });
}
