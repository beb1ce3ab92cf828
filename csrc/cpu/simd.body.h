// Vectors, elementary functions and dtype conversion for one instruction set. Included by for_each_isa.h only.

using int64_t = ::int64_t;

template <typename A>
struct Simd;  // A: the type sums run in

template <>
struct Simd<float> {
  typedef float vec __attribute__((vector_size(SEGOPS_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(SEGOPS_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(SEGOPS_VECTOR_BYTES)));
  static constexpr int lanes = SEGOPS_VECTOR_BYTES / 4;
  static constexpr int exp_terms = 7, log_terms = 5, mantissa = 23, bias = 127;
  static constexpr float round_magic = 12582912.0f, exp_min = -87.0f;  // 1.5 * 2^23
  static constexpr float ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f, log2e = 0x1.715476p0f;
};

template <>
struct Simd<double> {
  typedef double vec __attribute__((vector_size(SEGOPS_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(SEGOPS_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(SEGOPS_VECTOR_BYTES)));
  static constexpr int lanes = SEGOPS_VECTOR_BYTES / 8;
  static constexpr int exp_terms = 13, log_terms = 11, mantissa = 52, bias = 1023;
  static constexpr double round_magic = 6755399441055744.0, exp_min = -708.0;  // 1.5 * 2^52
  static constexpr double ln2_hi = 0x1.62e42fefa38p-1, ln2_lo = 0x1.ef35793c7673p-45, log2e = 0x1.71547652b82fep0;
};

template <typename A>
using Vec = typename Simd<A>::vec;

template <typename A>
[[gnu::always_inline]] inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::loose*>(p);
}
template <typename A>
[[gnu::always_inline]] inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Simd<A>::loose*>(p) = v;
}

// exp(x) for x below about 80; 0 below exp_min, NaN for NaN. Taylor series on |r| <= ln(2) / 2: within 2 ulp.
template <typename A>
[[gnu::always_inline]] inline Vec<A> vexp(Vec<A> x) {
  using S = Simd<A>;
  const Vec<A> floor = Vec<A>{} + S::exp_min;
  const auto tiny = x < floor;
  x = tiny ? floor : x;
  const Vec<A> shifted = x * S::log2e + S::round_magic;
  const Vec<A> n = shifted - S::round_magic;
  const Vec<A> r = (x - n * S::ln2_hi) - n * S::ln2_lo;
  A factorial = 1;
  for (int k = 2; k <= S::exp_terms; ++k) factorial *= k;
  Vec<A> p = Vec<A>{} + 1 / factorial;
#pragma GCC unroll 16
  for (int k = S::exp_terms; k >= 1; --k) {
    factorial /= k;
    p = p * r + 1 / factorial;
  }
  const auto power = (__builtin_bit_cast(typename S::bits, shifted) + S::bias) << S::mantissa;  // 2^n
  p *= __builtin_bit_cast(Vec<A>, power);
  return tiny ? Vec<A>{} : p;
}

// log(x) for finite normal x > 0; NaN for NaN.
template <typename A>
[[gnu::always_inline]] inline Vec<A> vlog(Vec<A> x) {
  using S = Simd<A>;
  using B = typename S::bits;
  const B bits = __builtin_bit_cast(B, x);
  const B half = __builtin_bit_cast(B, Vec<A>{} + A(0.70710678118654752));
  const B exponent = (bits - half) >> S::mantissa;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const Vec<A> m = __builtin_bit_cast(Vec<A>, bits - (exponent << S::mantissa));
  const Vec<A> e = __builtin_convertvector(exponent, Vec<A>);
  const Vec<A> s = (m - 1) / (m + 1), s2 = s * s;
  Vec<A> p = Vec<A>{} + A(1) / (2 * S::log_terms + 1);
#pragma GCC unroll 16
  for (int k = S::log_terms - 1; k >= 0; --k) p = p * s2 + A(1) / (2 * k + 1);
  const Vec<A> y = e * S::ln2_hi + (e * S::ln2_lo + 2 * s * p);
  return x != x ? x : y;
}

// Storage types to and from the type sums run in, a vector at a time. Half precision goes by bit arithmetic, which every
// instruction set has; headeronly's conversions do not vectorise.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <typename T>
struct Sum { using type = float; };
template <>
struct Sum<double> { using type = double; };

using Floats = Vec<float>;
typedef uint32_t Words __attribute__((vector_size(SEGOPS_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(SEGOPS_VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(SEGOPS_VECTOR_BYTES / 2), aligned(2), may_alias));

[[gnu::always_inline]] inline Vec<float> widen(const float* p) { return load(p); }
[[gnu::always_inline]] inline Vec<double> widen(const double* p) { return load(p); }
[[gnu::always_inline]] inline Floats widen(const bf16* p) {
  const Halves h = *reinterpret_cast<const LooseHalves*>(p);
  return __builtin_bit_cast(Floats, __builtin_convertvector(h, Words) << 16);
}
[[gnu::always_inline]] inline Floats widen(const fp16* p) {
  const Halves h = *reinterpret_cast<const LooseHalves*>(p);
  const Words u = __builtin_convertvector(h, Words), magnitude = (u & 0x7fff) << 13;
  const Words value = __builtin_bit_cast(Words, __builtin_bit_cast(Floats, magnitude) * 0x1p112f);
  const Words special = magnitude >= 0x0f800000u ? Words{} + 0x7f800000u : Words{};  // infinity, NaN
  return __builtin_bit_cast(Floats, value | special | (u & 0x8000) << 16);
}

[[gnu::always_inline]] inline void narrow(Vec<float> x, float* p) { store(p, x); }
[[gnu::always_inline]] inline void narrow(Vec<double> x, double* p) { store(p, x); }
[[gnu::always_inline]] inline void narrow(Floats x, bf16* p) {
  const Words u = __builtin_bit_cast(Words, x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const Words r = (u & 0x7fffffff) > 0x7f800000u ? Words{} + 0x7fc0u : rounded;
  *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(r, Halves);
}
[[gnu::always_inline]] inline void narrow(Floats x, fp16* p) {
  const Words sign = __builtin_bit_cast(Words, x) >> 16 & 0x8000, u = __builtin_bit_cast(Words, x) & 0x7fffffff;
  const Words normal = (u + 0xc8000fffu + (u >> 13 & 1)) >> 13;
  const Words small = __builtin_bit_cast(Words, __builtin_bit_cast(Floats, u) + 0.5f) - 0x3f000000u;
  Words r = u < 0x38800000u ? small : normal;
  r = u >= 0x477ff000u ? Words{} + 0x7c00u : r;
  r = u > 0x7f800000u ? Words{} + 0x7e00u : r;
  *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(r | sign, Halves);
}

// The same for the first `count` of a vector's elements; the others read as 0 and are not written.
template <typename T>
[[gnu::always_inline]] inline auto widen(const T* p, int64_t count) {
  T full[SEGOPS_VECTOR_BYTES / sizeof(typename Sum<T>::type)] = {};
  __builtin_memcpy(full, p, count * sizeof(T));
  return widen(static_cast<const T*>(full));
}
template <typename T, typename V>
[[gnu::always_inline]] inline void narrow(V x, T* p, int64_t count) {
  T full[SEGOPS_VECTOR_BYTES / sizeof(typename Sum<T>::type)];
  narrow(x, static_cast<T*>(full));
  __builtin_memcpy(p, full, count * sizeof(T));
}

template <typename A, bool High>
[[gnu::always_inline]] inline Vec<A> zip(Vec<A> a, Vec<A> b) {  // a0 b0 a1 b1 ..., its low or its high half
  constexpr int L = Simd<A>::lanes;
  typename Simd<A>::bits order = {};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) order[i] = i / 2 + (i % 2) * L + (High ? L / 2 : 0);
  return __builtin_shuffle(a, b, order);
}

// rows[i][j] <-> rows[j][i] of a square of vectors: log2(lanes) rounds of zipping row i with row i + lanes / 2.
template <typename A>
[[gnu::always_inline]] inline void transpose(Vec<A>* rows) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> next[L];
#pragma GCC unroll 4
  for (int width = 1; width < L; width *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = zip<A, false>(rows[i], rows[i + L / 2]);
      next[2 * i + 1] = zip<A, true>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}
