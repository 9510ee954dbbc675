// What differs between the GPU and the SIMT tier (csrc/simt): launches, shared memory, and PTX, each instruction in a
// wrapper with a software twin. No other file of this folder holds PTX or asks where it is compiled.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#ifdef MEGAPRE_SIMT

#define LAUNCH(kernel, grid, block, dynamic, stream, ...)                                             \
  ((void)(stream), simt::launch_any(#kernel, (const void*)(kernel), grid, block, dynamic, [=] { (kernel)(__VA_ARGS__); }))
// `count` elements of static shared memory; the address of `name##_site` tells one array from another.
#define SHARED(T, name, count) \
  static char name##_site;     \
  T* const name = (T*)simt::static_shared(&name##_site, sizeof(T) * (count))
#define DYNAMIC_SHARED(T, name) T* const name = (T*)simt::dynamic_shared()

namespace ptx {

inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
inline float exp2(float x) { return flushed(::exp2f(flushed(x))); }
inline float reciprocal(float x) { return flushed(1.0f / flushed(x)); }
inline float log2(float x) { return ::log2f(flushed(x)); }
inline float square_root(float x) { return sqrtf(flushed(x)); }

// Plain accesses, so that the sanitizers see them.
inline void land(void* to, const void* from, int bytes) {
  for (int i = 0; i < 4; i++) ((uint32_t*)to)[i] = bytes ? ((const uint32_t*)from)[i] : 0u;
}
inline void copy_async_16(void* to, const void* from, bool real, int line = __builtin_LINE()) {
  if (((uintptr_t)to | (uintptr_t)from) & 15) simt::fail("cp.async of an address that is no multiple of 16", line);
  if (simt::copies_land_early()) land(to, from, real);
  else simt::pending_add(to, from, real);
}
inline void copy_commit() { simt::pending_commit(); }
template <int GROUPS>
inline void copy_wait() {
  void* to;
  const void* from;
  for (int bytes; simt::pending_take(GROUPS, &to, &from, &bytes);) land(to, from, bytes);
}

}  // namespace ptx

#else

#define LAUNCH(kernel, grid, block, dynamic, stream, ...) (kernel)<<<grid, block, dynamic, stream>>>(__VA_ARGS__)
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(128) unsigned char name##_[]; \
  T* const name = reinterpret_cast<T*>(name##_)

namespace ptx {

// Relative errors at most 2^-22.5 (exp2), 2^-23 (reciprocal, square root), 2^-22 (log2 outside [0.5, 2], inside an
// absolute one); subnormals count as zero.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float square_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from global to shared memory without registers; zeros where `real` is false (nothing is read then).
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool real) {
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most GROUPS committed groups are in flight.
template <int GROUPS>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

}  // namespace ptx

#endif
