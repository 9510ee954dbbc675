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

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i .. 8 i + 7 hold the addresses of matrix i's rows. Lane l gets elements
// 2 (l % 4), + 1 of row l / 4, or, transposed, of column l / 4.
template <bool TRANSPOSED>
inline void load_matrices(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  if ((uintptr_t)row & 15) simt::fail("ldmatrix of an address that is no multiple of 16", line);
  const unsigned char* rows = simt::exchange(~0u, &row, sizeof row, line);
  const int lane = simt::current.lane, across = lane / 4, along = lane % 4 * 2;
  for (int i = 0; i < 4; i++) {
    uint32_t pair[2];
    for (int e = 0; e < 2; e++) {
      const int at = TRANSPOSED ? along + e : across, column = TRANSPOSED ? across : along + e;
      pair[e] = simt::lane_value<const uint16_t*>(rows, 8 * i + at)[column];
    }
    r[i] = pair[0] | pair[1] << 16;
  }
}
// d += a b of bf16, 16 x 16 and 16 x 8; lane 4 g + t holds of a rows g and g + 8 at columns 2 t, + 1 (then + 8), of b
// column g at rows 2 t, + 1 (then + 8), of d rows g and g + 8 at columns 2 t, + 1.
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  struct Four { uint32_t x[4]; };
  struct Two { uint32_t x[2]; };
  const int g = simt::current.lane / 4, t = simt::current.lane % 4;
  const unsigned char* left = simt::exchange(~0u, a, sizeof a, line);
  Four rows[4];  // copied now: a slot is overwritten by the meeting after the next
  for (int k = 0; k < 4; k++) rows[k] = simt::lane_value<Four>(left, 4 * g + k);
  const Two own = {{b0, b1}};
  const unsigned char* right = simt::exchange(~0u, &own, sizeof own, line);
  const auto half = [](uint32_t word, int which) { return __builtin_bit_cast(float, which ? word & 0xFFFF0000u : word << 16); };
  for (int e = 0; e < 4; e++) {
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const Four row = rows[k % 8 / 2];
      const Two column = simt::lane_value<Two>(right, 4 * (2 * t + e % 2) + k % 8 / 2);
      sum += half(row.x[e / 2 + k / 8 * 2], k % 2) * half(column.x[k / 8], k % 2);
    }
    d[e] += sum;
  }
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

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ptx

#endif
