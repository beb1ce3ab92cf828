// What two cores can do at most: triad through memory, multiply-adds in registers, exponentials in the first cache.
// Compiled for the machine it runs on by _peaks.py; every function runs on `threads` threads and returns units per second.
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

template <typename Work>
double seconds(int threads, Work work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
  work(0);
  for (auto& thread : pool) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Sixteen independent sums hide the latency of the multiply-add on every x86 and aarch64 core of today.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4)));

}  // namespace

extern "C" {

// Bytes per second of a = b + s c: two arrays read, one written (the line that a plain store reads is not counted).
double triad(long elements, int threads) {
  float* a = static_cast<float*>(std::aligned_alloc(64, elements * 4));
  float* b = static_cast<float*>(std::aligned_alloc(64, elements * 4));
  float* c = static_cast<float*>(std::aligned_alloc(64, elements * 4));
  const long share = elements / threads / 64 * 64;
  auto fill = [&](int t) {
    for (long i = t * share; i < (t + 1) * share; ++i) a[i] = 0, b[i] = 1, c[i] = 2;
  };
  auto work = [&](int t) {
    float *pa = a + t * share, *pb = b + t * share, *pc = c + t * share;
    for (long i = 0; i < share; ++i) pa[i] = pb[i] + 3.0f * pc[i];
  };
  seconds(threads, fill);
  const double time = seconds(threads, work);
  std::free(a), std::free(b), std::free(c);
  return 12.0 * share * threads / time;
}

// Floating-point operations per second, two per multiply-add.
double multiply_add(long steps, int threads) {
  std::vector<float> sink(threads * 16);
  auto work = [&](int t) {
    Vector sum[16], factor, term;
    for (int l = 0; l < kLanes; ++l) factor[l] = 0.999f, term[l] = 1e-3f;
    for (int j = 0; j < 16; ++j) sum[j] = term * float(j);
    for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) sum[j] = sum[j] * factor + term;
    }
    for (int j = 1; j < 16; ++j) sum[0] += sum[j];
    sink[t * 16] = sum[0][0];
  };
  const double time = seconds(threads, work);
  volatile float keep = sink[0];
  (void)keep;
  return 2.0 * 16 * kLanes * double(steps) * threads / time;
}

// Exponentials per second over 4 KB, with the vector exp of the C library.
double exponential(long repeats, int threads) {
  constexpr int kSize = 1024;
  auto work = [&](int) {
    alignas(64) float in[kSize], out[kSize];
    for (int i = 0; i < kSize; ++i) in[i] = -8.0f * i / kSize;
    for (long r = 0; r < repeats; ++r) {
      for (int i = 0; i < kSize; ++i) out[i] = std::exp(in[i]);
      asm volatile("" : : "r"(out) : "memory");
    }
  };
  return double(repeats) * kSize * threads / seconds(threads, work);
}
}
