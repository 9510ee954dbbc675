// The output layer's loss and weight gradients on AMX tiles; see tiles.h. Formulas: megapre/kernels/cross_entropy.py.
#include "tiles.h"

#include <math.h>

#include "blocks.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

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

static void pack_places(const void* x, int64_t stride, int64_t rows, int64_t padded, int64_t width, void* words,
                        int64_t first, int64_t last) {
  for (int64_t i = first * SIDE; i < last * SIDE; i += 2) {
    const bf16* from = (const bf16*)x + i * stride;
    uint32_t* to = (uint32_t*)words + i / 2 * SIDE;
    for (int64_t j = 0; j < width; j += SIDE, to += padded / 2 * SIDE) {
      const __m512i zero = _mm512_setzero_si512();
      pair_line(i < rows ? _mm512_loadu_si512(from + j) : zero,
                i + 1 < rows ? _mm512_loadu_si512(from + stride + j) : zero, to);
    }
  }
}

static void pack_turned(const void* x, int64_t stride, int64_t rows, int64_t padded, int64_t width, void* blocks,
                        int64_t first, int64_t last) {
  alignas(64) bf16 ragged[SIDE * SIDE];
  for (int64_t i = first * SIDE; i < last * SIDE; i += SIDE)
    for (int64_t j = 0; j < width; j += SIDE) {
      const bf16* from = (const bf16*)x + i * stride + j;
      bf16* to = (bf16*)blocks + j * padded + i * SIDE;
      if (i + SIDE <= rows) {
        turn_block(from, stride, to);
      } else {
        copy_rows(ragged, SIDE, from, stride, rows - i, SIDE, SIDE);
        turn_block(ragged, SIDE, to);
      }
    }
}

// --- the output layer's loss ----------------------------------------------------------------------------------------
//
// Of the logits their exponentials are kept, 2^(log2(e) logit - base), so that the gradient needs no elementwise work: a
// row's factor goes into x before the product of the weight's gradient and onto the result of that of x. The base of a
// row is 0, unless that leaves bf16 too little room in a block of vocabulary rows: then it is the row's maximum there.
// The target's own exponential is taken out: what it adds to the gradient is added in fp32, so that the slope of a
// confident row is not the rounding of 1 - 1.
//
// A block of `height` vocabulary rows is kept as [padded/32][height/32] blocks of 32 vocabulary rows by 32 rows of x, in
// words of two neighbouring vocabulary rows: B of the product with the weight, k being the vocabulary.

// A constant that stays in a register: the compiler would load it again for every use, and tiles need the load ports.
INLINE Floats held(float x) {
  Floats v = all(x);
  asm("" : "+v"(v));
  return v;
}

// 2^(log2(e) x - base) to 1e-4, times what makes up for the bits that are cut off; infinite or NaN above.
template <bool BASED>
struct Power {
  static constexpr float CUT = 1.0f + 0.72135f / 512;  // what the mean of 1 / mantissa loses to half of the eighth bit
  Floats shift = held(12582912.0f), scale = held(Tiles::BASE);  // adding it leaves the nearest integer
  Floats third = held(0.05500893017f * CUT), second = held(0.2422109616f * CUT), first = held(0.6932829275f * CUT);
  Floats one = held(CUT);

  INLINED Floats operator()(Floats x, Floats base) const {
    const Floats y = larger(all(-127.0f), x * scale - base);
    const Floats n = (BASED ? y + shift : x * scale + shift) - shift, f = BASED ? y - n : x * scale - n;
    Floats p = third;
    p = p * f + second;
    p = p * f + first;
    p = p * f + one;
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
  }
};

// What happens to a block of logits after its product, while the next is multiplied: exponentials are kept and summed,
// with bases or without, or maxima are found.
enum class Pass { PLAIN, MAXIMA, BASED };

template <Pass PASS, bool LEVELS>
struct Fold {
  float *top, *sums, *levels;
  const float* bases;
  const float* c = nullptr;  // [32, 32]
  uint32_t* kept = nullptr;
  int64_t column = 0, count = 0;  // of the rows of x; rows of the vocabulary that are real
  Floats most[2], level[2], sum[2], base[2] = {};
  Power<PASS == Pass::BASED> power;
  // The upper halves of two rows' numbers, beside each other.
  __m512i upper = _mm512_set_epi16(63, 31, 61, 29, 59, 27, 57, 25, 55, 23, 53, 21, 51, 19, 49, 17, 47, 15, 45, 13, 43, 11,
                                   41, 9, 39, 7, 37, 5, 35, 3, 33, 1);
  __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);

  INLINED void piece(int64_t pair) {
    const bool first = 2 * pair < count, second = 2 * pair + 1 < count;
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const float* from = c + 2 * pair * SIDE + h * LANES;
      const Floats x = load(from), y = load(from + SIDE);
      if (PASS == Pass::MAXIMA) {
        if (first) most[h] = larger(x, most[h]);
        if (second) most[h] = larger(y, most[h]);
        continue;
      }
      Floats p = power(x, base[h]), q = power(y, base[h]);
      if (!second) p = first ? p : all(0), q = all(0);
      const __m512i w = _mm512_permutex2var_epi16((__m512i)p, upper, (__m512i)q);
      _mm512_storeu_si512(kept + pair * SIDE + h * LANES, w);
      sum[h] = (Floats)_mm512_dpbf16_ps((__m512)sum[h], (__m512bh)w, ones);  // of what is kept: they sum to one
      if (LEVELS) level[h] += second ? x + y : first ? x : all(0);
    }
  }

  // The block in `c_` has been multiplied, and every piece of the one before is done.
  INLINED void next(const float* c_, uint32_t* kept_, int64_t column_, int64_t count_) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      if (c) {
        if (PASS == Pass::MAXIMA) store(top + column + h * LANES, most[h]);
        else store(sums + column + h * LANES, sum[h]);
        if (LEVELS) store(levels + column + h * LANES, level[h]);
      }
      if (!c_) continue;
      if (PASS == Pass::MAXIMA) most[h] = load(top + column_ + h * LANES);
      else sum[h] = load(sums + column_ + h * LANES);
      if (LEVELS) level[h] = load(levels + column_ + h * LANES);
      if (PASS == Pass::BASED) base[h] = load(bases + column_ + h * LANES) * Tiles::BASE;
    }
    c = c_, kept = kept_, column = column_, count = count_;
  }
};

INLINE int64_t real_rows(const HeadChunk& h, int64_t row) { return h.valid < row ? 0 : least(h.valid - row, SIDE); }

// The block of 32 x 32 of vocabulary rows `row` .. and rows 32 panel .. of x, in a block [begin, end) of the vocabulary.
INLINE uint32_t* kept_at(const HeadChunk& h, int64_t begin, int64_t end, int64_t row, int64_t panel) {
  return (uint32_t*)h.kept + begin / 2 * h.padded + (panel * (end - begin) + row - begin) / 2 * SIDE;
}

// The rows of x whose target is in [row, row + count).
template <class F>
INLINE void targets_in(const HeadChunk& h, int64_t row, int64_t count, F f) {
  for (int64_t r = 0; r < h.rows; r += 64) {
    const int64_t n = least(h.rows - r, 64);
    int64_t any = 0;
    for (int64_t i = 0; i < n; i++) any |= (uint64_t)(h.targets[r + i] - row) < (uint64_t)count;
    if (any)
      for (int64_t i = 0; i < n; i++)
        if ((uint64_t)(h.targets[r + i] - row) < (uint64_t)count) f(r + i, h.targets[r + i] - row);
  }
}

// The products of a block of the vocabulary, and what is folded into `statistics`: base, sum, target, level.
template <Pass PASS, bool LEVELS>
static void exponentials(const HeadChunk& h, int64_t begin, int64_t end, float* top, float* statistics, float* blocks) {
  const int64_t n = h.padded, steps = h.width / SIDE, panels = n / SIDE;
  Fold<PASS, LEVELS> fold = {top, statistics + n, statistics + 3 * n, statistics};
  Deal folding = {0, steps};
  int64_t turn = 0;
  for (int64_t row = begin; row < end; row += SIDE) {
    const bf16* weight = (const bf16*)h.weight + row * h.width;
    Deal ahead = {row + SIDE < end ? h.width : 0, panels * steps};
    for (int64_t panel = 0; panel < panels; panel++, turn ^= 1) {
      float* c = blocks + turn * SIDE * SIDE;
      const uint32_t* words = (const uint32_t*)h.features + panel * steps * 16 * SIDE;
      block<false>(c, SIDE, weight, h.width, SIDE, words, steps, [&]() INLINED {
        folding.step([&](int64_t pair) INLINED { fold.piece(pair); });
        ahead.step([&](int64_t line) INLINED { ask(weight + SIDE * h.width, line); });
      });
      fold.next(c, kept_at(h, begin, end, row, panel), panel * SIDE, real_rows(h, row));
      folding = {SIDE / 2, steps};
    }
  }
  for (int64_t pair = 0; pair < SIDE / 2; pair++) fold.piece(pair);
  fold.next(nullptr, nullptr, 0, 0);
}

// Between these a row's sum of exponentials is in a block, or it gets a base of its own there.
constexpr float LEAST = 0x1p-60f, MOST = 0x1p60f;

template <bool LEVELS>
static void plain_or_based(const HeadChunk& h, int64_t begin, int64_t end, float* statistics, float* top,
                           float* blocks) {
  const int64_t n = h.padded;
  memset(statistics, 0, 4 * n * sizeof(float));
  exponentials<Pass::PLAIN, LEVELS>(h, begin, end, top, statistics, blocks);
  bool plain = true;
  for (int64_t r = 0; r < n; r++) plain = plain && statistics[n + r] >= LEAST && statistics[n + r] <= MOST;
  if (plain) return;
  for (int64_t r = 0; r < n; r++) top[r] = -__builtin_inff();
  exponentials<Pass::MAXIMA, false>(h, begin, end, top, statistics, blocks);
  for (int64_t r = 0; r < n; r++) {
    const bool own = !(statistics[n + r] >= LEAST && statistics[n + r] <= MOST) && top[r] != -__builtin_inff();
    statistics[r] = own ? top[r] : 0, statistics[n + r] = 0;
  }
  exponentials<Pass::BASED, false>(h, begin, end, top, statistics, blocks);
}

static void logits(const HeadChunk& h, int64_t begin, int64_t end, bool levels, float* statistics, void* scratch) {
  const int64_t n = h.padded;
  if (h.valid <= begin) {
    memset(kept_at(h, begin, end, begin, 0), 0, (end - begin) * n * sizeof(bf16));
    memset(statistics + n, 0, 3 * n * sizeof(float));
    for (int64_t r = 0; r < n; r++) statistics[r] = -__builtin_inff();
    return;
  }
  Memory memory = {(char*)scratch};
  float *top = memory.take<float>(n), *blocks = memory.take<float>(2 * SIDE * SIDE);
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8000);  // numbers below 2^-126 are 0: the processor would take its slow path for each
  (levels ? plain_or_based<true> : plain_or_based<false>)(h, begin, end, statistics, top, blocks);
  _mm_setcsr(mode);
  targets_in(h, begin, least(h.valid, end) - begin, [&](int64_t r, int64_t v) {
    bf16* kept = (bf16*)(kept_at(h, begin, end, begin + v / SIDE * SIDE, r / SIDE) + v % SIDE / 2 * SIDE + r % SIDE);
    const float p = read(kept + v % 2, 1)[0];
    float logit = logf(p) + statistics[r];
    if (!(p > 0x1p-100f)) {  // too small to be kept, or not a number
      const bf16 *x = (const bf16*)h.x + r * h.stride, *w = (const bf16*)h.weight + (begin + v) * h.width;
      logit = sum(accumulate(h.width, [&](int64_t i, int64_t m) INLINED { return read(x + i, m) * read(w + i, m); }));
    }
    statistics[2 * n + r] = logit;
    write(kept + v % 2, all(0), 1);
  });
}

// Rows of A in blocks from kept words, in pieces of two rows by 32 columns; rows of the weight as A turned, in groups of
// 32 columns.
struct Turn {
  const uint32_t* kept;
  int64_t apart;  // of the kept blocks of two panels, in words
  bf16* rows;
  const bf16* weight;
  bf16* turned;
  int64_t width, turned_apart;

  INLINED void piece(int64_t number) const {
    const uint32_t* from = kept + number / (SIDE / 2) * apart + number % (SIDE / 2) * SIDE;
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + LANES);
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                          22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(rows + number * 2 * SIDE, _mm512_permutex2var_epi16(a, even, b));
    _mm512_storeu_si512(rows + number * 2 * SIDE + SIDE, _mm512_permutex2var_epi16(a, odd, b));
  }
  INLINED void group(int64_t number) const {
    turn_block(weight + number * SIDE, width, turned + number * turned_apart);
  }
};

static void gradient(const HeadChunk& h, int64_t begin, int64_t end, int64_t first, int64_t height, void* turned,
                     void* scratch) {
  const int64_t n = h.padded, strip = SIDE * h.width, panels = n / SIDE;
  const int64_t pieces = panels * (SIDE / 2), groups = h.width / SIDE, steps = panels * (h.width / SIDE);
  Memory memory = {(char*)scratch};
  bf16* slots[2] = {memory.take<bf16>(SIDE * n), memory.take<bf16>(SIDE * n)};
  const auto turn = [&](int64_t row) {
    const int64_t place = (row - first) / SIDE;
    return Turn{kept_at(h, first, first + height, row, 0), height / 2 * SIDE, slots[place % 2],
                (const bf16*)h.weight + row * h.width, (bf16*)turned + place * SIDE * SIDE, h.width, height * SIDE};
  };
  Turn now = turn(begin);
  for (int64_t number = 0; number < pieces; number++) now.piece(number);
  for (int64_t number = 0; number < groups; number++) now.group(number);
  for (int64_t row = begin; row < end; row += SIDE) {
    const int64_t left = end - row - SIDE;
    const Turn next = turn(left > 0 ? row + SIDE : row);
    float* sums = h.main_grad + row * h.width;
    Deal turning = {left > 0 ? pieces : 0, steps}, grouping = {left > 0 ? groups : 0, steps};
    Deal grads = {left > 0 ? strip / 16 : 0, steps}, rows = {left > SIDE ? strip / 32 : 0, steps};
    Deal ahead = {left > SIDE ? panels * SIDE : 0, steps};
    multiply<DEPTH>(sums, h.width, now.rows, (const uint32_t*)h.places, h.width, n, [&]() INLINED {
      turning.step([&](int64_t number) INLINED { next.piece(number); });
      grouping.step([&](int64_t number) INLINED { next.group(number); });
      grads.step([&](int64_t line) INLINED { ask(sums + strip, line); });
      ahead.step([&](int64_t line) INLINED { ask(next.kept + line / 32 * next.apart + 16 * SIDE, line % 32); });
      rows.step([&](int64_t line) INLINED { ask(next.weight + strip, line); });
    });
    targets_in(h, row, real_rows(h, row), [&](int64_t r, int64_t v) {
      const bf16* x = (const bf16*)h.x + r * h.stride;
      float* to = sums + v * h.width;
      if (h.slope[r] != 0)
        for (int64_t i = 0; i < h.width; i += LANES) store(to + i, load(to + i) + h.slope[r] * load(x + i));
    });
    now = next;
  }
}

INLINE Floats low(Words w) { return (Floats)(w << 16); }
INLINE Floats high(Words w) { return (Floats)(w & 0xffff0000u); }

// What the exponentials of a block of the vocabulary are in the gradient, in place: where rows have bases, or a slope
// that is the same for all entries.
static void slopes(const HeadChunk& h, int64_t first, int64_t height, const float* grown_, int64_t begin, int64_t end) {
  for (int64_t panel = 0; panel < h.padded / SIDE; panel++)
    for (int64_t row = begin; row < end; row += SIDE)
      for (int64_t half = 0; half < SIDE; half += LANES) {
        const int64_t r = panel * SIDE + half, count = real_rows(h, row);
        const Floats grown = load(grown_ + r), less = load(h.less + r), scale = load(h.scale + r);
        for (int64_t v = 0; v < count; v += 2) {
          uint32_t* at = kept_at(h, first, first + height, row, panel) + v / 2 * SIDE + half;
          Words w;
          memcpy(&w, at, sizeof w);
          const Floats x = low(w) * grown - less, y = v + 1 < count ? high(w) * grown - less : all(0);
          Tiles::store_pair((bf16*)at, 0, scale == 0.0f ? all(0) : x, scale == 0.0f ? all(0) : y);
        }
      }
}

static void features_gradient(const HeadChunk& h, int64_t depth, const void* turned, const void* words, float* sum,
                              int64_t begin, int64_t end) {
  const int64_t steps = depth / SIDE;
  for (int64_t i = begin; i < end; i += SIDE)
    for (int64_t j = 0; j < h.padded; j += SIDE) {
      float* c = sum + (i / SIDE * (h.padded / SIDE) + j / SIDE) * SIDE * SIDE;
      const uint32_t* panel = (const uint32_t*)words + j * (depth / 2);
      Deal ahead = {SIDE * SIDE / 16, steps};
      block<true>(c, SIDE, (const bf16*)turned + i * depth, SIDE, SIDE * SIDE, panel, steps, [&]() INLINED {
        ahead.step([&](int64_t line) INLINED { ask(c + SIDE * SIDE, line); });
      });
    }
}

static void store_features(const HeadChunk& h, const float* sum, void* dx, int64_t stride, int64_t begin, int64_t end) {
  float turned[16 * 16];
  for (int64_t r = begin; r < end; r += 16)
    for (int64_t i = 0; i < h.width; i += 16) {
      const float* from =
          sum + (i / SIDE * (h.padded / SIDE) + r / SIDE) * SIDE * SIDE + i % SIDE * SIDE + r % SIDE;
      transpose((const uint32_t*)from, SIDE, (uint32_t*)turned, 16, 16, 16);
      for (int64_t k = 0; k < 16 && r + k < h.rows; k++) {
        Floats x = load(turned + 16 * k) * h.factor[r + k];
        const int64_t target = h.targets[r + k];
        if (h.slope[r + k] != 0 && (uint64_t)target < (uint64_t)h.valid)
          x += h.slope[r + k] * load((const bf16*)h.weight + target * h.width + i);
        store((bf16*)dx + (r + k) * stride + i, x);
      }
    }
}

// --- weight gradients -----------------------------------------------------------------------------------------------

static void weight_gradient(const void* turned, int64_t padded, const void* words, int64_t width, float* main_grad,
                            int64_t begin, int64_t end) {
  const int64_t parts = (padded + DEPTH - 1) / DEPTH, depth = round_up((padded + parts - 1) / parts, SIDE);
  for (int64_t row = begin; row < end; row += SIDE) {
    float* sums = main_grad + row * width;
    for (int64_t l = 0; l < padded; l += depth)
      for (int64_t j = 0; j < width; j += SIDE) {
        const int64_t steps = least(padded - l, depth) / SIDE;
        const float* next = sums + SIDE * width + j;
        Deal ahead = {l == 0 && row + SIDE < end ? 2 * SIDE : 0, steps};
        block<true>(sums + j, width, (const bf16*)turned + row * padded + l * SIDE, SIDE, SIDE * SIDE,
                    (const uint32_t*)words + j * (padded / 2) + l / 2 * SIDE, steps, [&]() INLINED {
                      ahead.step([&](int64_t line) INLINED { ask(next + line / 2 * width, line % 2); });
                    });
      }
  }
}

const TileKernels tiles = {Tiles::begin, Tiles::end, pack_features, pack_places,       pack_turned,    logits,
                           slopes,       gradient,   features_gradient, store_features, weight_gradient};

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
