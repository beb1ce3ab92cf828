// Element types: what they are summed in, their conversions, and 16-byte accesses.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/launch.h"

namespace segops {

// float16 or bfloat16: a kernel differs between the two only where it loads and stores, and deciding there, once per 16
// bytes, halves what has to be compiled.
struct Bits16 {
  uint16_t bits;
};

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// `bfloat16` says what Bits16 are.
template <typename T>
__device__ __forceinline__ Accumulator<T> accumulator(T x, bool bfloat16) {
  if constexpr (std::is_same_v<T, Bits16>)
    return bfloat16 ? __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{x.bits}))
                    : __half2float(__half(__half_raw{x.bits}));
  else
    return x;
}

template <typename T>
__device__ __forceinline__ T rounded(Accumulator<T> x, bool bfloat16) {
  if constexpr (std::is_same_v<T, Bits16>)
    return {bfloat16 ? __nv_bfloat16_raw(__float2bfloat16_rn(x)).x : __half_raw(__float2half_rn(x)).x};
  else
    return x;
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return ::exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return ::log(x); }

// 16 bytes of consecutive elements.
template <typename T>
inline constexpr int vector_length = 16 / sizeof(T);

template <typename T>
struct Vector {
  T at[vector_length<T>];
};

template <typename T>
__host__ __device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* from) {
#ifndef __CUDACC__
  STD_TORCH_CHECK(aligned(from), "segops: a 16-byte load from an address that is not a multiple of 16");
#endif
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Vector<T> v;
  std::memcpy(&v, &bits, 16);
  return v;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T>& v) {
#ifndef __CUDACC__
  STD_TORCH_CHECK(aligned(to), "segops: a 16-byte store to an address that is not a multiple of 16");
#endif
  uint4 bits;
  std::memcpy(&bits, &v, 16);
  *reinterpret_cast<uint4*>(to) = bits;
}

template <typename T>
__device__ __forceinline__ void unpack(const Vector<T>& v, bool bfloat16, Accumulator<T> (&x)[vector_length<T>]) {
  if (bfloat16)
    SEGOPS_UNROLL for (int e = 0; e < vector_length<T>; ++e) x[e] = accumulator(v.at[e], true);
  else
    SEGOPS_UNROLL for (int e = 0; e < vector_length<T>; ++e) x[e] = accumulator(v.at[e], false);
}

template <typename T>
__device__ __forceinline__ Vector<T> pack(const Accumulator<T> (&x)[vector_length<T>], bool bfloat16) {
  Vector<T> v;
  if (bfloat16)
    SEGOPS_UNROLL for (int e = 0; e < vector_length<T>; ++e) v.at[e] = rounded<T>(x[e], true);
  else
    SEGOPS_UNROLL for (int e = 0; e < vector_length<T>; ++e) v.at[e] = rounded<T>(x[e], false);
  return v;
}

// Calls function(T{}), T what elements of a floating-point dtype are stored as.
template <typename Function>
void for_dtype(torch::headeronly::ScalarType dtype, Function function) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Half:
    case torch::headeronly::ScalarType::BFloat16: return function(Bits16{});
    case torch::headeronly::ScalarType::Float: return function(float{});
    case torch::headeronly::ScalarType::Double: return function(double{});
    default: STD_TORCH_CHECK(false, "segops: unsupported dtype");
  }
}

}  // namespace segops
