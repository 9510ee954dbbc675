// The part of CUDA's runtime header that csrc/cuda uses, for the SIMT tier: g++ finds this file in place of CUDA's, so
// that the .cu sources compile unchanged and no toolkit is needed. The machine behind it is engine.cpp.
#pragma once
#define MEGAPRE_SIMT 1

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

namespace simt {

// What a fiber may ask about itself; rewritten by the engine whenever it resumes one.
struct Current {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int lane;
};
extern Current current;

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t dynamic, void (*body)(void*), void* data);
void* dynamic_shared();
void* static_shared(const void* site, size_t bytes);
void sync_block(int line);
void sync_warp(unsigned mask, int line);
// Post `bytes` of this lane, meet the lanes of `mask`, and get the slots of the warp, 16 bytes a lane.
const unsigned char* exchange(unsigned mask, const void* value, size_t bytes, int line);
void pending_add(void* to, const void* from, int bytes);
void pending_commit();
// Next copy of the oldest group when more than `groups` are in flight; false when none has to land.
bool pending_take(int groups, void** to, const void** from, int* bytes);
bool copies_land_early();
[[noreturn]] void fail(const char* what, int line);
int last_error();
int device_limit();
int allow_dynamic(const void* kernel, int bytes);

template <class F>
inline void launch_any(const char* name, const void* kernel, dim3 grid, dim3 block, size_t dynamic, F body) {
  launch(name, kernel, grid, block, dynamic, [](void* data) { (*(F*)data)(); }, &body);
}

template <class T>
inline T lane_value(const unsigned char* slots, int lane) {
  T value;
  __builtin_memcpy(&value, slots + 16 * lane, sizeof value);
  return value;
}

}  // namespace simt

#define threadIdx (simt::current.thread)
#define blockIdx (simt::current.block)
#define blockDim (simt::current.block_size)
#define gridDim (simt::current.grid_size)

inline int cudaGetLastError() { return simt::last_error(); }
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = simt::device_limit(), 0; }
template <class K>
inline int cudaFuncSetAttribute(K kernel, cudaFuncAttribute, int bytes) {
  return simt::allow_dynamic((const void*)kernel, bytes);
}

inline void __syncthreads(int line = __builtin_LINE()) { simt::sync_block(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { simt::sync_warp(mask, line); }
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance, int = 32, int line = __builtin_LINE()) {
  const int lane = simt::current.lane;
  return simt::lane_value<T>(simt::exchange(mask, &value, sizeof value, line), lane ^ distance);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::current.lane;
  return simt::lane_value<T>(simt::exchange(mask, &value, sizeof value, line), lane / width * width + source % width);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::current.lane, inside = lane % width + delta < width;
  return simt::lane_value<T>(simt::exchange(mask, &value, sizeof value, line), inside ? lane + delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const unsigned char* slots = simt::exchange(mask, &predicate, sizeof predicate, line);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) bits |= (unsigned)(simt::lane_value<int>(slots, lane) != 0) << lane;
  return bits;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T>
inline T __ldg(const T* p) { return *p; }
using std::isfinite;
using std::max;
using std::min;
