// What the files of products on AMX tiles share: blocks of 32 x 32, work dealt out beside them, and packing.
#pragma once
#include "products.h"

#if defined(__AMX_TILE__)
namespace megapre {
namespace MEGAPRE_VARIANT {

constexpr int64_t SIDE = 32;    // of a block of four tiles
constexpr int64_t DEPTH = 384;  // of a product at a time: 24 KiB of A

// C [32, 32] (+)= A [32, k] B [k, 32] over `steps` of 32 along k: A's blocks lie `apart`, B is a panel. Tiles multiply
// beside everything else, so `beside()` has work for the processor's other units, a piece a step. The barriers keep
// ordinary accesses on their side of the tile instructions.
template <bool ADD, class F>
INLINE void block(float* c, int64_t ldc, const bf16* a, int64_t lda, int64_t apart, const uint32_t* b, int64_t steps,
                  F beside) {
  float* c1 = c + 16 * ldc;
  asm volatile("" ::: "memory");
  Tiles::open<ADD>(c, c1, ldc);
  for (int64_t s = 0; s < steps; s++, a += apart, b += 16 * SIDE) {
    _tile_loadd(4, a, lda * 2);
    _tile_loadd(6, b, SIDE * 4);
    _tile_loadd(7, b + 16, SIDE * 4);
    _tile_loadd(5, a + 16 * lda, lda * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  }
  Tiles::close(c, c1, ldc);
  asm volatile("" ::: "memory");
}

// C [32, n] += A [32, k] B [k, n], `depth` rows of B at a time: of DEPTH rows A stays in the first-level cache. A is
// packed, a block [32, 32] after the other.
template <int64_t depth, class F>
static void multiply(float* c, int64_t ldc, const bf16* a, const uint32_t* b, int64_t n, int64_t k, F beside) {
  for (int64_t l = 0; l < k; l += depth)
    for (int64_t j = 0; j < n; j += SIDE)
      block<true>(c + j, ldc, a + l * SIDE, SIDE, SIDE * SIDE, b + j / SIDE * (k / 2 * SIDE) + l / 2 * SIDE,
                  least(k - l, depth) / SIDE, beside);
}

// Deals `work` pieces out to `steps` steps: equally many at a time, so that their branches are foreseen.
struct Deal {
  int64_t work, each, every, done = 0, wait = 1;

  Deal(int64_t work, int64_t steps)
      : work(work), each(steps ? (work + steps - 1) / steps : 0), every(work && work < steps ? steps / work : 1) {}
  template <class F>
  INLINED void step(F piece) {
    if (--wait) return;
    wait = every;
    for (const int64_t stop = least(done + each, work); done < stop; done++) piece(done);
  }
};

// Memory that the next piece of work will read, asked for a line at a time.
INLINE void ask(const void* at, int64_t line) { __builtin_prefetch((const char*)at + line * 64, 0, 2); }

// 32 columns of 32 rows to 32 rows of A. Each line is read once: of rows a power of two apart few fit in the cache.
INLINE void turn_block(const bf16* rows, int64_t stride, bf16* to) {
  alignas(64) __m512i kept[16];
  __m512i r[16];
#pragma GCC unroll 16
  for (int p = 0; p < 16; p++) {
    const __m512i a = _mm512_loadu_si512(rows + 2 * p * stride), b = _mm512_loadu_si512(rows + (2 * p + 1) * stride);
    r[p] = _mm512_unpacklo_epi16(a, b);  // columns 0 to 3, 8 to 11, ..: parts of 128 bits
    kept[p] = _mm512_unpackhi_epi16(a, b);
  }
  turn_registers(r);
  turn_registers(kept);
#pragma GCC unroll 16
  for (int k = 0; k < 16; k++) {
    _mm512_storeu_si512(to + (k / 4 * 8 + k % 4) * SIDE, r[k]);
    _mm512_storeu_si512(to + (k / 4 * 8 + k % 4 + 4) * SIDE, kept[k]);
  }
}

// 32 columns of two rows as words.
INLINE void pair_line(__m512i a, __m512i b, uint32_t* to) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // unpacking takes half of each part of 128 bits
  const __m512i x = _mm512_permutexvar_epi64(order, a), y = _mm512_permutexvar_epi64(order, b);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(x, y));
  _mm512_storeu_si512(to + LANES, _mm512_unpackhi_epi16(x, y));
}

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
#endif
