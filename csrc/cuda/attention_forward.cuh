// Forward pass: a block takes ROWS queries through tiles of keys, from the last visible one to the first.
// One tile of keys and one of values lie in shared memory: values travel while scores are made, the next keys while
// weights meet values. Tiles that a mask cuts come first; the loop over whole tiles knows neither masks nor bounds.
#pragma once
#include "attention.cuh"

namespace attention {

template <int D, Kind KIND>
struct ForwardShape {
  static constexpr bool BIG = D == 128 && KIND == PLAIN;
  static constexpr int M = D <= 64 ? 2 : 1, THREADS = BIG ? 256 : 128;  // M: tiles of 16 queries a warp
  static constexpr int ROWS = THREADS / 2 * M;
  // As many keys as registers hold scores of beside D sums a query, without spills in the loop.
  static constexpr int KEYS = KIND != PLAIN ? 64 : D == 32 ? 96 : D == 64 ? 112 : D == 128 ? 128 : 32;
  static constexpr int BYTES = (ROWS + 2 * KEYS) * D * (int)sizeof(bf16);
};

// Bias and dropout of one tile of scores; these leave as raw scores, or as dropped weights.
template <int M, int N>
__device__ __forceinline__ void add_bias(const Problem& p, int head, int query, int key, float (&score)[M][N][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        score[m][j][e] += bias_of(p, head, query + 16 * m + lane / 4 + e / 2 * 8, key + j * 8 + lane % 4 * 2 + e % 2) /
                          (p.scale * LOG2E);
}

template <int M, int N>
__device__ __forceinline__ void drop(const Problem& p, int b, int head, int query, int key, float (&weight)[M][N][4]) {
  const int lane = threadIdx.x % 32;
  const uint64_t sample = (uint64_t)p.samples[b];
  const uint32_t site = (uint32_t)p.sites[head];
#pragma unroll
  for (int m = 0; m < M; m++) {
    uint32_t bits = 0;  // a loop that is not unrolled may not index the weights, or they would leave the registers
#pragma unroll 1
    for (int i = 0; i < 4 * N; i++) {
      const int at = query + 16 * m + lane / 4 + i % 4 / 2 * 8, to = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
      bits |= (uint32_t)(kept(p, sample, site, at, to) != 0.0f) << i;
    }
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) weight[m][j][e] = bits >> (4 * j + e) & 1 ? weight[m][j][e] * p.gain : 0.0f;
  }
}

template <bool CUT>
struct Tile {  // a tile that a mask or the end of the keys may cut, or a whole one
  static constexpr bool cut = CUT;
};

template <int D, Kind KIND>
__global__ void __launch_bounds__(ForwardShape<D, KIND>::THREADS) forward(const Problem p) {
  using Shape = ForwardShape<D, KIND>;
  constexpr int M = Shape::M, ROWS = Shape::ROWS, KEYS = Shape::KEYS, N = KEYS / 8, T = Shape::THREADS;
  DYNAMIC_SHARED(bf16, memory);
  bf16 *queries = memory, *keys = queries + ROWS * D, *values = keys + KEYS * D;
  const int b = blockIdx.z, head = blockIdx.y, query = (gridDim.x - 1 - blockIdx.x) * ROWS;  // long rows first
  const int group = head / (p.heads / p.groups), lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const bf16 *from_k = head_of(p.k, b, group), *from_v = head_of(p.v, b, group);
  const float slope = p.scale * LOG2E;
  float sum[M][D / 8][4], top[M][2], total[M][2];
  clear(sum);
  for (int m = 0; m < M; m++)
    for (int h = 0; h < 2; h++) top[m][h] = -INFINITY, total[m][h] = 0;
  // The last of the tiles up to `tile` that is visible, or -1.
  const auto visible_from = [&](int tile) {
    while (tile >= 0 && sight<KIND>(p, b, query, ROWS, tile * KEYS, KEYS) == NOTHING) tile--;
    return tile;
  };
  const auto step = [&](auto kind, int tile, int following) {
    constexpr bool CUT = decltype(kind)::cut;
    ptx::copy_wait<0>();
    __syncthreads();  // the keys have arrived, and nobody reads the values of the tile before
    fetch<D, KEYS, T, !CUT>(values, from_v, p.v.row, tile * KEYS, p.t, p.width);
    ptx::copy_commit();
    float score[M][N][4];
    clear(score);
    along_features<D>(score, queries, row, keys);
    ptx::copy_wait<0>();
    __syncthreads();  // the values have arrived, and nobody reads these keys any more
    if (following >= 0) fetch<D, KEYS, T, true>(keys, from_k, p.k.row, following * KEYS, p.t, p.width);
    ptx::copy_commit();
    if (KIND == EVERYTHING && p.bias) add_bias(p, head, query + row, tile * KEYS, score);
    if (CUT && sight<KIND>(p, b, query, ROWS, tile * KEYS, KEYS) != WHOLE) {
      Asking mine[M][2];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) mine[m][h] = asking<KIND>(p, b, query + row + 16 * m + lane / 4 + 8 * h);
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const Asking key = asked<KIND>(p, b, tile * KEYS + j * 8 + lane % 4 * 2 + c);
#pragma unroll
          for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++)
              if (!visible<KIND>(p, mine[m][h], key)) score[m][j][2 * h + c] = -INFINITY;
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float most = top[m][h];
#pragma unroll
        for (int j = 0; j < N; j++) most = fmaxf(most, fmaxf(score[m][j][2 * h], score[m][j][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
        const float base = CUT && most == -INFINITY ? 0.0f : most * slope;  // a row that has read nothing yet
        const float factor = ptx::exp2(top[m][h] * slope - base);
        float part = 0;
        top[m][h] = most;
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++) {
            score[m][j][e] = ptx::exp2(score[m][j][e] * slope - base);
            part = j == 0 && e == 2 * h ? score[m][j][e] : part + score[m][j][e];
          }
        total[m][h] = total[m][h] * factor + part;
#pragma unroll
        for (int j = 0; j < D / 8; j++) sum[m][j][2 * h] *= factor, sum[m][j][2 * h + 1] *= factor;
      }
    if (KIND == EVERYTHING && p.sites) drop(p, b, head, query + row, tile * KEYS, score);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[m][i] = two(score[m][2 * k + i / 2][i % 2 * 2], score[m][2 * k + i / 2][i % 2 * 2 + 1]);
      along_rows<D>(sum, a, values, k * 16, 0);
    }
  };
  int tile = (p.t + KEYS - 1) / KEYS - 1, whole = 0;  // tiles below `whole` need no mask
  if constexpr (KIND == PLAIN) {
    whole = p.t / KEYS;
    if (p.causal) {
      const int first = p.q_offset + query - p.k_offset + 1;  // keys that the first query reads, and that the last does
      tile = min(tile, first + ROWS - 1 <= 0 ? -1 : (first + ROWS - 2) / KEYS);
      whole = min(whole, max(first, 0) / KEYS);
    }
  } else {
    tile = visible_from(tile);
  }
  fetch<D, ROWS, T, false>(queries, head_of(p.q, b, head), p.q.row, query, p.s, p.width);
  if (tile >= 0) fetch<D, KEYS, T, false>(keys, from_k, p.k.row, tile * KEYS, p.t, p.width);
  ptx::copy_commit();
  while (tile >= whole) {
    const int following = KIND == PLAIN ? tile - 1 : visible_from(tile - 1);
    step(Tile<true>(), tile, following);
    tile = following;
  }
  if constexpr (KIND == PLAIN)
    for (; tile >= 0; tile--) step(Tile<false>(), tile, tile - 1);
  ptx::copy_wait<0>();
#pragma unroll
  for (int m = 0; m < M; m++) {
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float all = total[m][h];
      all += __shfl_xor_sync(ALL, all, 1);
      all += __shfl_xor_sync(ALL, all, 2);
      factor[h] = all == 0 ? 0.0f : 1.0f / all;
      const int at = query + row + 16 * m + lane / 4 + 8 * h;
      if (lane % 4 == 0 && at < p.s)
        p.lse[((int64_t)b * p.heads + head) * p.s + at] =
            all == 0 ? -INFINITY : top[m][h] * p.scale + ptx::log2(all) * LN2;
    }
    write(p, p.out, sum[m], factor, b, head, p.heads, query + row + 16 * m, p.s, 0);
  }
}

}  // namespace attention
