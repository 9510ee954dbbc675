// Types, 16-byte accesses and reductions that the kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

#include "ptx.cuh"

#define MEGAPRE_EXPORT extern "C" __attribute__((visibility("default")))

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Element types in the C interface.
enum Type { FP32 = 0, BF16 = 1, FP16 = 2 };

constexpr uint32_t ALL = 0xFFFFFFFFu;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(fp16 x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float& y, float x) { y = x; }
__device__ __forceinline__ void narrow(bf16& y, float x) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(fp16& y, float x) { y = __float2half_rn(x); }

// Elements of T in 16 bytes.
template <class T>
constexpr int LANES = 16 / (int)sizeof(T);

// N elements of T as they lie in memory: 16 bytes (one load), or one element where alignment or width forbid more.
template <class T, int N>
struct alignas(N * sizeof(T)) Raw {
  T element[N];
};

template <class T, int N>
__device__ __forceinline__ Raw<T, N> load(const T* p) {
  return *reinterpret_cast<const Raw<T, N>*>(p);
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, const Raw<T, N>& raw) {
  *reinterpret_cast<Raw<T, N>*>(p) = raw;
}

template <class T, int N>
__device__ __forceinline__ Raw<T, N> zeros() {
  Raw<T, N> raw;
#pragma unroll
  for (int k = 0; k < N; k++) narrow(raw.element[k], 0.0f);
  return raw;
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Raw<T, N>& raw, float (&wide)[N]) {
#pragma unroll
  for (int k = 0; k < N; k++) wide[k] = widen(raw.element[k]);
}

// Two elements a conversion where the type has one for pairs.
__device__ __forceinline__ void narrow2(bf16* y, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(y) = __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ void narrow2(fp16* y, float a, float b) {
  *reinterpret_cast<__half2*>(y) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void narrow2(float* y, float a, float b) { y[0] = a, y[1] = b; }

template <int N, class T>
__device__ __forceinline__ Raw<T, N> pack(const float (&wide)[N], T) {
  Raw<T, N> raw;
  if constexpr (N == 1) {
    narrow(raw.element[0], wide[0]);
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 2) narrow2(&raw.element[k], wide[k], wide[k + 1]);
  }
  return raw;
}

template <class T, int N>
__device__ __forceinline__ void load_wide(const T* p, float (&wide)[N]) {
  if constexpr (N == 1 || N * sizeof(T) == 16) {
    unpack(load<T, N>(p), wide);
  } else {  // N weights of a wider type than the activations
    constexpr int M = LANES<T>;
#pragma unroll
    for (int j = 0; j < N; j += M) {
      const Raw<T, M> raw = load<T, M>(p + j);
#pragma unroll
      for (int k = 0; k < M; k++) wide[j + k] = widen(raw.element[k]);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void store_narrow(T* p, const float (&wide)[N]) {
  store<T, N>(p, pack(wide, T()));
}

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class F>
__device__ __forceinline__ float warp_reduce(float x, F f) {
#pragma unroll
  for (int distance = 16; distance; distance >>= 1) x = f(x, __shfl_xor_sync(ALL, x, distance));
  return x;
}

// Reduce over a block of whole warps, result in every thread. `shared` holds 32 floats; a caller that uses one array
// twice puts a barrier between. Its order is fixed, so runs agree bit for bit.
template <class F>
__device__ __forceinline__ float block_reduce(float x, float* shared, float neutral, F f) {
  const int lane = threadIdx.x % 32;
  x = warp_reduce(x, f);
  if (lane == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = lane < (int)(blockDim.x / 32) ? shared[lane] : neutral;
  return warp_reduce(x, f);
}

inline bool aligned(const void* p, int bytes = 16) { return (uintptr_t)p % bytes == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
