// __half of the SIMT tier: the compiler's own conversions, which round to nearest, ties to even.
#pragma once
#include "cuda_runtime.h"

struct __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half x) { return (float)__builtin_bit_cast(_Float16, x.bits); }
inline __half __float2half_rn(float x) { return {__builtin_bit_cast(uint16_t, (_Float16)x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
