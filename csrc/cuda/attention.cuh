// Attention of bf16 without a matrix of scores (arXiv 2307.08691); formula and masks: megapre/kernels/attention.py.
// This file: a call's problem, which tiles and keys are visible, tiles in shared memory, products of tiles. The kernels
// are in attention_forward.cuh and attention_backward.cuh.
#pragma once
#include "common.cuh"
#include "philox.cuh"

namespace attention {

constexpr int SPAN = 64;  // queries or keys that a span tells of

// What a kernel is compiled for. PLAIN: causal or full by positions. MASKED: limits, orders, documents and windows.
// EVERYTHING: those, and a bias and dropout where the problem has them.
enum Kind { PLAIN, MASKED, EVERYTHING };

// Strides in elements of x[row, batch, head, feature].
struct Rows {
  const bf16* at;
  int row;
  int64_t batch, head;
};

// Limits, orders and documents of one tile: least and greatest.
struct Span {
  int first, last, from, to;
};

struct Problem {
  Rows q, k, v, grad;
  int s, t, batch, heads, groups, width;
  float scale;
  int causal, window, q_offset, k_offset;
  // But for PLAIN: int32 [batch, s] and [batch, t], and the spans [batch, tiles] of 64 queries and of 64 keys.
  const int *limit, *order, *asking, *asked;
  const Span *queries, *keys;
  const float* bias;  // [heads, s + t - 1], entry s - 1 - i + j; null: none
  const int64_t *sites, *samples;
  uint32_t key, step, threshold;
  float gain;
  // Results and, backward, what comes in. lse, delta [batch, heads, s].
  void *out, *dk, *dv;
  float* lse;
  const float* delta;
  int wide;    // results in fp32
  // Backward: blocks that share the keys of a head, each with its own dq, fp32 [splits, batch, heads, padded, D] that is
  // added to. lse, in base 2 and infinite for a query that reads nothing, and delta are [batch, heads, padded] then.
  int splits, padded;
  float* dbias;  // [heads, tiles of queries + tiles of keys - 1, 2 SPAN]; null: not asked for
};

enum Sight { NOTHING, SOME, WHOLE };

// The span of `count` queries or keys from `first` on.
__device__ __forceinline__ Span span(const Span* spans, int b, int first, int count, int rows) {
  const int each = (rows + SPAN - 1) / SPAN;
  const Span* at = spans + b * each;
  Span found = at[first / SPAN];
  for (int i = first / SPAN + 1; i < min(each, (first + count - 1) / SPAN + 1); i++) {
    found.first = min(found.first, at[i].first), found.last = max(found.last, at[i].last);
    found.from = min(found.from, at[i].from), found.to = max(found.to, at[i].to);
  }
  return found;
}

// What `width` keys from `key` on are to `count` queries from `query` on.
template <Kind KIND>
__device__ __forceinline__ Sight sight(const Problem& p, int b, int query, int count, int key, int width) {
  const int first = p.q_offset + query, last = first + count - 1, start = p.k_offset + key, stop = start + width - 1;
  const bool inside = key + width <= p.t;
  if constexpr (KIND == PLAIN) {
    if (p.causal && start > last) return NOTHING;
    return inside && (!p.causal || stop <= first) ? WHOLE : SOME;
  } else {
    const Span q = span(p.queries, b, query, count, p.s), k = span(p.keys, b, key, width, p.t);
    if (k.first > q.last || k.from > q.to || k.to < q.from) return NOTHING;
    if (p.window && (first - stop >= p.window || start - last >= p.window)) return NOTHING;
    const bool near = !p.window || (last - start < p.window && stop - first < p.window);
    return inside && near && k.last <= q.first && k.from == k.to && q.from == q.to && k.from == q.from ? WHOLE : SOME;
  }
}

// What a mask asks of one query and of one key, read once for many of the other.
struct Asking {
  int place, limit, document;  // place: position; for PLAIN the last key that is visible, in `limit`
};

template <Kind KIND>
__device__ __forceinline__ Asking asking(const Problem& p, int b, int query) {
  if constexpr (KIND == PLAIN) {
    const int last = p.causal ? p.q_offset + query - p.k_offset : p.t - 1;
    return {0, min(last, p.t - 1), 0};
  } else {
    const int64_t at = (int64_t)b * p.s + min(query, p.s - 1);
    return {p.q_offset + query - p.k_offset, p.limit[at], p.asking[at]};
  }
}

template <Kind KIND>
__device__ __forceinline__ Asking asked(const Problem& p, int b, int key) {
  if constexpr (KIND == PLAIN) return {0, key, 0};
  const int64_t at = (int64_t)b * p.t + min(key, p.t - 1);
  return {key, key < p.t ? p.order[at] : INT32_MAX, p.asked[at]};
}

template <Kind KIND>
__device__ __forceinline__ bool visible(const Problem& p, const Asking& query, const Asking& key) {
  if constexpr (KIND == PLAIN) return key.limit <= query.limit;
  const int apart = query.place - key.place;
  return key.place < p.t && key.limit <= query.limit && key.document == query.document &&
         (!p.window || (apart < p.window && apart > -p.window));
}

// 0 or gain.
__device__ __forceinline__ float kept(const Problem& p, uint64_t sample, uint32_t site, int query, int key) {
  const uint32_t place = (uint32_t)(p.k_offset + key);
  const uint4 w = philox(make_uint4((uint32_t)sample, (uint32_t)(p.q_offset + query), place >> 2, site),
                         make_uint2(p.key ^ (uint32_t)(sample >> 32), p.step));
  const uint32_t lane = place & 3, word = lane == 0 ? w.x : lane == 1 ? w.y : lane == 2 ? w.z : w.w;
  return word >= p.threshold ? p.gain : 0.0f;
}

// Of the bias, times log2(e), between one query and one key.
__device__ __forceinline__ float bias_of(const Problem& p, int head, int query, int key) {
  return p.bias[head * (int64_t)(p.s + p.t - 1) + p.s - 1 - min(query, p.s - 1) + min(key, p.t - 1)] * LOG2E;
}

// Element (r, 8 c) of a tile in shared memory; the chunks of a row are exchanged so that ldmatrix meets no bank twice.
template <int D>
__device__ __forceinline__ bf16* chunk(bf16* tile, int r, int c) {
  constexpr int CHUNKS = D / 8;
  const int turn = CHUNKS >= 8 ? r & 7 : r >> 1 & 3;
  return tile + r * D + ((c ^ turn) * 8);
}

// The same for a warp's lanes, in bytes: where (r, c) is, and (r + rows, c ^ more) from there, for numbers that the
// compiler knows: `rows` a multiple of 8 and `more` of 2. One register then serves a whole tile.
template <int D>
__device__ __forceinline__ int place_of(int r, int c) {
  return (int)((chunk<D>(nullptr, r, c) - (bf16*)nullptr) * sizeof(bf16));
}
template <int D>
__device__ __forceinline__ bf16* from_place(bf16* tile, int place, int rows, int more) {
  return (bf16*)((char*)tile + rows * D * (int)sizeof(bf16) + (place ^ (more * 16)));
}

// Rows [first, first + COUNT) of one head on their way to shared memory, zeros where there is none (unless all are known
// to be INSIDE). `head` is that head's first row; a thread has one place in a row, of every so many rows.
template <int D, int COUNT, int THREADS, bool INSIDE>
__device__ __forceinline__ void fetch(bf16* tile, const bf16* head, int stride, int first, int rows, int width) {
  constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
  static_assert(COUNT % STEP == 0, "every thread has as many rows");
  const int row = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
  const bf16* from = head + (int64_t)(first + row) * stride + c * 8;
  const int64_t step = (int64_t)STEP * stride;
#pragma unroll
  for (int i = 0; i < COUNT / STEP; i++, from += step) {
    const bool real = c * 8 < width && (INSIDE || first + row + i * STEP < rows);
    ptx::copy_async_16(chunk<D>(tile, row + i * STEP, c), INSIDE || real ? from : head, real);
  }
}

__device__ __forceinline__ const bf16* head_of(const Rows& x, int b, int head) { return x.at + b * x.batch + head * x.head; }

// sum [M][N]: 16 M rows from `row` of `left` by 8 N rows of `right`, += products of their features.
template <int D, int M, int N>
__device__ __forceinline__ void along_features(float (&sum)[M][N][4], bf16* left, int row, bf16* right) {
  const int lane = threadIdx.x % 32, of_a = place_of<D>(row + lane % 16, lane / 16);
  const int of_b = place_of<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) ptx::load_matrices<false>(a[m], from_place<D>(left, of_a, 16 * m, k * 2));
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t b[4];
      ptx::load_matrices<false>(b, from_place<D>(right, of_b, j * 8, k * 2));
#pragma unroll
      for (int m = 0; m < M; m++) {
        ptx::multiply_add(sum[m][j], a[m], b[0], b[1]);
        ptx::multiply_add(sum[m][j + 1], a[m], b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ uint32_t two(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// sum [16 M x 8 F] += a (fragments of 16 M rows by 16 of k) times rows [k, k + 16) of `right` at features from 8 c on,
// c a multiple of F, a power of two.
template <int D, int M, int F>
__device__ __forceinline__ void along_rows(float (&sum)[M][F][4], const uint32_t (&a)[M][4], bf16* right, int k, int c) {
  const int lane = threadIdx.x % 32, place = place_of<D>(lane % 16, c + lane / 16);
#pragma unroll
  for (int j = 0; j < F; j += 2) {
    uint32_t b[4];
    ptx::load_matrices<true>(b, from_place<D>(right, place, k, j));
#pragma unroll
    for (int m = 0; m < M; m++) {
      ptx::multiply_add(sum[m][j], a[m], b[0], b[1]);
      ptx::multiply_add(sum[m][j + 1], a[m], b[2], b[3]);
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[m][j][e] = 0;
}

// Rows g and g + 8 of 16 of x, times factor[0] and factor[1], to [row, batch, heads, width] at features from `first` on.
template <int F>
__device__ __forceinline__ void write(const Problem& p, void* out, const float (&x)[F][4], const float (&factor)[2], int b,
                                      int head, int heads, int row, int rows, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int at = row + lane / 4 + 8 * h;
    if (at >= rows) continue;
    const int64_t start = (((int64_t)at * p.batch + b) * heads + head) * p.width + first + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < F; j++) {
      if (first + j * 8 >= p.width) break;
      const float left = x[j][2 * h] * factor[h], right = x[j][2 * h + 1] * factor[h];
      if (p.wide) *reinterpret_cast<float2*>((float*)out + start + j * 8) = make_float2(left, right);
      else *reinterpret_cast<uint32_t*>((bf16*)out + start + j * 8) = two(left, right);
    }
  }
}

}  // namespace attention
