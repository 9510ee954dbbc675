// One query at a time over a cache of keys.
#pragma once
#include "attention_keys.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

// Sums of 16 vectors, one a lane of the result; `sums` holds 16 x LANES.
INLINE void sum_each(const float* sums, float* out) {
#if defined(__AVX512F__)
  alignas(64) float turned[256];
  transpose((const uint32_t*)sums, 16, (uint32_t*)turned, 16, 16, 16);
  Floats total = load(turned);
  for (int i = 1; i < 16; i++) total += load(turned + 16 * i);
  store(out, total);
#else
  for (int i = 0; i < 16; i++) out[i] = sum(load(sums + i * LANES));
#endif
}

// Reads keys and values once, in place, for all query heads of a key head; bound by memory.
template <class T>
static void decode(const AttentionProblem& p, Rows q, Rows k, Rows v, int64_t b, int64_t group, int64_t begin,
                   int64_t end, float* partial, float* scratch) {
  const int64_t each = p.heads / p.groups, wide = round_up(p.width, LANES), count = end - begin;
  float *queries = scratch, *weights = queries + each * wide;
  for (int64_t h = 0; h < each; h++)
    copy_rows(queries + h * wide, wide, (const T*)q.at + b * q.batch + (group * each + h) * q.head, 0, 1, 1, p.width);
  const T *keys = (const T*)k.at + b * k.batch + group * k.head, *values = (const T*)v.at + b * v.batch + group * v.head;
  const int64_t padded = round_up(count, 16), whole = p.width / LANES * LANES;
  for (int64_t j = 0; j < count; j += 16)
    for (int64_t h = 0; h < each; h++) {
      alignas(64) float sums[16 * LANES];
      for (int64_t i = 0; i < 16; i++) {
        const T* row = keys + (begin + least(j + i, count - 1)) * k.row;
        Floats total = all(0);
        for (int64_t l = 0; l < whole; l += LANES) total += load(queries + h * wide + l) * load(row + l);
        if (whole < p.width) total += load(queries + h * wide + whole) * read(row + whole, p.width - whole);
        store(sums + i * LANES, total);
      }
      sum_each(sums, weights + h * padded + j);
    }
  const int32_t limit = p.limit ? p.limit[b] : p.causal ? (int32_t)p.q_offset : EVERYTHING;
  const int32_t document = p.asking ? p.asking[b] : 0;
  for (int64_t h = 0; h < each; h++) {
    float *w = weights + h * padded, *out = partial + h * (2 + p.width), top = -__builtin_inff(), total = 0;
    const float* bias = p.bias ? p.bias + (group * each + h) * p.span + BIAS_MARGIN + p.t - 1 : nullptr;
    for (int64_t j = 0; j < count; j++) {
      const int64_t key = begin + j, apart = p.q_offset - p.k_offset - key;
      const int32_t order = p.order ? p.order[b * p.t + key] : p.causal ? (int32_t)(p.k_offset + key) : 0;
      const bool seen = order <= limit && (!p.asked || p.asked[b * p.t + key] == document) &&
                        (!p.window || (apart < p.window && -apart < p.window));
      w[j] = seen ? w[j] * p.scale + (bias ? bias[-key] : 0.0f) : -__builtin_inff();
      top = w[j] > top || w[j] != w[j] ? w[j] : top;
    }
    const float base = top == -__builtin_inff() ? 0.0f : top;
    Floats sums = all(0);
    sweep(count, [&](int64_t j, int64_t n) INLINED {
      const Floats x = exponential(read(w + j, n, -__builtin_inff()) - base);
      write(w + j, x, n);
      sums += x;
    });
    total = sum(sums);
    out[0] = top, out[1] = total;
    for (int64_t l = 0; l < p.width; l += LANES) {
      const int64_t n = least(LANES, p.width - l);
      Floats x = all(0), y = all(0);
      int64_t j = 0;
      for (; j + 2 <= count; j += 2) {
        x += w[j] * read(values + (begin + j) * v.row + l, n);
        y += w[j + 1] * read(values + (begin + j + 1) * v.row + l, n);
      }
      if (j < count) x += w[j] * read(values + (begin + j) * v.row + l, n);
      write(out + 2 + l, x + y, n);
    }
  }
}

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
