// The output layer's loss and weight gradients on AMX tiles; see tiles.h. Formulas: megapre/kernels/cross_entropy.py.
#include "tiles.h"

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
  const auto pack = [&](const bf16* from, int64_t count, int64_t block, int64_t j) INLINED {
    uint32_t* to = (uint32_t*)words + j / SIDE * (padded / 2) * SIDE + block * 16 * SIDE;
    for (int64_t i = 0; i < SIDE; i += 2)
      for (int64_t half = 0; half < SIDE; half += LANES) {
        Halves a = {}, b = {};
        if (i < count) memcpy(&a, from + i * stride + half, sizeof a);
        if (i + 1 < count) memcpy(&b, from + (i + 1) * stride + half, sizeof b);
        const Words w = widen(a) | widen(b) << 16;
        memcpy(to + i / 2 * SIDE + half, &w, sizeof w);
      }
  };
  by_blocks((const bf16*)x, stride, rows, width, first, last, pack);
}

static void pack_turned(const void* x, int64_t stride, int64_t rows, int64_t padded, int64_t width, void* blocks,
                        int64_t first, int64_t last) {
  alignas(64) uint32_t pairs[LANES * LANES];
  const auto pack = [&](const bf16* from, int64_t count, int64_t block, int64_t j) INLINED {
    uint32_t* to = (uint32_t*)blocks + j * (padded / 2) + block * 16 * SIDE;
    for (int64_t half = 0; half < SIDE; half += LANES) turn_group(from + half, stride, count, pairs, to + half * LANES);
  };
  by_blocks((const bf16*)x, stride, rows, width, first, last, pack);
}

// --- the output layer's loss ----------------------------------------------------------------------------------------
//
// Logits are kept in blocks of 32 vocabulary rows by 32 rows of x, in words of two neighbouring vocabulary rows:
// [vocabulary/32][padded/32][16 pairs][32 words].

INLINE Floats low(Words w) { return (Floats)(w << 16); }
INLINE Floats high(Words w) { return (Floats)(w & 0xffff0000u); }

// 2^x to 2e-7 for x <= 0; 0 far below.
INLINE Floats fine_power(Floats x) {
  const float shift = 12582912.0f + 127;
  const Floats y = larger(all(-127.0f), x), t = y + shift, f = y - (t - shift);
  Floats p = all(0.001326472709f);
  p = p * f + 0.009671512682f;
  p = p * f + 0.05550733744f;
  p = p * f + 0.2402224208f;
  p = p * f + 0.6931469776f;
  p = p * f + 1.0f;
  return p * (Floats)((Ints)t << 23);
}

// The same to 1e-4, for what is rounded to bf16; 0 where x is not a number.
INLINE Floats rough_power(Floats x) {
  const float shift = 12582912.0f + 127;
  const Floats y = larger(x, all(-127.0f)), t = y + shift, f = y - (t - shift);
  Floats p = all(0.05500893017f);
  p = p * f + 0.2422109616f;
  p = p * f + 0.6932829275f;
  p = p * f + 1.0f;
  return p * (Floats)((Ints)t << 23);
}

// A row of 32 from its halves.
INLINE void store_row(bf16* row, Floats first, Floats second) {
  _mm512_storeu_si512(row, Tiles::both(first, second));
}

// What happens to a block of logits after its product, while the next two are multiplied. First it is rounded and kept,
// and its rows' maxima found; then its exponentials are summed. (Rounded first: probabilities must sum to one.)
struct Fold {
  struct Place {
    uint32_t* kept;
    int64_t column, count;  // rows of the vocabulary that are real
  };
  float *top, *sums, *levels;
  const float* c = nullptr;  // [32, 32]
  Place rounding = {}, summing = {};
  Floats most[2], level[2], base[2], sum[2];

  INLINED void piece(int64_t pair) {
    const Floats none = all(-__builtin_inff());
    if (rounding.kept) {
      const bool first = 2 * pair < rounding.count, second = 2 * pair + 1 < rounding.count;
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const float* from = c + 2 * pair * SIDE + h * LANES;
        uint32_t* to = rounding.kept + pair * SIDE + h * LANES;
        Tiles::store_pair((bf16*)to, 0, load(from), load(from + SIDE));
        Words w;
        memcpy(&w, to, sizeof w);
        if (!first) continue;
        most[h] = larger(larger(low(w), second ? high(w) : none), most[h]);
        level[h] += second ? low(w) + high(w) : low(w);
      }
    }
    if (summing.kept && 2 * pair < summing.count) {
      const bool second = 2 * pair + 1 < summing.count;
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        Words w;
        memcpy(&w, summing.kept + pair * SIDE + h * LANES, sizeof w);
        sum[h] += fine_power(low(w) * Tiles::BASE - base[h]);
        if (second) sum[h] += fine_power(high(w) * Tiles::BASE - base[h]);
      }
    }
  }

  // The block in `c_` has been multiplied, and every piece of the two before is done.
  INLINED void next(const float* c_, Place place) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      if (summing.kept) store(sums + summing.column + h * LANES, sum[h]);
      if (rounding.kept) {
        const int64_t at = rounding.column + h * LANES;
        const Floats before = load(top + at), now = most[h] == -__builtin_inff() ? all(0) : most[h];
        base[h] = now * Tiles::BASE;
        sum[h] = load(sums + at) * fine_power(before * Tiles::BASE - base[h]);
        store(top + at, most[h]);
        store(levels + at, level[h]);
      }
      if (!place.kept) continue;
      most[h] = load(top + place.column + h * LANES);
      level[h] = load(levels + place.column + h * LANES);
    }
    summing = rounding, rounding = place, c = c_;
  }
};

INLINE int64_t real_rows(const HeadChunk& h, int64_t row) { return h.valid < row ? 0 : least(h.valid - row, SIDE); }

INLINE uint32_t* kept_at(const HeadChunk& h, int64_t row) { return (uint32_t*)h.logits + row / 2 * h.padded; }

// Where the logit of `row` + v and of row r of x is kept, or what belongs to it in the gradient as B.
INLINE int64_t word_at(int64_t panel, int64_t v, int64_t r) { return r / SIDE * panel + v / 2 * SIDE + r % SIDE; }

INLINE float logit_at(const uint32_t* kept, int64_t v, int64_t r) {
  return read((const bf16*)(kept + word_at(SIDE * SIDE / 2, v, r)) + v % 2, 1)[0];
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

// 64 bytes of rows [32, width], in the order of memory, to their place in blocks [32, 32].
INLINE void pack_line(const bf16* rows, int64_t width, bf16* blocks, int64_t line) {
  const int64_t row = line / (width / SIDE), step = line % (width / SIDE);
  memcpy(blocks + (step * SIDE + row) * SIDE, rows + line * SIDE, SIDE * sizeof(bf16));
}

static void logits(const HeadChunk& h, int64_t begin, int64_t end, float* statistics, void* scratch) {
  const int64_t n = h.padded, steps = h.width / SIDE, panels = n / SIDE, lines = SIDE * steps;
  for (int64_t r = 0; r < n; r++) statistics[r] = -__builtin_inff();
  memset(statistics + n, 0, 3 * n * sizeof(float));
  Memory memory = {(char*)scratch};
  bf16* packed[2] = {memory.take<bf16>(SIDE * h.width), memory.take<bf16>(SIDE * h.width)};
  float* sums[2] = {memory.take<float>(SIDE * SIDE), memory.take<float>(SIDE * SIDE)};
  const bf16* weight = (const bf16*)h.weight + begin * h.width;
  for (int64_t line = 0; line < lines; line++) pack_line(weight, h.width, packed[0], line);
  Fold fold = {statistics, statistics + n, statistics + 3 * n};
  for (int64_t row = begin; row < end; row += SIDE) {
    weight = (const bf16*)h.weight + (row + SIDE) * h.width;
    const bf16* mine = packed[(row - begin) / SIDE % 2];
    bf16* other = packed[(row - begin) / SIDE % 2 ^ 1];
    Deal packing = {row + SIDE < end ? lines : 0, panels * steps};
    for (int64_t panel = 0; panel < panels; panel++) {
      float* c = sums[panel % 2];
      Deal folding = {SIDE / 2, steps};
      const uint32_t* words = (const uint32_t*)h.features + panel * steps * 16 * SIDE;
      block<false>(c, SIDE, mine, SIDE, SIDE * SIDE, words, steps, [&]() INLINED {
        folding.step([&](int64_t pair) INLINED { fold.piece(pair); });
        packing.step([&](int64_t line) INLINED { pack_line(weight, h.width, other, line); });
      });
      fold.next(c, {kept_at(h, row) + panel * 16 * SIDE, panel * SIDE, real_rows(h, row)});
    }
    if (panels % 2) {  // the next product is not to overwrite this row's last
      float* c = sums[0];
      sums[0] = sums[1], sums[1] = c;
    }
  }
  for (int last = 0; last < 2; last++) {
    for (int64_t pair = 0; pair < SIDE / 2; pair++) fold.piece(pair);
    fold.next(nullptr, {});
  }
  targets_in(h, begin, h.valid < begin ? 0 : least(h.valid, end) - begin, [&](int64_t r, int64_t v) {
    statistics[2 * n + r] = logit_at(kept_at(h, begin + v / SIDE * SIDE), v % SIDE, r);
  });
}

// The gradient of 32 vocabulary rows' logits, as rows of A in blocks and as words of B, and their rows of the weight as
// A turned; in pieces of two rows by 32 columns.
struct Slopes {
  const HeadChunk& h;
  const uint32_t* kept;
  bf16* rows;
  uint32_t *words, *turned, *pairs;
  const bf16* weight;
  int64_t panel, turned_apart, count;

  int64_t pieces() const { return h.padded / 2 + h.width / LANES; }

  INLINED void piece(int64_t number) {
    const int64_t block = number / (SIDE / 2), pair = number % (SIDE / 2);
    if (block < h.padded / SIDE) slope(block, pair);
    else turn(number - h.padded / 2);
  }

  INLINED void slope(int64_t block, int64_t pair) {
    Floats x[2], y[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const int64_t r = block * SIDE + half * LANES;
      const Floats lse = load(h.lse + r), factor = load(h.factor + r), less = load(h.less + r);
      Words w;
      memcpy(&w, kept + (block * 16 + pair) * SIDE + half * LANES, sizeof w);
      x[half] = rough_power(low(w) * Tiles::BASE - lse) * factor - less;
      y[half] = rough_power(high(w) * Tiles::BASE - lse) * factor - less;
      Tiles::store_pair((bf16*)(words + block * panel + pair * SIDE + half * LANES), 0, x[half], y[half]);
    }
    store_row(rows + (block * SIDE + 2 * pair) * SIDE, x[0], x[1]);
    store_row(rows + (block * SIDE + 2 * pair + 1) * SIDE, y[0], y[1]);
  }

  INLINED void turn(int64_t group) {
    uint32_t* to = turned + group / 2 * turned_apart + group % 2 * LANES * LANES;
    turn_group(weight + group * LANES, h.width, SIDE, pairs, to);
  }

  // What the targets lose, and rows that are padding.
  void finish(int64_t row) {
    targets_in(h, row, count, [&](int64_t r, int64_t v) {
      if (h.scale[r] == 0) return;
      const float p = fine_power(all(logit_at(kept, v, r) * Tiles::BASE - h.lse[r]))[0];
      set(v, r, p * h.factor[r] - h.less[r] - (1.0f - h.smoothing) * h.scale[r]);
    });
    for (int64_t v = count; v < SIDE; v++)
      for (int64_t r = 0; r < h.padded; r++) set(v, r, 0);
  }
  void set(int64_t v, int64_t r, float x) {
    write(rows + (r / SIDE * SIDE + v) * SIDE + r % SIDE, all(x), 1);
    write((bf16*)(words + word_at(panel, v, r)) + v % 2, all(x), 1);
  }
};

static void gradient(const HeadChunk& h, int64_t begin, int64_t end, int64_t first, int64_t block, void* words,
                     void* turned, void* scratch) {
  const int64_t n = h.padded, strip = SIDE * h.width;
  Memory memory = {(char*)scratch};
  bf16* slots[2] = {memory.take<bf16>(SIDE * n), memory.take<bf16>(SIDE * n)};
  uint32_t* pairs = memory.take<uint32_t>(LANES * LANES);
  const auto slopes = [&](int64_t row) {
    const int64_t place = row - first;
    return Slopes{h, kept_at(h, row), slots[place / SIDE % 2], (uint32_t*)words + place / 2 * SIDE,
                  (uint32_t*)turned + place / SIDE * (SIDE * SIDE / 2), pairs, (const bf16*)h.weight + row * h.width,
                  block / 2 * SIDE, block / SIDE * (SIDE * SIDE / 2), real_rows(h, row)};
  };
  Slopes now = slopes(begin);
  for (int64_t number = 0; number < now.pieces(); number++) now.piece(number);
  now.finish(begin);
  for (int64_t row = begin; row < end; row += SIDE) {
    const int64_t left = end - row - SIDE;
    Slopes next = slopes(left > 0 ? row + SIDE : row);
    float* sums = h.main_grad + row * h.width;
    const int64_t steps = n / SIDE * (h.width / SIDE);
    Deal work = {left > 0 ? next.pieces() : 0, steps}, grads = {left > 0 ? strip / 16 : 0, steps};
    Deal ahead = {left > SIDE ? SIDE * n / 32 : 0, steps}, rows = {left > SIDE ? strip / 32 : 0, steps};
    multiply<DEPTH>(sums, h.width, now.rows, (const uint32_t*)h.places, h.width, n, [&]() INLINED {
      work.step([&](int64_t number) INLINED { next.piece(number); });
      grads.step([&](int64_t line) INLINED { ask(sums + strip, line); });
      ahead.step([&](int64_t line) INLINED { ask(next.kept + n * 16, line); });
      rows.step([&](int64_t line) INLINED { ask(next.weight + strip, line); });
    });
    if (left > 0) {
      next.finish(row + SIDE);
    }
    now.rows = next.rows;
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

static void store_turned(const float* sum, int64_t padded, int64_t rows, int64_t width, void* x, int64_t stride) {
  float turned[16 * 16];
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t i = 0; i < width; i += 16) {
      const float* from = sum + (i / SIDE * (padded / SIDE) + r / SIDE) * SIDE * SIDE + i % SIDE * SIDE + r % SIDE;
      transpose((const uint32_t*)from, SIDE, (uint32_t*)turned, 16, 16, 16);
      for (int64_t k = 0; k < 16 && r + k < rows; k++)
        store((bf16*)x + (r + k) * stride + i, load(turned + 16 * k));
    }
}

// --- weight gradients -----------------------------------------------------------------------------------------------

static void weight_gradient(const void* turned, int64_t padded, const void* words, int64_t width, float* main_grad,
                            int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += SIDE) {
    float* sums = main_grad + row * width;
    const bf16* a = (const bf16*)turned + row * padded;
    Deal ahead = {row + SIDE < end ? SIDE * width / 16 : 0, padded / SIDE * (width / SIDE)};
    multiply<WHOLE>(sums, width, a, (const uint32_t*)words, width, padded, [&]() INLINED {
      ahead.step([&](int64_t line) INLINED { ask(sums + SIDE * width, line); });
    });
  }
}

const TileKernels tiles = {Tiles::begin, Tiles::end, pack_features,     pack_places,  pack_turned,    logits,
                           gradient,     features_gradient, store_turned, weight_gradient};

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
