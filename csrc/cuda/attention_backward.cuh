// Backward pass in five products: eight warps hold KEYS keys and values, and go through tiles of the queries that see
// them. Weights and the gradients of scores, transposed, lie in shared memory between the products: dv += w^T do,
// dk += g^T q, and dq, which is added to in memory. `splits` blocks share the keys of a head, each with a dq of its
// own, so every sum has one owner and one order: no atomics, and runs agree bit for bit.
#pragma once
#include "attention.cuh"

namespace attention {

constexpr int BACKWARD_THREADS = 256;

template <int D, Kind KIND>
struct BackwardShape {
  static constexpr int KEYS = D <= 128 ? 128 : 64, QUERIES = D <= 32 || (D == 64 && KIND == PLAIN) ? 64 : 32;
  static constexpr int PARTS = 8 * 16 / KEYS;  // warps that share 16 keys: of queries, then of features
  static constexpr int BYTES =
      ((2 * KEYS + 4 * QUERIES) * D + 2 * KEYS * QUERIES) * (int)sizeof(bf16) + 4 * QUERIES * (int)sizeof(float);
};

// One score and the gradient of its weight become the weight (as it leaves dropout) and the gradient of the score.
template <Kind KIND>
__device__ __forceinline__ void differentiate(const Problem& p, int b, int head, int query, int key, bool seen, float lse,
                                              float delta, float& score, float& inner) {
  float raw = score * (p.scale * LOG2E);
  if (KIND == EVERYTHING && p.bias) raw += bias_of(p, head, query, key);
  const float weight = seen ? ptx::exp2(raw - lse) : 0.0f;
  const float factor =
      KIND == EVERYTHING && p.sites ? kept(p, (uint64_t)p.samples[b], (uint32_t)p.sites[head], query, key) : 1.0f;
  score = weight * factor;
  inner = weight * (inner * factor - delta);
}

template <bool CUT>
struct Step {  // a tile that a mask or the end of the keys may cut, or a whole one
  static constexpr bool cut = CUT;
};

template <int D, Kind KIND>
__global__ void __launch_bounds__(BACKWARD_THREADS) backward(const Problem p) {
  using Shape = BackwardShape<D, KIND>;
  constexpr int KEYS = Shape::KEYS, QUERIES = Shape::QUERIES, PARTS = Shape::PARTS, T = BACKWARD_THREADS;
  constexpr int N = QUERIES / PARTS / 8, F = D / PARTS / 8;   // of scores, and of dk and dv, in a warp
  constexpr int ROWS = QUERIES / 16, G = D / 8 / (8 / ROWS);  // of dq: warps by queries, tiles of features
  DYNAMIC_SHARED(bf16, memory);
  bf16 *keys = memory, *values = keys + KEYS * D, *queries = values + KEYS * D, *grads = queries + 2 * QUERIES * D;
  bf16 *slopes = grads + 2 * QUERIES * D, *weights = slopes + KEYS * QUERIES;
  float* sums = (float*)(weights + KEYS * QUERIES);  // [2][lse, delta][QUERIES]
  const int b = blockIdx.z, group = blockIdx.y, each = p.heads / p.groups, tiles = (p.s + QUERIES - 1) / QUERIES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp % (KEYS / 16) * 16, part = warp / (KEYS / 16);
  const int g = lane / 4, t = lane % 4 * 2, place = warp % ROWS, first = warp / ROWS * G;
  for (int key = blockIdx.x * KEYS; key < p.t; key += p.splits * KEYS) {
    float dk[1][F][4], dv[1][F][4];
    clear(dk);
    clear(dv);
    Asking own[2];
    for (int h = 0; h < 2; h++) own[h] = asked<KIND>(p, b, key + row + g + 8 * h);
    __syncthreads();  // nobody reads the keys before these
    fetch<D, KEYS, T, false>(keys, head_of(p.k, b, group), p.k.row, key, p.t, p.width);
    fetch<D, KEYS, T, false>(values, head_of(p.v, b, group), p.v.row, key, p.t, p.width);
    for (int head = group * each; head < (group + 1) * each; head++) {
      const bf16 *from_q = head_of(p.q, b, head), *from_g = head_of(p.grad, b, head);
      const int64_t start = ((int64_t)b * p.heads + head) * p.padded;
      const float* from_sums = threadIdx.x < QUERIES / 4 ? p.lse + start + threadIdx.x * 4
                                                         : p.delta + start + (threadIdx.x - QUERIES / 4) * 4;
      float* dq = (float*)p.out + ((int64_t)blockIdx.x * p.batch * p.heads * p.padded + start + place * 16 + g) * D + first * 8 + t;
      const auto next = [&](int tile) {  // the first of the tiles from `tile` on that sees these keys
        while (tile < tiles && sight<KIND>(p, b, tile * QUERIES, QUERIES, key, KEYS) == NOTHING) tile++;
        return tile;
      };
      const auto bring = [&](int tile, int turn) {
        fetch<D, QUERIES, T, false>(queries + turn * QUERIES * D, from_q, p.q.row, tile * QUERIES, p.s, p.width);
        fetch<D, QUERIES, T, false>(grads + turn * QUERIES * D, from_g, p.grad.row, tile * QUERIES, p.s, p.width);
        if (threadIdx.x < QUERIES / 2)
          ptx::copy_async_16(sums + turn * 2 * QUERIES + threadIdx.x * 4, from_sums + tile * QUERIES, true);
      };
      const auto step = [&](auto kind, int tile, int following, int turn) {
        bf16 *q = queries + turn * QUERIES * D, *grad = grads + turn * QUERIES * D;
        ptx::copy_wait<0>();
        __syncthreads();  // this tile has arrived, and nobody reads the one before
        if (following < tiles) bring(following, turn ^ 1);
        ptx::copy_commit();
        float score[1][N][4], inner[1][N][4];
        clear(score);
        clear(inner);
        along_features<D>(score, keys, row, q + part * N * 8 * D);
        along_features<D>(inner, values, row, grad + part * N * 8 * D);
        const float *lse = sums + turn * 2 * QUERIES + part * N * 8 + t, *delta = lse + QUERIES;
        const auto differentiate_all = [&](auto cut) {
#pragma unroll
          for (int j = 0; j < N; j++) {
            const float2 shift = *(const float2*)(lse + j * 8), less = *(const float2*)(delta + j * 8);
#pragma unroll
            for (int c = 0; c < 2; c++) {
              const int i = tile * QUERIES + part * N * 8 + j * 8 + t + c;
              Asking mine;
              if (decltype(cut)::cut) mine = asking<KIND>(p, b, i);
#pragma unroll
              for (int h = 0; h < 2; h++) {
                const bool seen = !decltype(cut)::cut || visible<KIND>(p, mine, own[h]);
                differentiate<KIND>(p, b, head, i, key + row + g + 8 * h, seen, c ? shift.y : shift.x, c ? less.y : less.x,
                                    score[0][j][2 * h + c], inner[0][j][2 * h + c]);
              }
            }
          }
        };
        if (!decltype(kind)::cut || sight<KIND>(p, b, tile * QUERIES, QUERIES, key, KEYS) == WHOLE)
          differentiate_all(Step<false>());
        else
          differentiate_all(Step<true>());
        const auto keep = [&](bf16* tile, const float (&x)[N][4]) {
#pragma unroll
          for (int j = 0; j < N; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
              *(uint32_t*)(chunk<QUERIES>(tile, row + g + 8 * h, part * N + j) + t) = two(x[j][2 * h], x[j][2 * h + 1]);
        };
        keep(slopes, inner[0]);
        if constexpr (PARTS == 1) {  // a warp has all queries of its keys in registers
          const auto add = [&](float (&to)[1][F][4], const float (&x)[N][4], bf16* right) {
#pragma unroll
            for (int k = 0; k < QUERIES / 16; k++) {
              const uint32_t a[1][4] = {{two(x[2 * k][0], x[2 * k][1]), two(x[2 * k][2], x[2 * k][3]),
                                         two(x[2 * k + 1][0], x[2 * k + 1][1]), two(x[2 * k + 1][2], x[2 * k + 1][3])}};
              along_rows<D>(to, a, right, k * 16, 0);
            }
          };
          add(dv, score[0], grad);
          add(dk, inner[0], q);
          __syncthreads();  // every warp's slopes are there
        } else {
          keep(weights, score[0]);
          __syncthreads();  // every warp's weights and slopes are there
#pragma unroll
          for (int k = 0; k < QUERIES / 16; k++) {
            uint32_t a[1][4];
            ptx::load_matrices<false>(a[0], chunk<QUERIES>(weights, row + lane % 16, k * 2 + lane / 16));
            along_rows<D>(dv, a, grad, k * 16, part * F);
            ptx::load_matrices<false>(a[0], chunk<QUERIES>(slopes, row + lane % 16, k * 2 + lane / 16));
            along_rows<D>(dk, a, q, k * 16, part * F);
          }
        }
        float rows[1][G][4];
        clear(rows);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
          uint32_t a[1][4];
          ptx::load_matrices<true>(a[0], chunk<QUERIES>(slopes, k * 16 + lane % 8 + lane / 16 * 8, place * 2 + lane / 8 % 2));
          along_rows<D>(rows, a, keys, k * 16, first);
        }
        float* to = dq + (int64_t)tile * QUERIES * D;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int j = 0; j < G; j++) {
            float2* at = (float2*)(to + h * 8 * D + j * 8);
            *at = make_float2(at->x + rows[0][j][2 * h], at->y + rows[0][j][2 * h + 1]);
          }
      };
      int tile = next(0), turn = 0, cut = tiles;  // tiles from `cut` on need no mask
      if constexpr (KIND == PLAIN)
        if (key + KEYS <= p.t) cut = p.causal ? (max(p.k_offset + key + KEYS - 1 - p.q_offset, 0) + QUERIES - 1) / QUERIES : 0;
      if (tile < tiles) bring(tile, 0);
      ptx::copy_commit();
      while (tile < tiles && tile < cut) {
        const int following = KIND == PLAIN ? tile + 1 : next(tile + 1);
        step(Step<true>(), tile, following, turn);
        tile = following, turn ^= 1;
      }
      if constexpr (KIND == PLAIN) {  // two tiles a turn: where they lie is then known to the compiler
        if (turn && tile < tiles) step(Step<false>(), tile, tile + 1, 1), tile++;
        for (; tile + 1 < tiles; tile += 2) {
          step(Step<false>(), tile, tile + 1, 0);
          step(Step<false>(), tile + 1, tile + 2, 1);
        }
        if (tile < tiles) step(Step<false>(), tile, tile + 1, 0);
      }
      ptx::copy_wait<0>();
      __syncthreads();  // before the next head's tiles
    }
    const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
    write(p, p.dk, dk[0], scale, b, group, p.groups, key + row, p.t, part * F * 8);
    write(p, p.dv, dv[0], one, b, group, p.groups, key + row, p.t, part * F * 8);
  }
}

// Gradient of a learned bias: a block takes the tiles whose keys lie a number of tiles before or behind their queries,
// of all samples, and adds up their diagonals; two products more than the rest of the backward pass.
template <int D>
__global__ void __launch_bounds__(128) bias_gradient(const Problem p) {
  constexpr int N = SPAN / 8;
  DYNAMIC_SHARED(bf16, memory);
  bf16 *queries = memory, *grads = queries + SPAN * D, *keys = grads + SPAN * D, *values = keys + SPAN * D;
  float* slopes = (float*)(values + SPAN * D);  // [SPAN][SPAN + 1]
  const int head = blockIdx.y, group = head / (p.heads / p.groups), lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  const int tiles = (p.s + SPAN - 1) / SPAN, ahead = (int)blockIdx.x - (tiles - 1), g = lane / 4, t = lane % 4 * 2;
  const int first = max(0, -ahead), stop = min(tiles, (p.t + SPAN - 1) / SPAN - ahead);
  float sum = 0;
  for (int b = 0; b < p.batch; b++)
    for (int tile = first; tile < stop; tile++) {
      const int query = tile * SPAN, key = (tile + ahead) * SPAN;
      if (sight<EVERYTHING>(p, b, query, SPAN, key, SPAN) == NOTHING) continue;
      fetch<D, SPAN, 128, false>(queries, head_of(p.q, b, head), p.q.row, query, p.s, p.width);
      fetch<D, SPAN, 128, false>(grads, head_of(p.grad, b, head), p.grad.row, query, p.s, p.width);
      fetch<D, SPAN, 128, false>(keys, head_of(p.k, b, group), p.k.row, key, p.t, p.width);
      fetch<D, SPAN, 128, false>(values, head_of(p.v, b, group), p.v.row, key, p.t, p.width);
      ptx::copy_commit();
      ptx::copy_wait<0>();
      __syncthreads();  // the tiles have arrived
      float score[1][N][4], inner[1][N][4], lse[2], delta[2];
      clear(score);
      clear(inner);
      along_features<D>(score, queries, row, keys);
      along_features<D>(inner, grads, row, values);
      Asking mine[2];
      for (int h = 0; h < 2; h++) {
        const int i = query + row + g + 8 * h;
        const int64_t at = ((int64_t)b * p.heads + head) * p.padded + i;
        lse[h] = p.lse[at], delta[h] = p.delta[at];
        mine[h] = asking<EVERYTHING>(p, b, i);
      }
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int k = key + j * 8 + t + c;
          const Asking other = asked<EVERYTHING>(p, b, k);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float &s = score[0][j][2 * h + c], &d = inner[0][j][2 * h + c];
            const int i = row + g + 8 * h;
            differentiate<EVERYTHING>(p, b, head, query + i, k, visible<EVERYTHING>(p, mine[h], other), lse[h], delta[h], s, d);
            slopes[i * (SPAN + 1) + j * 8 + t + c] = d;
          }
        }
      __syncthreads();  // every slope is there
      const int apart = (int)threadIdx.x - (SPAN - 1);
      for (int i = max(0, -apart); i < min(SPAN, SPAN - apart); i++) sum += slopes[i * (SPAN + 1) + i + apart];
      __syncthreads();  // before the tiles are overwritten
    }
  p.dbias[((int64_t)head * gridDim.x + blockIdx.x) * 2 * SPAN + threadIdx.x] = sum;
}

}  // namespace attention
