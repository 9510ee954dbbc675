// Products of packed blocks, the one thing that differs between machines: fp32 registers, or AMX tiles of bf16.
//
// Every product of attention and of experts is C [m, n] (+)= A [m, k] B [k, n] with C in fp32. Attention keeps its
// scores transposed (keys x queries): a softmax then runs along registers, and weights leave it in the order in which
// the next product wants them. A lies in rows; B in rows too, PACK elements of k beside each other in a word of 32 bits.
#pragma once
#include "simd.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Pieces of scratch, one after the other.
struct Memory {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* found = (T*)at;
    at += round_up(count * sizeof(T), 64);
    return found;
  }
};

// m and n: multiples of 32; lda in elements, ldb in words, ldc in floats.
struct Plain {
  typedef float Cell;
  static constexpr int64_t PACK = 1;
  static constexpr int64_t FORWARD_QUERIES = 64, FORWARD_KEYS = 64, BACKWARD_QUERIES = 64, BACKWARD_KEYS = 64;
  static constexpr float BASE = 1.0f;  // power(x) = e^x

  static void begin() {}
  static void end() {}
  INLINE Floats power(Floats x) { return exponential(x); }

  template <bool ADD>
  static void multiply(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m,
                       int64_t n, int64_t k) {
    constexpr int64_t ROWS = LANES == 16 ? 8 : 4, WIDTH = 2 * LANES;
    for (int64_t j = 0; j < n; j += WIDTH)
      for (int64_t i = 0; i < m; i += ROWS) {
        Floats sum[ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
          for (int u = 0; u < 2; u++) sum[r][u] = ADD ? load(c + (i + r) * ldc + j + u * LANES) : all(0);
        for (int64_t l = 0; l < k; l++) {
          const Floats b0 = load(b + l * ldb + j), b1 = load(b + l * ldb + j + LANES);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; r++) {
            const Floats x = all(a[(i + r) * lda + l]);
            sum[r][0] += x * b0;
            sum[r][1] += x * b1;
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
          for (int u = 0; u < 2; u++) store(c + (i + r) * ldc + j + u * LANES, sum[r][u]);
      }
  }

  // Two rows of weights as words of B.
  INLINE void store_pair(float* words, int64_t ld, Floats first, Floats second) {
    store(words, first);
    store(words + ld, second);
  }
  // Rows of A that differ from words of B?
  static constexpr bool TWO_FORMS = false;
  INLINE void store_rows(float* rows, int64_t ld, Floats first, Floats second) { store_pair(rows, ld, first, second); }
};

#if defined(__AMX_TILE__)
struct Tiles {
  typedef bf16 Cell;
  static constexpr int64_t PACK = 2;
  static constexpr int64_t FORWARD_QUERIES = 64, FORWARD_KEYS = 128, BACKWARD_QUERIES = 64, BACKWARD_KEYS = 128;
  static constexpr float BASE = 1.44269504088896341f;  // power(x) = 2^x

  // Eight tiles of 16 rows x 64 bytes.
  static void begin() {
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsic tells the compiler of its first bytes alone
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  // To 4e-6, as the weights are rounded to bf16, for x <= 0; exactly 0 below -126.5, and so for -infinity. (vscalefps
  // would take the processor's slow path for every hidden score.)
  INLINE Floats power(Floats x) {
    const float shift = 12582912.0f + 127;
    const Floats y = larger(all(-127.0f), x), t = y + shift, f = y - (t - shift);
    Floats p = all(0.009666368515f);
    p = p * f + 0.05592197584f;
    p = p * f + 0.2402234904f;
    p = p * f + 0.6931210452f;
    p = p * f + 1.0f;
    return p * (Floats)((Ints)t << 23);
  }

  // Tiles 0 to 3 are a block [32, 32] of C, whose rows 0 and 16 begin at c0 and c1: its values, or zeros.
  template <bool ADD>
  INLINE void open(const float* c0, const float* c1, int64_t ldc) {
    if (ADD) {
      _tile_loadd(0, c0, ldc * 4);
      _tile_loadd(1, c0 + 16, ldc * 4);
      _tile_loadd(2, c1, ldc * 4);
      _tile_loadd(3, c1 + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  INLINE void close(float* c0, float* c1, int64_t ldc) {
    _tile_stored(0, c0, ldc * 4);
    _tile_stored(1, c0 + 16, ldc * 4);
    _tile_stored(2, c1, ldc * 4);
    _tile_stored(3, c1 + 16, ldc * 4);
  }

  // k: a multiple of 32. The barriers keep ordinary accesses on their side of the tile instructions.
  template <bool ADD>
  static void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* b_, int64_t ldb, int64_t m,
                       int64_t n, int64_t k) {
    const uint32_t* b = (const uint32_t*)b_;
    asm volatile("" ::: "memory");
    for (int64_t j = 0; j < n; j += 32)
      for (int64_t i = 0; i < m; i += 32) {
        float *c0 = c + i * ldc + j, *c1 = c0 + 16 * ldc;
        open<ADD>(c0, c1, ldc);
        const bf16* from = a + i * lda;
        const uint32_t* words = b + j;
        for (int64_t l = 0; l < k; l += 32) {
          _tile_loadd(4, from + l, lda * 2);
          _tile_loadd(6, words + l / 2 * ldb, ldb * 4);
          _tile_loadd(7, words + l / 2 * ldb + 16, ldb * 4);
          _tile_loadd(5, from + 16 * lda + l, lda * 2);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        close(c0, c1, ldc);
      }
    asm volatile("" ::: "memory");
  }

  INLINE __m512i both(Floats first, Floats second) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  INLINE void store_pair(bf16* words, int64_t, Floats first, Floats second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(words, _mm512_permutexvar_epi16(order, both(first, second)));
  }
  static constexpr bool TWO_FORMS = true;
  INLINE void store_rows(bf16* rows, int64_t ld, Floats first, Floats second) {
    const __m512i x = both(first, second);
    _mm256_storeu_si256((__m256i*)rows, _mm512_castsi512_si256(x));
    _mm256_storeu_si256((__m256i*)(rows + ld), _mm512_extracti64x4_epi64(x, 1));
  }
};
#endif

// --- packing --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// 16 x 16 words of 32 bits, turned in place.
INLINE void turn_registers(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) {
    t[2 * k] = _mm512_unpacklo_epi32(r[2 * k], r[2 * k + 1]);
    t[2 * k + 1] = _mm512_unpackhi_epi32(r[2 * k], r[2 * k + 1]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    r[4 * k] = _mm512_unpacklo_epi64(t[4 * k], t[4 * k + 2]);
    r[4 * k + 1] = _mm512_unpackhi_epi64(t[4 * k], t[4 * k + 2]);
    r[4 * k + 2] = _mm512_unpacklo_epi64(t[4 * k + 1], t[4 * k + 3]);
    r[4 * k + 3] = _mm512_unpackhi_epi64(t[4 * k + 1], t[4 * k + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {  // 128-bit part p of r[4 q + k]: word 4 p + k of rows 4 q ..
    const __m512i x = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x44), y = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xee);
    const __m512i z = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x44);
    const __m512i w = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xee);
    r[k] = _mm512_shuffle_i32x4(x, z, 0x88), r[4 + k] = _mm512_shuffle_i32x4(x, z, 0xdd);
    r[8 + k] = _mm512_shuffle_i32x4(y, w, 0x88), r[12 + k] = _mm512_shuffle_i32x4(y, w, 0xdd);
  }
}
#endif

// dst [columns, rows] of src [rows, columns], words of 32 bits; both multiples of 16.
static void transpose(const uint32_t* src, int64_t lds, uint32_t* dst, int64_t ldd, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      const uint32_t* from = src + i * lds + j;
      uint32_t* to = dst + j * ldd + i;
#if defined(__AVX512F__)
      __m512i r[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) r[k] = _mm512_loadu_si512(from + k * lds);
      turn_registers(r);
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) _mm512_storeu_si512(to + k * ldd, r[k]);
#else
      for (int k = 0; k < 16; k++)
        for (int l = 0; l < 16; l++) to[l * ldd + k] = from[k * lds + l];
#endif
    }
}

// `count` of `padded` rows of x, `width` of `wide` features: the rest is zero.
template <class T, class Cell>
static void copy_rows(Cell* to, int64_t wide, const T* x, int64_t stride, int64_t count, int64_t padded,
                      int64_t width) {
  for (int64_t i = 0; i < count; i++) {
    if constexpr (sizeof(T) == sizeof(Cell)) memcpy(to + i * wide, x + i * stride, width * sizeof(T));
    else sweep(width, [&](int64_t l, int64_t n) INLINED { write(to + i * wide + l, read(x + i * stride + l, n), n); });
    if (wide > width) memset(to + i * wide + width, 0, (wide - width) * sizeof(Cell));
  }
  if (padded > count) memset(to + count * wide, 0, (padded - count) * wide * sizeof(Cell));
}

// Rows, `ld` apart, as words of B with k along the rows: PACK rows beside each other.
INLINE void pair_rows(const float* rows, int64_t ld, float* words, int64_t count, int64_t wide) {
  for (int64_t i = 0; i < count; i++) memcpy(words + i * wide, rows + i * ld, wide * sizeof(float));
}
INLINE void pair_rows(const bf16* rows, int64_t ld, bf16* words, int64_t count, int64_t wide) {
  uint32_t* to = (uint32_t*)words;
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t l = 0; l < wide; l += LANES) {
      Halves a, b;
      memcpy(&a, rows + i * ld + l, sizeof a);
      memcpy(&b, rows + (i + 1) * ld + l, sizeof b);
      const Words w = widen(a) | widen(b) << 16;
      memcpy(to + i / 2 * wide + l, &w, sizeof w);
    }
}

// x [rows, wide] to its transpose as rows of A, [wide, rows]; `words` is scratch of the same size.
template <class E>
static void transpose_rows(const typename E::Cell* x, typename E::Cell* out, typename E::Cell* words, int64_t rows,
                           int64_t wide) {
  pair_rows(x, wide, words, rows, wide);
  transpose((const uint32_t*)words, wide, (uint32_t*)out, rows / E::PACK, rows / E::PACK, wide);
}

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
