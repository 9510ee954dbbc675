// One register of floats at a time, through GCC's vector extension: the same source becomes SSE2, AVX2, AVX-512 or
// NEON. (Wider vectors than the machine's compile too, but are taken apart through memory.)
// Everything is static, so that each instruction set keeps its own copy.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
// On every lambda: one with several call sites would otherwise become a function, and its vectors go through memory.
#define INLINED __attribute__((always_inline))

namespace megapre {
namespace MEGAPRE_VARIANT {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct bf16 {
  uint16_t bits;
};

// x - 0 is x, so this is one broadcast from memory; 0 + x, which turns -0 into 0, would be an addition and a shuffle.
INLINE Floats all(float x) { return x - Floats{}; }

INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Widening, narrowing and maxima by name where the compiler would take the generic form apart.
INLINE Words widen(Halves h) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Words);
#endif
}

INLINE Halves narrow(Words w) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)w);
#else
  return __builtin_convertvector(w, Halves);
#endif
}

// The larger and the smaller of two; b where either is NaN.
INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

INLINE Floats load(const bf16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Floats)(widen(h) << 16);
}

INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// Round to nearest even; a NaN stays one.
INLINE void store(bf16* p, Floats v) {
  Words u = (Words)v;
  Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  Words nan = Words{} + 0x7fc0;
  Halves h = narrow((Words)(v == v ? rounded : nan));
  memcpy(p, &h, sizeof h);
}

// The first n < LANES elements at p, the other lanes `fill`.
template <class T>
INLINE Floats load_part(const T* p, int64_t n, float fill) {
  T buffer[LANES];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, n * sizeof(T));
  const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints lane;
  memcpy(&lane, numbers, sizeof lane);
  return lane < (int32_t)n ? load(buffer) : all(fill);
}

template <class T>
INLINE void store_part(T* p, Floats v, int64_t n) {
  T buffer[LANES];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
}

typedef float Four __attribute__((vector_size(16)));

// to[i][0..4) += from[0..4)[i] for four rows of each, `apart` and `stride` floats from the next.
INLINE void add_turned(float* to, int64_t apart, const float* from, int64_t stride) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  Four a, b, c, d, row;
  memcpy(&a, from, 16), memcpy(&b, from + stride, 16);
  memcpy(&c, from + 2 * stride, 16), memcpy(&d, from + 3 * stride, 16);
  const Four low = __builtin_shufflevector(a, b, 0, 4, 1, 5), high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four under = __builtin_shufflevector(c, d, 0, 4, 1, 5), over = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Four turned[4] = {
      __builtin_shufflevector(low, under, 0, 1, 4, 5), __builtin_shufflevector(low, under, 2, 3, 6, 7),
      __builtin_shufflevector(high, over, 0, 1, 4, 5), __builtin_shufflevector(high, over, 2, 3, 6, 7)};
  for (int64_t i = 0; i < 4; i++) {
    memcpy(&row, to + i * apart, 16);
    row += turned[i];
    memcpy(to + i * apart, &row, 16);
  }
#else
  for (int64_t i = 0; i < 4; i++)
    for (int64_t j = 0; j < 4; j++) to[i * apart + j] += from[j * stride + i];
#endif
}

// f(vector index base, load, store) over n elements: whole vectors, then one partial vector.
template <class F>
INLINE void sweep(int64_t n, F f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) f(i, LANES);
  if (i < n) f(i, n - i);
}

// Sum of f(index, count) over n elements in four independent chains, so that no addition waits for the one before.
template <class F>
INLINE Floats accumulate(int64_t n, F f) {
  Floats a = all(0), b = all(0), c = all(0), d = all(0);
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    a += f(i, LANES);
    b += f(i + LANES, LANES);
    c += f(i + 2 * LANES, LANES);
    d += f(i + 3 * LANES, LANES);
  }
  sweep(n - i, [&](int64_t j, int64_t m) INLINED { a += f(i + j, m); });
  return (a + b) + (c + d);
}

template <class T>
INLINE Floats read(const T* p, int64_t n, float fill = 0.0f) {
  return n == LANES ? load(p) : load_part(p, n, fill);
}

template <class T>
INLINE void write(T* p, Floats v, int64_t n) {
  if (n == LANES) store(p, v);
  else store_part(p, v, n);
}

INLINE float sum(Floats v) {
  float lane[LANES];
  memcpy(lane, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

INLINE float largest(Floats v) {
  float top = v[0];
  for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
  return top;
}

// exp to about 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. n = -127 makes the power 0 and n = 128 infinity, so
// the result is 0 below -87.7 and infinity above 88.4; NaN is kept.
INLINE Floats exponential(Floats x) {
  const float shift = 12582912.0f + 127;  // 1.5 x 2^23: adding it leaves the nearest integer, + 127, in the low bits
  Floats y = smaller(all(89.0f), larger(all(-88.0f), x));
  Floats t = y * 1.44269504088896341f + shift;
  Floats n = t - shift;
  Floats r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = all(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Floats)((Ints)t << 23);
}

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
