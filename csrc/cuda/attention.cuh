// Attention of bf16 without a matrix of scores (arXiv 2307.08691); formula and masks: megapre/kernels/attention.py.
//
// A block of four warps takes 64 rows, 16 a warp, and goes through tiles of the other side, two of them in shared memory:
// one is multiplied (mma m16n8k16, fragments by ldmatrix) while cp.async brings the next. The backward pass is two
// kernels, one by queries for dq and one by keys for dk and dv: two products more than the fewest, but every sum has one
// owner and one order, without atomics.
#pragma once
#include "common.cuh"
#include "philox.cuh"

namespace attention {

constexpr int ROWS = 64, THREADS = 128;

// Strides in elements of x[row, batch, head, feature].
struct Rows {
  const bf16* at;
  int64_t row, batch, head;
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
  // With EXTRA: int32 [batch, s] and [batch, t], and the spans [batch, tiles] of 64 queries and of 64 keys.
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
  int wide;  // results in fp32
};

enum Sight { NOTHING, SOME, WHOLE };

// What a tile of 64 keys at `key` is to `count` queries from `query` on.
template <bool EXTRA>
__device__ __forceinline__ Sight sight(const Problem& p, int b, int query, int count, int key) {
  const int first = p.q_offset + query, last = first + count - 1, start = p.k_offset + key, stop = start + ROWS - 1;
  const bool inside = key + ROWS <= p.t && query + count <= p.s;
  if constexpr (!EXTRA) {
    if (p.causal && start > last) return NOTHING;
    return inside && (!p.causal || stop <= first) ? WHOLE : SOME;
  } else {
    const Span q = p.queries[b * ((p.s + ROWS - 1) / ROWS) + query / ROWS];
    const Span k = p.keys[b * ((p.t + ROWS - 1) / ROWS) + key / ROWS];
    if (k.first > q.last || k.from > q.to || k.to < q.from) return NOTHING;
    if (p.window && (first - stop >= p.window || start - last >= p.window)) return NOTHING;
    const bool near = !p.window || (last - start < p.window && stop - first < p.window);
    return inside && near && k.last <= q.first && k.from == k.to && q.from == q.to && k.from == q.from ? WHOLE : SOME;
  }
}

template <bool EXTRA>
__device__ __forceinline__ bool visible(const Problem& p, int b, int query, int key) {
  if (query >= p.s || key >= p.t) return false;
  const int apart = p.q_offset + query - p.k_offset - key;
  if constexpr (!EXTRA) return !p.causal || apart >= 0;
  const int64_t at = (int64_t)b * p.s + query, other = (int64_t)b * p.t + key;
  return p.order[other] <= p.limit[at] && p.asked[other] == p.asking[at] &&
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

// Element (r, 8 c) of a tile in shared memory; the chunks of a row are exchanged so that ldmatrix meets no bank twice.
template <int D>
__device__ __forceinline__ bf16* chunk(bf16* tile, int r, int c) {
  constexpr int CHUNKS = D / 8;
  const int turn = CHUNKS >= 8 ? r & 7 : r >> 1 & 3;
  return tile + r * D + ((c ^ turn) * 8);
}

// Rows [first, first + COUNT) of one head on their way to shared memory; zeros where there is none.
template <int D, int COUNT>
__device__ __forceinline__ void fetch(bf16* tile, const Rows& x, int b, int head, int first, int rows, int width) {
  const bf16* from = x.at + b * x.batch + head * x.head;
#pragma unroll
  for (int i = threadIdx.x; i < COUNT * (D / 8); i += THREADS) {
    const int r = i / (D / 8), c = i % (D / 8);
    const bool real = first + r < rows && c * 8 < width;
    ptx::copy_async_16(chunk<D>(tile, r, c), from + (real ? (first + r) * x.row + c * 8 : 0), real);
  }
}

// sum [16 x 8 N] += a (rows of `left`, 16 from `row`) times the rows of `right`, transposed: products of features.
template <int D, int N>
__device__ __forceinline__ void along_features(float (&sum)[N][4], bf16* left, int row, bf16* right) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < D / 16; k += 2) {
    uint32_t a[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++) ptx::load_matrices<false>(a[h], chunk<D>(left, row + lane % 16, (k + h) * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < N; j++) {
      uint32_t b[4];
      ptx::load_matrices<false>(b, chunk<D>(right, j * 8 + lane % 8, k * 2 + lane / 8));
      ptx::multiply_add(sum[j], a[0], b[0], b[1]);
      ptx::multiply_add(sum[j], a[1], b[2], b[3]);
    }
  }
}

// The same with the left rows' fragments already in registers.
template <int D, int N>
__device__ __forceinline__ void along_features(float (&sum)[N][4], const uint32_t (&a)[D / 16][4], bf16* right) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < N; j++) {
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) {
      uint32_t b[4];
      ptx::load_matrices<false>(b, chunk<D>(right, j * 8 + lane % 8, k * 2 + lane / 8));
      ptx::multiply_add(sum[j], a[k], b[0], b[1]);
      ptx::multiply_add(sum[j], a[k + 1], b[2], b[3]);
    }
  }
}

__device__ __forceinline__ uint32_t two(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// sum [16 x D] += w [16 x 8 N], rounded to bf16, times the first 8 N rows of `right`.
template <int D, int N>
__device__ __forceinline__ void along_rows(float (&sum)[D / 8][4], const float (&w)[N][4], bf16* right) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    const uint32_t a[4] = {two(w[2 * k][0], w[2 * k][1]), two(w[2 * k][2], w[2 * k][3]),
                           two(w[2 * k + 1][0], w[2 * k + 1][1]), two(w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t b[4];
      ptx::load_matrices<true>(b, chunk<D>(right, k * 16 + lane % 16, j + lane / 16));
      ptx::multiply_add(sum[j], a, b[0], b[1]);
      ptx::multiply_add(sum[j + 1], a, b[2], b[3]);
    }
  }
}

template <int N>
__device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[j][e] = 0;
}

// Rows g and g + 8 of a warp's 16 of x, times factor[0] and factor[1], to [row, batch, heads, width].
template <int D>
__device__ __forceinline__ void write(const Problem& p, void* out, const float (&x)[D / 8][4], const float (&factor)[2],
                                      int b, int head, int heads, int row, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int at = row + lane / 4 + 8 * h;
    if (at >= rows) continue;
    const int64_t start = (((int64_t)at * p.batch + b) * heads + head) * p.width + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      if (j * 8 >= p.width) break;
      const float left = x[j][2 * h] * factor[h], right = x[j][2 * h + 1] * factor[h];
      if (p.wide) *reinterpret_cast<float2*>((float*)out + start + j * 8) = make_float2(left, right);
      else *reinterpret_cast<uint32_t*>((bf16*)out + start + j * 8) = two(left, right);
    }
  }
}

// --- forward --------------------------------------------------------------------------------------------------------

template <int D, bool EXTRA>
__global__ void __launch_bounds__(THREADS) forward(const Problem p) {
  constexpr int N = ROWS / 8;
  constexpr bool KEEP = D <= 128;  // the queries' fragments stay in registers
  DYNAMIC_SHARED(bf16, memory);
  bf16 *queries = memory, *keys = queries + ROWS * D, *values = keys + 2 * ROWS * D;
  const int b = blockIdx.z, head = blockIdx.y, query = (gridDim.x - 1 - blockIdx.x) * ROWS;  // long rows first
  const int group = head / (p.heads / p.groups), tiles = (p.t + ROWS - 1) / ROWS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16;
  float sum[D / 8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  clear(sum);
  const float slope = p.scale * LOG2E;
  const auto next = [&](int tile) {
    while (tile < tiles && sight<EXTRA>(p, b, query, ROWS, tile * ROWS) == NOTHING) tile++;
    return tile;
  };
  int tile = next(0), turn = 0;
  fetch<D, ROWS>(queries, p.q, b, head, query, p.s, p.width);
  if (tile < tiles) {
    fetch<D, ROWS>(keys, p.k, b, group, tile * ROWS, p.t, p.width);
    fetch<D, ROWS>(values, p.v, b, group, tile * ROWS, p.t, p.width);
  }
  ptx::copy_commit();
  uint32_t own[KEEP ? D / 16 : 1][4];
  bool first = true;
  while (tile < tiles) {
    const int following = next(tile + 1);
    if (following < tiles) {
      fetch<D, ROWS>(keys + (turn ^ 1) * ROWS * D, p.k, b, group, following * ROWS, p.t, p.width);
      fetch<D, ROWS>(values + (turn ^ 1) * ROWS * D, p.v, b, group, following * ROWS, p.t, p.width);
    }
    ptx::copy_commit();
    ptx::copy_wait<1>();
    __syncthreads();  // every thread's part of this tile has arrived
    float score[N][4];
    clear(score);
    if constexpr (KEEP) {
      if (first) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) ptx::load_matrices<false>(own[k], chunk<D>(queries, row + lane % 16, k * 2 + lane / 16));
        first = false;
      }
      along_features<D, N>(score, own, keys + turn * ROWS * D);
    } else {
      along_features<D, N>(score, queries, row, keys + turn * ROWS * D);
    }
    if (EXTRA && p.bias) {
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int i = min(query + row + lane / 4 + e / 2 * 8, p.s - 1);
          const int k = min(tile * ROWS + j * 8 + lane % 4 * 2 + e % 2, p.t - 1);
          score[j][e] += p.bias[head * (int64_t)(p.s + p.t - 1) + p.s - 1 - i + k] / p.scale;
        }
    }
    if (sight<EXTRA>(p, b, query, ROWS, tile * ROWS) != WHOLE) {
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (!visible<EXTRA>(p, b, query + row + lane / 4 + e / 2 * 8, tile * ROWS + j * 8 + lane % 4 * 2 + e % 2))
            score[j][e] = -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = top[h];
#pragma unroll
      for (int j = 0; j < N; j++) most = fmaxf(most, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
      const float base = most == -INFINITY ? 0.0f : most * slope;  // a row that has read nothing yet
      const float factor = ptx::exp2(top[h] * slope - base);
      top[h] = most;
      total[h] *= factor;
#pragma unroll
      for (int j = 0; j < D / 8; j++) sum[j][2 * h] *= factor, sum[j][2 * h + 1] *= factor;
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          score[j][e] = ptx::exp2(score[j][e] * slope - base);
          total[h] += score[j][e];
        }
    }
    if (EXTRA && p.sites) {
      const uint64_t sample = (uint64_t)p.samples[b];
      const uint32_t site = (uint32_t)p.sites[head];
      uint32_t bits = 0;  // a loop that is not unrolled may not index the scores, or they would leave the registers
#pragma unroll 1
      for (int i = 0; i < 4 * N; i++) {
        const int at = query + row + lane / 4 + i % 4 / 2 * 8, key = tile * ROWS + i / 4 * 8 + lane % 4 * 2 + i % 2;
        bits |= (uint32_t)(kept(p, sample, site, at, key) != 0.0f) << i;
      }
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) score[j][e] = bits >> (4 * j + e) & 1 ? score[j][e] * p.gain : 0.0f;
    }
    along_rows<D, N>(sum, score, values + turn * ROWS * D);
    __syncthreads();  // before the tile is overwritten
    tile = following;
    turn ^= 1;
  }
  ptx::copy_wait<0>();
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    total[h] += __shfl_xor_sync(ALL, total[h], 1);
    total[h] += __shfl_xor_sync(ALL, total[h], 2);
    factor[h] = total[h] == 0 ? 0.0f : 1.0f / total[h];
    const int at = query + row + lane / 4 + 8 * h;
    if (lane % 4 == 0 && at < p.s)
      p.lse[((int64_t)b * p.heads + head) * p.s + at] =
          total[h] == 0 ? -INFINITY : top[h] * p.scale + ptx::log2(total[h]) * LN2;
  }
  write<D>(p, p.out, sum, factor, b, head, p.heads, query + row, p.s);
}

// --- backward -------------------------------------------------------------------------------------------------------

// One score and the gradient of its weight become the weight (as it leaves dropout) and the gradient of the score.
template <bool EXTRA>
__device__ __forceinline__ void differentiate(const Problem& p, int b, int head, int query, int key, bool seen, float lse,
                                              float delta, float& score, float& inner) {
  float raw = score * p.scale * LOG2E;
  if (EXTRA && p.bias)
    raw += p.bias[head * (int64_t)(p.s + p.t - 1) + p.s - 1 - min(query, p.s - 1) + min(key, p.t - 1)] * LOG2E;
  const float weight = seen ? ptx::exp2(raw - lse) : 0.0f;
  const float factor = EXTRA && p.sites ? kept(p, (uint64_t)p.samples[b], (uint32_t)p.sites[head], query, key) : 1.0f;
  score = weight * factor;
  inner = weight * (inner * factor - delta);
}

// lse in base 2, and delta of one query; a query that reads nothing has weights 0.
__device__ __forceinline__ void statistics(const Problem& p, int b, int head, int query, float& lse, float& delta) {
  const int64_t at = ((int64_t)b * p.heads + head) * p.s + min(query, p.s - 1);
  lse = p.lse[at];
  const bool reads = query < p.s && lse > -INFINITY;
  lse = reads ? lse * LOG2E : INFINITY;
  delta = reads ? p.delta[at] : 0.0f;
}

// dq of 64 queries.
template <int D, bool EXTRA>
__global__ void __launch_bounds__(THREADS) backward_queries(const Problem p) {
  constexpr int COUNT = D <= 128 ? ROWS : ROWS / 2, N = COUNT / 8;  // keys a tile
  DYNAMIC_SHARED(bf16, memory);
  bf16 *queries = memory, *grads = queries + ROWS * D, *keys = grads + ROWS * D, *values = keys + 2 * COUNT * D;
  const int b = blockIdx.z, head = blockIdx.y, query = (gridDim.x - 1 - blockIdx.x) * ROWS;
  const int group = head / (p.heads / p.groups), tiles = (p.t + COUNT - 1) / COUNT;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  float sum[D / 8][4], lse[2], delta[2];
  clear(sum);
  for (int h = 0; h < 2; h++) statistics(p, b, head, query + row + lane / 4 + 8 * h, lse[h], delta[h]);
  const auto next = [&](int tile) {
    while (tile < tiles && sight<EXTRA>(p, b, query, ROWS, tile * COUNT / ROWS * ROWS) == NOTHING) tile++;
    return tile;
  };
  int tile = next(0), turn = 0;
  fetch<D, ROWS>(queries, p.q, b, head, query, p.s, p.width);
  fetch<D, ROWS>(grads, p.grad, b, head, query, p.s, p.width);
  if (tile < tiles) {
    fetch<D, COUNT>(keys, p.k, b, group, tile * COUNT, p.t, p.width);
    fetch<D, COUNT>(values, p.v, b, group, tile * COUNT, p.t, p.width);
  }
  ptx::copy_commit();
  while (tile < tiles) {
    const int following = next(tile + 1);
    if (following < tiles) {
      fetch<D, COUNT>(keys + (turn ^ 1) * COUNT * D, p.k, b, group, following * COUNT, p.t, p.width);
      fetch<D, COUNT>(values + (turn ^ 1) * COUNT * D, p.v, b, group, following * COUNT, p.t, p.width);
    }
    ptx::copy_commit();
    ptx::copy_wait<1>();
    __syncthreads();
    float score[N][4], inner[N][4];
    clear(score);
    clear(inner);
    along_features<D, N>(score, queries, row, keys + turn * COUNT * D);
    along_features<D, N>(inner, grads, row, values + turn * COUNT * D);
    const bool whole = sight<EXTRA>(p, b, query, ROWS, tile * COUNT / ROWS * ROWS) == WHOLE;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = query + row + lane / 4 + e / 2 * 8, k = tile * COUNT + j * 8 + lane % 4 * 2 + e % 2;
        differentiate<EXTRA>(p, b, head, i, k, whole || visible<EXTRA>(p, b, i, k), lse[e / 2], delta[e / 2], score[j][e], inner[j][e]);
      }
    along_rows<D, N>(sum, inner, keys + turn * COUNT * D);
    __syncthreads();
    tile = following;
    turn ^= 1;
  }
  ptx::copy_wait<0>();
  const float factor[2] = {p.scale, p.scale};
  write<D>(p, p.out, sum, factor, b, head, p.heads, query + row, p.s);
}

// dk and dv (KEYS, VALUES: which of them) of 64 keys, over all query heads that read them. The scores are transposed.
template <int D, bool EXTRA, bool KEYS, bool VALUES>
__global__ void __launch_bounds__(THREADS) backward_keys(const Problem p) {
  constexpr int COUNT = D <= 64 ? ROWS : ROWS / 2, N = COUNT / 8;  // queries a tile
  DYNAMIC_SHARED(bf16, memory);
  bf16 *keys = memory, *values = keys + ROWS * D, *queries = values + ROWS * D, *grads = queries + 2 * COUNT * D;
  const int b = blockIdx.z, group = blockIdx.y, key = blockIdx.x * ROWS;
  const int each = p.heads / p.groups, tiles = (p.s + COUNT - 1) / COUNT, steps = each * tiles;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  float dk[KEYS ? D / 8 : 1][4], dv[VALUES ? D / 8 : 1][4];
  clear(dk);
  clear(dv);
  // Steps go through the heads of the group, and in each through its tiles of queries.
  const auto next = [&](int step) {
    while (step < steps && sight<EXTRA>(p, b, step % tiles * COUNT, COUNT, key) == NOTHING) step++;
    return step;
  };
  const auto bring = [&](int step, int to) {
    const int head = group * each + step / tiles, query = step % tiles * COUNT;
    fetch<D, COUNT>(queries + to * COUNT * D, p.q, b, head, query, p.s, p.width);
    fetch<D, COUNT>(grads + to * COUNT * D, p.grad, b, head, query, p.s, p.width);
  };
  int step = next(0), turn = 0;
  fetch<D, ROWS>(keys, p.k, b, group, key, p.t, p.width);
  fetch<D, ROWS>(values, p.v, b, group, key, p.t, p.width);
  if (step < steps) bring(step, 0);
  ptx::copy_commit();
  while (step < steps) {
    const int following = next(step + 1), head = group * each + step / tiles, query = step % tiles * COUNT;
    if (following < steps) bring(following, turn ^ 1);
    ptx::copy_commit();
    ptx::copy_wait<1>();
    __syncthreads();
    float score[N][4], inner[N][4];
    clear(score);
    clear(inner);
    along_features<D, N>(score, keys, row, queries + turn * COUNT * D);
    if (KEYS) along_features<D, N>(inner, values, row, grads + turn * COUNT * D);
    const bool whole = sight<EXTRA>(p, b, query, COUNT, key) == WHOLE;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int i = query + j * 8 + lane % 4 * 2 + c;
        float lse, delta;
        statistics(p, b, head, i, lse, delta);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int k = key + row + lane / 4 + 8 * h;
          differentiate<EXTRA>(p, b, head, i, k, whole || visible<EXTRA>(p, b, i, k), lse, delta, score[j][2 * h + c], inner[j][2 * h + c]);
        }
      }
    if constexpr (VALUES) along_rows<D, N>(dv, score, grads + turn * COUNT * D);
    if constexpr (KEYS) along_rows<D, N>(dk, inner, queries + turn * COUNT * D);
    __syncthreads();
    step = following;
    turn ^= 1;
  }
  ptx::copy_wait<0>();
  const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
  if constexpr (KEYS) write<D>(p, p.dk, dk, scale, b, group, p.groups, key + row, p.t);
  if constexpr (VALUES) write<D>(p, p.dv, dv, one, b, group, p.groups, key + row, p.t);
}

}  // namespace attention
