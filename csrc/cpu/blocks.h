// What the files of products on AMX tiles share: blocks of 32 x 32, work dealt out beside them, and packing.
#pragma once
#include "products.h"

#if defined(__AMX_TILE__)
namespace megapre {
namespace MEGAPRE_VARIANT {

constexpr int64_t SIDE = 32;    // of a block of four tiles
constexpr int64_t DEPTH = 384;  // of a product at a time: 24 KiB of A
constexpr int64_t WHOLE = INT64_MAX;

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

// Blocks [first, last) of 32 rows of x, 32 columns at a time, from memory to `pack(rows, count, block, column)`; the
// next block is asked for in the order of memory meanwhile.
template <class F>
static void by_blocks(const bf16* x, int64_t stride, int64_t rows, int64_t width, int64_t first, int64_t last, F pack) {
  for (int64_t block = first; block < last; block++) {
    const bf16* from = x + block * SIDE * stride;
    const int64_t count = rows - block * SIDE < SIDE ? rows - block * SIDE : SIDE;
    const bool more = block + 1 < last && rows >= (block + 2) * SIDE;
    for (int64_t j = 0; j < width; j += SIDE) {
      if (more)
        for (int64_t i = j; i < j + SIDE; i++)  // 64 bytes each: width / 32 of them make a row
          __builtin_prefetch(from + (SIDE + i / (width / SIDE)) * stride + i % (width / SIDE) * SIDE, 0, 2);
      pack(from + j, count, block, j);
    }
  }
}

// 16 columns of 32 rows, of which `count` exist, to 16 rows of A; `pairs`: scratch of 16 x 16 words.
INLINE void turn_group(const bf16* rows, int64_t stride, int64_t count, uint32_t* pairs, uint32_t* to) {
  for (int64_t i = 0; i < SIDE; i += 2) {
    Halves a = {}, b = {};
    if (i < count) memcpy(&a, rows + i * stride, sizeof a);
    if (i + 1 < count) memcpy(&b, rows + (i + 1) * stride, sizeof b);
    const Words w = widen(a) | widen(b) << 16;
    memcpy(pairs + i / 2 * LANES, &w, sizeof w);
  }
  transpose(pairs, LANES, to, LANES, LANES, LANES);
}

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
#endif
