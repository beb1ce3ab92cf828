// What the upsampling kernels share: the pixels they work on, rows of logits as planes, and powers of two.

#include "cpu/arena.body.h"

constexpr double ln2 = 0.69314718055994531, log2e = 1.4426950408889634;

// 2^x for |x| <= 125 and NaN: a minimax polynomial on |f| <= 1/2, within 1.4 ulp. For double the series of vexp.
[[gnu::always_inline]] inline Vec<float> vexp2(Vec<float> x) {
  using S = Simd<float>;
  const Vec<float> shifted = x + S::round_magic, f = x - (shifted - S::round_magic);
  Vec<float> p = f * 0x1.470b4ap-13f + 0x1.5f7276p-10f;
  p = p * f + 0x1.3b270ep-7f;
  p = p * f + 0x1.c6ae72p-5f;
  p = p * f + 0x1.ebfbe2p-3f;
  p = p * f + 0x1.62e432p-1f;
  p = p * f + 1.0f;
  const auto power = __builtin_bit_cast(typename S::bits, shifted) << S::mantissa;
  return __builtin_bit_cast(Vec<float>, __builtin_bit_cast(typename S::bits, p) + power);
}
[[gnu::always_inline]] inline Vec<double> vexp2(Vec<double> x) { return vexp<double>(x * ln2); }

// The same for any x: 0 far below.
template <typename A>
[[gnu::always_inline]] inline Vec<A> vexp2_any(Vec<A> x) {
  const auto tiny = x < Vec<A>{} - 120;
  const Vec<A> y = vexp2(tiny ? Vec<A>{} : x);
  return tiny ? Vec<A>{} : x != x ? x : y;
}

template <typename A>
[[gnu::always_inline]] inline Vec<A> blend(Vec<A> a, Vec<A> b, Vec<A> weight) {
  return a * (1 - weight) + b * weight;
}

inline float scalar(float x) { return x; }
inline double scalar(double x) { return x; }
inline float scalar(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline float scalar(fp16 x) { return widen(&x, 1)[0]; }

// out[k][x] = pixel x of class k, whole vectors of pixels: the last is filled up with zeros. What lies `ahead` elements
// further on, the next row, is fetched on the way.
template <typename T, typename A>
void load_planes(const T* in, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t count, A* out,
                 int64_t stride, int64_t ahead) {
  constexpr int L = Simd<A>::lanes;
  if (pixel_stride == 1) {
    for (int64_t k = 0; k < classes; ++k) {
      const T* from = in + k * class_stride;
      int64_t x = 0;
      for (; x + L <= count; x += L) {
        __builtin_prefetch(from + ahead + x, 0, 2);
        store(out + k * stride + x, widen(from + x));
      }
      if (x < count) store(out + k * stride + x, widen(from + x, count - x));
    }
  } else if (class_stride == 1) {
    for (int64_t x = 0; x < count; x += L) {
      const int64_t last = least(L, count - x) - 1;
      for (int64_t k = 0; k < classes; k += L) {
        const int64_t rows = least(L, classes - k);
        const T* from = in + x * pixel_stride + k;
        Vec<A> square[L];
        if (rows == L && last == L - 1) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            __builtin_prefetch(from + ahead + i * pixel_stride, 0, 2);
            square[i] = widen(from + i * pixel_stride);
          }
        } else {
          for (int i = 0; i < L; ++i) square[i] = i <= last ? widen(from + i * pixel_stride, rows) : Vec<A>{};
        }
        transpose<A>(square);
        for (int i = 0; i < rows; ++i) store(out + (k + i) * stride + x, square[i]);
      }
    }
  } else {
    for (int64_t k = 0; k < classes; ++k)
      for (int64_t x = 0; x < round_up(count, L); ++x)
        out[k * stride + x] = x < count ? scalar(in[k * class_stride + x * pixel_stride]) : 0;
  }
}

// The other way; `in` has room for whole vectors.
template <typename T, typename A>
void store_planes(const A* in, int64_t stride, int64_t classes, int64_t count, T* out, int64_t class_stride,
                  int64_t pixel_stride, int64_t ahead) {
  constexpr int L = Simd<A>::lanes;
  if (pixel_stride == 1) {
    for (int64_t k = 0; k < classes; ++k) {
      T* to = out + k * class_stride;
      int64_t x = 0;
      for (; x + L <= count; x += L) {
        __builtin_prefetch(to + ahead + x, 1, 2);
        narrow(load(in + k * stride + x), to + x);
      }
      if (x < count) narrow(load(in + k * stride + x), to + x, count - x);
    }
  } else if (class_stride == 1) {
    for (int64_t x = 0; x < count; x += L) {
      const int64_t pixels = least(L, count - x);
      for (int64_t k = 0; k < classes; k += L) {
        const int64_t rows = least(L, classes - k);
        Vec<A> square[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) square[i] = load(in + (k + least(i, rows - 1)) * stride + x);
        transpose<A>(square);
        T* to = out + x * pixel_stride + k;
        if (pixels == L && rows == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            __builtin_prefetch(to + ahead + i * pixel_stride, 1, 2);
            narrow(square[i], to + i * pixel_stride);
          }
        } else {
          for (int i = 0; i < pixels; ++i) narrow(square[i], to + i * pixel_stride, rows);
        }
      }
    }
  } else {
    for (int64_t k = 0; k < classes; ++k)
      for (int64_t x = 0; x < count; ++x)
        narrow(Vec<A>{} + in[k * stride + x], out + k * class_stride + x * pixel_stride, 1);
  }
}

// Vectors of as many elements of another type as a vector of sums has.
template <typename E, int Lanes>
struct Pack {
  typedef E vec __attribute__((vector_size(Lanes * sizeof(E))));
  typedef E loose __attribute__((vector_size(Lanes * sizeof(E)), aligned(sizeof(E)), may_alias));
  static vec at(const E* p) { return *reinterpret_cast<const loose*>(p); }
  static void put(E* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
};
template <typename A>
using Ints = typename Pack<int32_t, Simd<A>::lanes>::vec;

// from[index] of each lane. Compilers tuning for no machine in particular do not take the instruction by themselves.
template <typename E, typename Index>
[[gnu::always_inline]] inline auto gather(const E* from, Index index) {
  constexpr int lanes = sizeof(Index) / sizeof(int32_t);
  typename Pack<E, lanes>::vec out;
#if SEGOPS_X86_ISAS && SEGOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(E) == 4 && lanes == 16)
    return __builtin_bit_cast(decltype(out), _mm512_mask_i32gather_epi32(
                                                 __m512i{}, 0xffff, __builtin_bit_cast(__m512i, index), from, 4));
#elif SEGOPS_X86_ISAS && SEGOPS_VECTOR_BYTES == 32
  if constexpr (sizeof(E) == 4 && lanes == 8)
    return __builtin_bit_cast(decltype(out), _mm256_i32gather_epi32(reinterpret_cast<const int*>(from),
                                                                    __builtin_bit_cast(__m256i, index), 4));
#endif
  for (int i = 0; i < lanes; ++i) out[i] = from[index[i]];
  return out;
}

template <int Bytes>
struct Integer { using type = int32_t; };
template <>
struct Integer<8> { using type = int64_t; };

// N vectors, one per phase, to the pixels of their items one after another, and back.
template <int N, int Lanes, typename V>
[[gnu::always_inline]] inline void interleave(V* rows) {
  using Order = typename Integer<sizeof(rows[0][0])>::type;
  typename Pack<Order, Lanes>::vec low, high;
  for (int i = 0; i < Lanes; ++i) {
    low[i] = i / 2 + i % 2 * Lanes;
    high[i] = low[i] + Lanes / 2;
  }
  V next[N];
#pragma GCC unroll 4
  for (int width = 1; width < N; width *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + N / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + N / 2], high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) rows[i] = next[i];
  }
}
template <int N, int Lanes, typename V>
[[gnu::always_inline]] inline void deinterleave(V* rows) {
  using Order = typename Integer<sizeof(rows[0][0])>::type;
  typename Pack<Order, Lanes>::vec even, odd;
  for (int i = 0; i < Lanes; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  V next[N];
#pragma GCC unroll 4
  for (int width = 1; width < N; width *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      next[i] = __builtin_shuffle(rows[2 * i], rows[2 * i + 1], even);
      next[i + N / 2] = __builtin_shuffle(rows[2 * i], rows[2 * i + 1], odd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) rows[i] = next[i];
  }
}

// What lies side by side in a vector. Upwards: the intervals of a row; each holds up to `phases` output pixels, the
// logits of which run linearly between its two columns. Downwards: the output pixels, one per item, each with two
// columns of its own that are fetched into planes of their own.
template <typename A>
struct Items {
  static constexpr int L = Simd<A>::lanes;
  const Line* line;
  bool upwards;
  int64_t phases, chunk;         // of which a pass takes `chunk`
  int64_t room;                  // items that fit
  int64_t width, right, stride;  // of a plane of items; from an item's left column to its right one; between classes
  int64_t begin = 0, count = 0, pixel_begin = 0, pixels = 0, column_begin = 0, columns = 0;
  bool regular = false;          // phase i of item j is pixel j * phases + i - lead
  int64_t lead = 0;
  // [padded_phases][width]: the pixel, -1 for none, and the weights of its columns, 0 for none.
  int32_t* pixel;
  A *left_share, *right_share, *shares;  // shares: both, side by side
  A* start;                              // [width] weight of the right column at the first pixel

  Items() = default;
  Items(const Line& along, int64_t room)
      : line(&along), upwards(line->in <= line->out), phases(upwards ? line->longest : 1), chunk(chunks(phases)),
        room(least(room, items())) {
    width = round_up(this->room, L) + L;  // whole vectors, and the right columns of the last
    if (width / L % 2 == 0) width += L;   // rows a multiple of a page apart would share cache sets
    right = upwards ? 1 : width;
    stride = upwards ? width : 2 * width;
  }
  static int64_t chunks(int64_t phases) {
    const int64_t passes = (phases + 7) / 8;
    return (phases + passes - 1) / passes;
  }
  int64_t padded_phases() const { return round_up(phases, chunk); }
  int64_t items() const { return upwards ? line->in + 1 : line->out; }
  void take(Arena& arena) {
    const int64_t places = padded_phases() * width;
    pixel = arena.take<int32_t>(places);
    left_share = arena.template take<A>(places), right_share = arena.template take<A>(places);
    shares = arena.template take<A>(2 * places), start = arena.template take<A>(width);
  }
  int64_t left_column(int64_t item) const { return most(0, (upwards ? item : line->interval[item]) - 1); }
  int64_t right_column(int64_t item) const { return least(line->in - 1, upwards ? item : line->interval[item]); }

  void set(int64_t from, int64_t to) {
    begin = from, count = to - from;
    regular = chunk == phases && (phases & (phases - 1)) == 0, lead = 0;
    if (count == 0) return;
    column_begin = left_column(from), columns = right_column(to - 1) + 1 - column_begin;
    pixel_begin = upwards ? line->first[from] : from;
    pixels = (upwards ? line->first[to] : to) - pixel_begin;
    for (int64_t j = 0; j < width; ++j) {
      const bool real = j < count;
      const int64_t first = real ? (upwards ? line->first[from + j] : from + j) - pixel_begin : 0;
      const int64_t held = real ? (upwards ? line->first[from + j + 1] - line->first[from + j] : 1) : 0;
      // The logits of interval 0 are constant: its pixels may stand at any phase.
      const int64_t shift = upwards && from + j == 0 ? phases - held : 0;
      if (j == 0) lead = shift;
      start[j] = held ? A(line->weight[pixel_begin + first]) : 0;
      for (int64_t i = 0; i < padded_phases(); ++i) {
        const int64_t at = i * width + j, x = first + i - shift;
        const bool one = i >= shift && i < shift + held;
        pixel[at] = one ? static_cast<int32_t>(x) : -1;
        left_share[at] = one ? A(1 - line->weight[pixel_begin + x]) : 0;
        right_share[at] = one ? A(line->weight[pixel_begin + x]) : 0;
        shares[2 * at] = left_share[at], shares[2 * at + 1] = right_share[at];
        regular &= !one || x == j * phases + i - lead;
      }
    }
  }

  // out[e] = row[pixel * pixel_stride] at phase i + e of items j ... j + L - 1, `none` where there is no pixel.
  template <int N, typename E>
  void by_item(const E* row, int64_t pixel_stride, int64_t j, int64_t i, E none,
               typename Pack<E, L>::vec* out) const {
    using P = Pack<E, L>;
    if (!regular) {
      for (int e = 0; e < N; ++e) {
        const Ints<A> x = Pack<int32_t, L>::at(pixel + (i + e) * width + j);
        out[e] = gather(row, (x > 0 ? x : 0) * static_cast<int32_t>(pixel_stride));
        for (int l = 0; l < L; ++l)
          if (x[l] < 0) out[e][l] = none;
      }
      return;
    }
    const int64_t first = j * N - lead;
    E edge[N * L];
    if (first < 0 || first + N * L > pixels || pixel_stride != 1) {
      for (int64_t x = 0; x < N * L; ++x) edge[x] = none;
      for (int64_t x = most(first, 0); x < least(first + N * L, pixels); ++x) edge[x - first] = row[x * pixel_stride];
      row = edge;
    } else {
      row += first;
    }
#pragma GCC unroll 8
    for (int e = 0; e < N; ++e) out[e] = P::at(row + e * L);
    if constexpr ((N & (N - 1)) == 0) deinterleave<N, L>(out);
  }

  // The way back.
  template <int N, typename E>
  void by_pixel(typename Pack<E, L>::vec* in, int64_t j, int64_t i, E* row, int64_t pixel_stride) const {
    using P = Pack<E, L>;
    if (!regular) {
      for (int e = 0; e < N; ++e)
        for (int l = 0; l < L; ++l) {
          const int64_t x = pixel[(i + e) * width + j + l];
          if (x >= 0) row[x * pixel_stride] = in[e][l];
        }
      return;
    }
    if constexpr ((N & (N - 1)) == 0) interleave<N, L>(in);
    const int64_t first = j * N - lead;
    if (first >= 0 && first + N * L <= pixels && pixel_stride == 1) {
#pragma GCC unroll 8
      for (int e = 0; e < N; ++e) P::put(row + first + e * L, in[e]);
      return;
    }
    for (int64_t x = most(first, 0); x < least(first + N * L, pixels); ++x)
      row[x * pixel_stride] = in[(x - first) / L][(x - first) % L];
  }

  // planes[k][stride] = the columns of all items, of one row of logits.
  template <typename T>
  void fetch(const T* row, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t ahead,
             A* planes) const {
    if (upwards) {
      const int64_t before = begin == 0 ? 1 : 0;
      load_planes(row + column_begin * pixel_stride, class_stride, pixel_stride, classes, columns, planes + before,
                  stride, ahead);
      for (int64_t k = 0; k < classes; ++k) {
        A* at = planes + k * stride;
        if (before) at[0] = at[1];
        at[count] = at[right_column(begin + count - 1) + 1 - begin];
        for (int64_t j = count + 1; j < width; ++j) at[j] = 0;
      }
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      const T* left = row + left_column(begin + j) * pixel_stride;
      const T* other = row + right_column(begin + j) * pixel_stride;
      for (int64_t k = 0; k < classes; ++k) {
        planes[k * stride + j] = scalar(left[k * class_stride]);
        planes[k * stride + right + j] = scalar(other[k * class_stride]);
      }
    }
  }
};

// Calls function.operator()<T>(), T what elements of a dtype that is summed in A are stored as.
template <typename A, typename Function>
[[gnu::always_inline]] inline void with_storage(DType dtype, Function function) {
  if constexpr (sizeof(A) == 8) {
    function.template operator()<double>();
  } else {
    switch (dtype) {
      case DType::bfloat16: return function.template operator()<bf16>();
      case DType::float16: return function.template operator()<fp16>();
      default: return function.template operator()<float>();
    }
  }
}

// Calls function.operator()<n>(), n from 1 to 8.
template <typename Function>
[[gnu::always_inline]] inline void with_phases(int64_t n, Function function) {
  switch (n) {
    case 1: return function.template operator()<1>();
    case 2: return function.template operator()<2>();
    case 3: return function.template operator()<3>();
    case 4: return function.template operator()<4>();
    case 5: return function.template operator()<5>();
    case 6: return function.template operator()<6>();
    case 7: return function.template operator()<7>();
    default: return function.template operator()<8>();
  }
}
