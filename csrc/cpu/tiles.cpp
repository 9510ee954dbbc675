// The output layer's loss and weight gradients on AMX tiles; see tiles.h. Formulas: megapre/kernels/cross_entropy.py.
#include "tiles.h"

#include "products.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

constexpr int64_t SIDE = 32;    // of a block of four tiles
constexpr int64_t DEPTH = 384;  // of a product at a time: 24 KiB of A

// Memory that the next piece of work will read, asked for while tiles multiply: two streams, a part at every step.
struct Ahead {
  const char* at[2];
  int64_t bytes[2], each[2];

  void over(int64_t steps) {
    for (int i = 0; i < 2; i++) each[i] = (bytes[i] + 64 * steps - 1) / (64 * steps) * 64;
  }
  INLINE void step(Ahead& x) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      for (int64_t b = 0; b < x.each[i]; b += 64) __builtin_prefetch(x.at[i] + b, 0, 2);
      x.at[i] += x.each[i];
    }
  }
};

// 32 rows of C and k rows of the panels of B: A stays in the first-level cache, B streams. The barriers keep ordinary
// accesses on their side of the tile instructions.
template <bool ADD>
static void strip(float* c, int64_t ldc, const bf16* a, int64_t lda, const uint32_t* b, int64_t panel, int64_t n,
                  int64_t k, Ahead& ahead) {
  asm volatile("" ::: "memory");
  for (int64_t j = 0; j < n; j += SIDE) {
    float *c0 = c + j, *c1 = c0 + 16 * ldc;
    Tiles::open<ADD>(c0, c1, ldc);
    const uint32_t* words = b + j / SIDE * panel;
    for (int64_t l = 0; l < k; l += 32, words += 16 * SIDE) {
      _tile_loadd(4, a + l, lda * 2);
      _tile_loadd(6, words, SIDE * 4);
      _tile_loadd(7, words + 16, SIDE * 4);
      _tile_loadd(5, a + 16 * lda + l, lda * 2);
      Ahead::step(ahead);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    Tiles::close(c0, c1, ldc);
  }
  asm volatile("" ::: "memory");
}

// C [32, n] (+)= A [32, k] B [k, n], DEPTH rows of B at a time.
template <bool ADD>
static void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const uint32_t* b, int64_t n, int64_t k,
                     Ahead ahead = {}) {
  ahead.over(n / SIDE * (k / SIDE));
  int64_t l = 0;
  for (; l < k; l += DEPTH) {
    const int64_t depth = k - l < DEPTH ? k - l : DEPTH;
    const uint32_t* words = b + l / 2 * SIDE;
    if (ADD || l) strip<true>(c, ldc, a + l, lda, words, k / 2 * SIDE, n, depth, ahead);
    else strip<false>(c, ldc, a, lda, words, k / 2 * SIDE, n, depth, ahead);
  }
}

// --- packing --------------------------------------------------------------------------------------------------------

static void pack_features(const void* x_, int64_t stride, int64_t rows, int64_t width, void* words, int64_t first,
                          int64_t last, void* scratch_) {
  bf16* scratch = (bf16*)scratch_;
  for (int64_t panel = first; panel < last; panel++) {
    const bf16* x = (const bf16*)x_ + panel * SIDE * stride;
    const int64_t count = rows - panel * SIDE < SIDE ? rows - panel * SIDE : SIDE;
    int64_t apart = stride;
    if (count < SIDE || stride % 2) {
      copy_rows(scratch, width, x, stride, count, SIDE, width);
      x = scratch, apart = width;
    }
    transpose((const uint32_t*)x, apart / 2, (uint32_t*)words + panel * SIDE * (width / 2), SIDE, SIDE, width / 2);
  }
}

static void pack_places(const void* x_, int64_t stride, int64_t rows, int64_t padded, int64_t width, void* words,
                        int64_t first, int64_t last) {
  for (int64_t pair = first; pair < last; pair++) {
    const bf16* x = (const bf16*)x_ + 2 * pair * stride;
    for (int64_t j = 0; j < width; j += LANES) {
      Halves a = {}, b = {};
      if (2 * pair < rows) memcpy(&a, x + j, sizeof a);
      if (2 * pair + 1 < rows) memcpy(&b, x + stride + j, sizeof b);
      const Words w = widen(a) | widen(b) << 16;
      memcpy((uint32_t*)words + (j / SIDE * (padded / 2) + pair) * SIDE + j % SIDE, &w, sizeof w);
    }
  }
}

// --- the output layer's loss ----------------------------------------------------------------------------------------

// fp32 logits `c` of 32 vocabulary rows, of which `count` are real: keep them in bf16 and fold them into the rows'
// statistics. Rounded first: the gradient's probabilities must sum to one.
static void fold(const HeadChunk& h, const float* c, int64_t count, bf16* kept, float* top, float* base) {
  const int64_t n = h.padded;
  const Floats none = all(-__builtin_inff());
  float *sums = top + n, *levels = top + 3 * n;
  memcpy(base, top, n * sizeof(float));
  for (int64_t v = 0; v < SIDE; v += 2) {
    bf16 *first = kept + v * n, *second = first + n;
    for (int64_t r = 0; r < n; r += LANES) {
      Tiles::store_rows(first + r, n, load(c + v * n + r), load(c + (v + 1) * n + r));
      if (v >= count) continue;
      const Floats a = load(first + r), b = v + 1 < count ? load(second + r) : none;
      store(top + r, larger(larger(a, b), load(top + r)));
      store(levels + r, load(levels + r) + (v + 1 < count ? a + b : a));
    }
  }
  for (int64_t r = 0; r < n; r += LANES) {
    const Floats now = load(top + r), shift = now == -__builtin_inff() ? all(0) : now;
    store(sums + r, load(sums + r) * exponential(load(base + r) - shift));
    store(base + r, shift);
  }
  for (int64_t v = 0; v < count; v += 2)
    for (int64_t r = 0; r < n; r += LANES) {
      const Floats shift = load(base + r), b = v + 1 < count ? load(kept + (v + 1) * n + r) : none;
      store(sums + r, load(sums + r) + (exponential(load(kept + v * n + r) - shift) + exponential(b - shift)));
    }
}

static void logits(const HeadChunk& h, int64_t begin, int64_t end, float* statistics, float* scratch) {
  const int64_t n = h.padded;
  float* base = scratch + SIDE * n;
  for (int64_t r = 0; r < n; r++) statistics[r] = -__builtin_inff();
  memset(statistics + n, 0, 3 * n * sizeof(float));
  for (int64_t row = begin; row < end; row += SIDE) {
    const bf16* weight = (const bf16*)h.weight + row * h.width;
    Ahead ahead = {};
    bf16* kept = (bf16*)h.logits + row * n;
    if (row + SIDE < end) {
      ahead.at[0] = (const char*)(weight + SIDE * h.width), ahead.bytes[0] = SIDE * h.width * sizeof(bf16);
      ahead.at[1] = (const char*)kept, ahead.bytes[1] = SIDE * n * sizeof(bf16);
    }
    multiply<false>(scratch, n, weight, h.width, (const uint32_t*)h.features, n, h.width, ahead);
    const int64_t count = h.valid - row < 0 ? 0 : h.valid - row < SIDE ? h.valid - row : SIDE;
    fold(h, scratch, count, kept, statistics, base);
    for (int64_t r = 0; r < h.rows; r++) {
      const int64_t place = h.targets[r] - row;
      if (place >= 0 && place < count) statistics[2 * n + r] = read(kept + place * n + r, 1)[0];
    }
  }
}

// The gradient of one vocabulary row's logits for 16 rows of x, but for what the targets lose.
INLINE Floats slope(const HeadChunk& h, const bf16* kept, Floats lse, Floats scale, Floats factor) {
  const Floats p = Tiles::power((load(kept) - lse) * Tiles::BASE);
  return scale == 0.0f ? all(0) : p * factor - h.share * scale;
}

static void gradient(const HeadChunk& h, int64_t row, int64_t place, int64_t block, void* words_, void* turned_,
                     void* scratch) {
  const int64_t n = h.padded, count = h.valid - row < 0 ? 0 : h.valid - row < SIDE ? h.valid - row : SIDE;
  const bf16 *kept = (const bf16*)h.logits + row * n, *weight = (const bf16*)h.weight + row * h.width;
  bf16 *rows = (bf16*)scratch, *pairs = rows + SIDE * n;
  const int64_t panel = block / 2 * SIDE;  // words of a panel of the gradient as B
  uint32_t* words = (uint32_t*)words_ + place / 2 * SIDE;
  float* sums = h.main_grad + row * h.width;
  for (int64_t v = 0; v < SIDE; v += 2)
    for (int64_t r = 0; r < n; r += LANES) {
      const Floats lse = load(h.lse + r), scale = load(h.scale + r), factor = (1.0f + 2.0f * h.z_loss * lse) * scale;
      const Floats first = v < count ? slope(h, kept + v * n + r, lse, scale, factor) : all(0);
      const Floats second = v + 1 < count ? slope(h, kept + (v + 1) * n + r, lse, scale, factor) : all(0);
      Tiles::store_rows(rows + v * n + r, n, first, second);
      Tiles::store_pair((bf16*)(words + r / SIDE * panel + v / 2 * SIDE + r % SIDE), 0, first, second);
    }
  for (int64_t r = 0; r < h.rows; r++) {
    const int64_t v = h.targets[r] - row;
    if (v < 0 || v >= count || h.scale[r] == 0) continue;
    const Floats p = exponential(read(kept + v * n + r, 1) - h.lse[r]);
    const float g = (p[0] * (1.0f + 2.0f * h.z_loss * h.lse[r]) - h.share - (1.0f - h.smoothing)) * h.scale[r];
    write(rows + v * n + r, all(g), 1);
    write((bf16*)(words + r / SIDE * panel + v / 2 * SIDE + r % SIDE) + v % 2, all(g), 1);
  }
  Ahead ahead = {};
  if (place + SIDE < block) {
    ahead.at[0] = (const char*)(kept + SIDE * n), ahead.bytes[0] = SIDE * n * sizeof(bf16);
    ahead.at[1] = (const char*)(sums + SIDE * h.width), ahead.bytes[1] = SIDE * h.width * sizeof(float);
  }
  multiply<true>(sums, h.width, rows, n, (const uint32_t*)h.places, h.width, n, ahead);
  pair_rows(weight, h.width, pairs, SIDE, h.width);
  transpose((const uint32_t*)pairs, h.width, (uint32_t*)turned_ + place / 2, block / 2, SIDE / 2, h.width);
}

static void features_gradient(const HeadChunk& h, int64_t block, const void* turned, const void* words, float* sum,
                              int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += SIDE)
    multiply<true>(sum + i * h.padded, h.padded, (const bf16*)turned + i * block, block, (const uint32_t*)words,
                   h.padded, block);
}

static void store_turned(const float* sum, int64_t padded, int64_t rows, int64_t width, void* x, int64_t stride) {
  float turned[16 * 16];
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t i = 0; i < width; i += 16) {
      transpose((const uint32_t*)sum + i * padded + r, padded, (uint32_t*)turned, 16, 16, 16);
      for (int64_t k = 0; k < 16 && r + k < rows; k++)
        store((bf16*)x + (r + k) * stride + i, load(turned + 16 * k));
    }
}

// --- weight gradients -----------------------------------------------------------------------------------------------

static void weight_gradient(const void* dy_, int64_t stride, int64_t rows, int64_t padded, const void* words,
                            int64_t width, float* main_grad, int64_t begin, void* scratch) {
  const bf16* dy = (const bf16*)dy_ + begin;
  uint32_t *pairs = (uint32_t*)scratch, *turned = pairs + 16 * SIDE;
  float* sums = main_grad + begin * width;
  for (int64_t r = 0; r < padded; r += SIDE) {
    const int64_t count = rows - r < SIDE ? rows - r : SIDE;
    pack_places(dy + r * stride, stride, count, SIDE, SIDE, pairs, 0, SIDE / 2);
    transpose(pairs, SIDE, turned + r / 2, padded / 2, SIDE / 2, SIDE);
  }
  const Ahead ahead = {{(const char*)(sums + SIDE * width)}, {SIDE * width * (int64_t)sizeof(float)}, {}};
  multiply<true>(sums, width, (const bf16*)turned, padded, (const uint32_t*)words, width, padded, ahead);
}

const TileKernels tiles = {Tiles::begin,       Tiles::end, pack_features,     pack_places,  logits,
                           gradient, features_gradient, store_turned, weight_gradient};

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
