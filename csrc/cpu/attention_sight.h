// Queries, which keys they see, and what is added to or dropped from their scores.
#pragma once
#include "attention_keys.h"
#include "philox.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

template <int64_t QUERIES>
struct Queries {
  int32_t limit[QUERIES], document[QUERIES];
  int64_t first, count, position;
  Span span;

  // Queries after the last one see what the last one sees; what comes of them is not stored.
  void set(const AttentionProblem& p, int64_t b, int64_t block) {
    first = block * QUERIES, count = least(QUERIES, p.s - first), position = p.q_offset + first;
    for (int64_t i = 0; i < QUERIES; i++) {
      const int64_t at = first + least(i, count - 1);
      limit[i] = p.limit ? p.limit[b * p.s + at] : p.causal ? (int32_t)(p.q_offset + at) : EVERYTHING - 1;
      document[i] = p.asking ? p.asking[b * p.s + at] : 0;
    }
    span = span_of(limit, document, QUERIES);
  }
};

enum Sight { NOTHING, SOME, WHOLE };

template <int64_t QUERIES>
static Sight sight(const AttentionProblem& p, const Queries<QUERIES>& q, const Span& k, int64_t key) {
  if (k.first > q.span.last || k.from > q.span.to || k.to < q.span.from) return NOTHING;
  const int64_t start = p.k_offset + key, stop = start + STRIP - 1, last = q.position + q.count - 1;
  if (p.window && (q.position - stop >= p.window || start - last >= p.window)) return NOTHING;
  const bool one = k.from == k.to && q.span.from == q.span.to && k.from == q.span.from;
  const bool near = !p.window || (last - start < p.window && stop - q.position < p.window);
  return one && near && k.last <= q.span.first ? WHOLE : SOME;
}

// Scores of a strip that the queries may not read become -infinity.
template <int64_t QUERIES>
static void hide(const AttentionProblem& p, const Queries<QUERIES>& q, const int32_t* order, const int32_t* document,
                 int64_t key, float* scores) {
  const Floats hidden = all(-__builtin_inff());
  const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints lane;
  memcpy(&lane, numbers, sizeof lane);
  for (int64_t c = 0; c < QUERIES; c += LANES) {
    Ints limit, asking;
    memcpy(&limit, q.limit + c, sizeof limit);
    memcpy(&asking, q.document + c, sizeof asking);
    for (int64_t j = 0; j < STRIP; j++) {
      Ints seen = (limit >= order[j]) & (asking == document[j]);
      if (p.window) {
        const Ints apart = lane + (int32_t)(q.position + c - p.k_offset - key - j);
        seen &= (apart < (int32_t)p.window) & (apart > (int32_t)-p.window);
      }
      float* at = scores + j * QUERIES + c;
      store(at, seen ? load(at) : hidden);
    }
  }
}

// The bias of a strip, in units of raw scores.
template <int64_t QUERIES>
static void add_bias(const float* bias, float over_scale, float* scores) {
  for (int64_t j = 0; j < STRIP; j++)
    for (int64_t c = 0; c < QUERIES; c += LANES) {
      float* at = scores + j * QUERIES + c;
      store(at, load(at) + load(bias - j + c) * over_scale);
    }
}

// Factors of dropout, 0 or gain, for one key at a time in rising order.
template <int64_t QUERIES>
struct Dropout {
  alignas(64) uint32_t word[4][QUERIES];
  uint32_t k0, k1, sample, site, threshold;
  int64_t group, position, k_offset;
  float gain;

  Dropout(const AttentionProblem& p, int64_t b, int64_t head) {
    const uint64_t number = (uint64_t)p.samples[b];
    k0 = p.key ^ (uint32_t)(number >> 32), k1 = p.step, sample = (uint32_t)number, site = (uint32_t)p.sites[head];
    threshold = p.threshold, gain = p.gain, k_offset = p.k_offset, group = -1;
  }
  void start(int64_t at) { position = at, group = -1; }
  const uint32_t* words(int64_t key) {
    const int64_t place = k_offset + key;
    if (place >> 2 != group) {
      group = place >> 2;
      for (int64_t i = 0; i < QUERIES; i++) {
        uint32_t c0 = sample, c1 = (uint32_t)(position + i), c2 = (uint32_t)group, c3 = site;
        rounds(c0, c1, c2, c3, k0, k1);
        word[0][i] = c0, word[1][i] = c1, word[2][i] = c2, word[3][i] = c3;
      }
    }
    return word[place & 3];
  }
  INLINE Floats factor(const uint32_t* at, uint32_t threshold, float gain) {
    Words w;
    memcpy(&w, at, sizeof w);
    return w >= threshold ? all(gain) : all(0);
  }
};

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
