// LayerNorm and RMSNorm, formulas in megapre/kernels/norm.py, each with an optional residual: h = x + residual (rounded
// to the type of x), y = norm(h). Statistics in fp32.
//
// A block takes a row and keeps it in registers, PACKS x 16 bytes a thread: one read. Widths or addresses that forbid
// 16-byte accesses, and rows too wide for registers, go to the plain kernels below, which read the row again.
#pragma once
#include "common.cuh"

namespace norms {

// Rows of up to 16 elements a thread take NARROW_THREADS, wider ones more.
constexpr int NARROW_THREADS = 256, BACKWARD_THREADS = 512, PLAIN_THREADS = 256;
template <class T>
constexpr int FORWARD_THREADS = sizeof(T) == 4 ? 512 : 1024;

// y, and what the backward pass needs: mean (LayerNorm) and 1/sqrt(mean square + eps), fp32 [rows].
template <class T, class W, int PACKS, bool LAYER, bool RESIDUAL>
__global__ void __launch_bounds__(PACKS * LANES<T> == 32 ? FORWARD_THREADS<T> : NARROW_THREADS,
                                  PACKS * LANES<T> == 32 ? 1 : sizeof(W) > sizeof(T) ? 6 - LAYER : 8 - 2 * LAYER)
    forward(const T* __restrict__ x, const T* __restrict__ residual, const W* __restrict__ weight,
            const W* __restrict__ bias, T* __restrict__ y, T* __restrict__ h, float* __restrict__ mean_out,
            float* __restrict__ rstd_out, int width, float over_width, float eps) {
  constexpr int N = LANES<T>;
  SHARED(float, sums, 32);
  SHARED(float, squares, 32);
  const int64_t row = blockIdx.x * (int64_t)width;
  Raw<T, N> kept[PACKS];
  float total = 0;
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
    const int i = (threadIdx.x + j * blockDim.x) * N;
    kept[j] = zeros<T, N>();
    if (i < width) {
      kept[j] = load<T, N>(x + row + i);
      if constexpr (RESIDUAL) {
        float a[N], b[N];
        unpack(kept[j], a);
        load_wide(residual + row + i, b);
#pragma unroll
        for (int k = 0; k < N; k++) a[k] += b[k];
        kept[j] = pack(a, T());
        store(h + row + i, kept[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      const float value = widen(kept[j].element[k]);
      total += LAYER ? value : value * value;
    }
  }
  total = block_reduce(total, sums, 0.0f, Add()) * over_width;
  float mean = 0, spread = total;
  if constexpr (LAYER) {
    mean = total, spread = 0;
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
      if ((int)(threadIdx.x + j * blockDim.x) * N < width) {
#pragma unroll
        for (int k = 0; k < N; k++) {
          const float centred = widen(kept[j].element[k]) - mean;
          spread += centred * centred;
        }
      }
    }
    spread = block_reduce(spread, squares, 0.0f, Add()) * over_width;
  }
  const float rstd = rsqrtf(spread + eps);
  // No branch on the bias inside the loop: the compiler would double the code.
  const W* shift = LAYER && bias ? bias : weight;
  const float with_bias = bias ? 1.0f : 0.0f, offset = mean * rstd;
  if (threadIdx.x == 0) {
    rstd_out[blockIdx.x] = rstd;
    if constexpr (LAYER) mean_out[blockIdx.x] = mean;
  }
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
    const int i = (threadIdx.x + j * blockDim.x) * N;
    if (i < width) {
      float value[N], w[N], b[N] = {};
      unpack(kept[j], value);
      load_wide(weight + i, w);
      if constexpr (LAYER) load_wide(shift + i, b);
#pragma unroll
      for (int k = 0; k < N; k++) value[k] = (value[k] * rstd - offset) * w[k] + (LAYER ? b[k] * with_bias : 0.0f);
      store_narrow(y + row + i, value);
    }
  }
}

// dx, and per block one partial row of the weight's (and bias's) gradient: partial fp32 [1 + LAYER, blocks, width].
// A block takes rows blockIdx, blockIdx + gridDim, ...; each column belongs to one thread, so the sum has one order.
// `grad_h` (may be null) is what flows into h past the norm; it is added to dx.
template <class T, class W, int PACKS, bool LAYER>
__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward(const T* __restrict__ grad, const T* __restrict__ grad_h, const T* __restrict__ x,
             const W* __restrict__ weight, const float* __restrict__ mean_in, const float* __restrict__ rstd_in,
             T* __restrict__ grad_x, float* __restrict__ partial, int rows, int width, float over_width) {
  constexpr int N = LANES<T>;
  SHARED(float2, sums, 2 * (BACKWARD_THREADS / 32));
  float along_weight[PACKS][N] = {}, along_bias[LAYER ? PACKS : 1][N] = {};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int turn = 0;
  for (int row = blockIdx.x; row < rows; row += gridDim.x, turn ^= BACKWARD_THREADS / 32) {
    const int64_t start = row * (int64_t)width;
    const float rstd = rstd_in[row], mean = LAYER ? mean_in[row] : 0.0f;
    Raw<T, N> in[PACKS], up[PACKS];
    float with_x = 0, alone = 0;
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
      const int i = (threadIdx.x + j * blockDim.x) * N;
      in[j] = up[j] = zeros<T, N>();
      if (i < width) in[j] = load<T, N>(x + start + i), up[j] = load<T, N>(grad + start + i);
    }
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
      const int i = (threadIdx.x + j * blockDim.x) * N;
      if (i >= width) break;
      float w[N];
      load_wide(weight + i, w);
#pragma unroll
      for (int k = 0; k < N; k++) {
        const float xhat = (widen(in[j].element[k]) - mean) * rstd, d = widen(up[j].element[k]), dw = d * w[k];
        with_x += dw * xhat;
        along_weight[j][k] += d * xhat;
        if constexpr (LAYER) alone += dw, along_bias[j][k] += d;
      }
    }
    with_x = warp_reduce(with_x, Add());
    if constexpr (LAYER) alone = warp_reduce(alone, Add());
    // Two buffers by turns: a warp may be a row ahead of another, never two.
    if (lane == 0) sums[turn + warp] = make_float2(with_x, alone);
    __syncthreads();
    const float2 sum = lane < warps ? sums[turn + lane] : make_float2(0, 0);
    with_x = warp_reduce(sum.x, Add()) * over_width;
    if constexpr (LAYER) alone = warp_reduce(sum.y, Add()) * over_width;
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
      const int i = (threadIdx.x + j * blockDim.x) * N;
      if (i >= width) break;
      float w[N], out[N];
      load_wide(weight + i, w);
#pragma unroll
      for (int k = 0; k < N; k++) {
        const float xhat = (widen(in[j].element[k]) - mean) * rstd;
        out[k] = (widen(up[j].element[k]) * w[k] - alone - xhat * with_x) * rstd;
      }
      if (grad_h) {
        load_wide(grad_h + start + i, w);
#pragma unroll
        for (int k = 0; k < N; k++) out[k] += w[k];
      }
      store_narrow(grad_x + start + i, out);
    }
  }
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
    const int i = (threadIdx.x + j * blockDim.x) * N;
    if (i >= width) break;
    float* to = partial + blockIdx.x * (int64_t)width + i;
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      *(float4*)(to + k) = float4{along_weight[j][k], along_weight[j][k + 1], along_weight[j][k + 2], along_weight[j][k + 3]};
      if constexpr (LAYER)
        *(float4*)(to + gridDim.x * (int64_t)width + k) =
            float4{along_bias[j][k], along_bias[j][k + 1], along_bias[j][k + 2], along_bias[j][k + 3]};
    }
  }
}

__device__ __forceinline__ float weight_at(const void* weight, int type, int i) {
  if (type == BF16) return widen(((const bf16*)weight)[i]);
  if (type == FP16) return widen(((const fp16*)weight)[i]);
  return ((const float*)weight)[i];
}

// Any width, alignment and type of weight; the row is read once for each sum and once for the result.
template <class T>
__global__ void __launch_bounds__(PLAIN_THREADS)
    forward_plain(const T* x, const T* residual, const void* weight, const void* bias, T* y, T* h, float* mean_out,
                  float* rstd_out, int width, float eps, int layer, int weight_type) {
  SHARED(float, sums, 32);
  SHARED(float, squares, 32);
  const int64_t row = blockIdx.x * (int64_t)width;
  const T* from = residual ? h : x;
  float total = 0, mean = 0;
  for (int i = threadIdx.x; i < width; i += PLAIN_THREADS) {
    if (residual) narrow(h[row + i], widen(x[row + i]) + widen(residual[row + i]));
    const float value = widen(from[row + i]);
    total += layer ? value : value * value;
  }
  total = block_reduce(total, sums, 0.0f, Add()) / width;
  if (layer) {
    mean = total;
    float spread = 0;
    for (int i = threadIdx.x; i < width; i += PLAIN_THREADS) {
      const float centred = widen(from[row + i]) - mean;
      spread += centred * centred;
    }
    total = block_reduce(spread, squares, 0.0f, Add()) / width;
  }
  const float rstd = rsqrtf(total + eps);
  if (threadIdx.x == 0) {
    rstd_out[blockIdx.x] = rstd;
    if (layer) mean_out[blockIdx.x] = mean;
  }
  for (int i = threadIdx.x; i < width; i += PLAIN_THREADS) {
    const float shift = bias ? weight_at(bias, weight_type, i) : 0.0f;
    narrow(y[row + i], (widen(from[row + i]) - mean) * rstd * weight_at(weight, weight_type, i) + shift);
  }
}

template <class T>
__global__ void __launch_bounds__(PLAIN_THREADS)
    backward_plain(const T* grad, const T* grad_h, const T* x, const void* weight, const float* mean_in,
                   const float* rstd_in, T* grad_x, float* partial, int rows, int width, int layer, int weight_type) {
  SHARED(float, first, 32);
  SHARED(float, second, 32);
  float *mine = partial + blockIdx.x * (int64_t)width, *bias = mine + gridDim.x * (int64_t)width;
  for (int i = threadIdx.x; i < width; i += PLAIN_THREADS) {
    mine[i] = 0;
    if (layer) bias[i] = 0;
  }
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t start = row * (int64_t)width;
    const float rstd = rstd_in[row], mean = layer ? mean_in[row] : 0.0f;
    float with_x = 0, alone = 0;
    for (int i = threadIdx.x; i < width; i += PLAIN_THREADS) {
      const float xhat = (widen(x[start + i]) - mean) * rstd, d = widen(grad[start + i]);
      const float dw = d * weight_at(weight, weight_type, i);
      with_x += dw * xhat;
      alone += dw;
      mine[i] += d * xhat;
      if (layer) bias[i] += d;
    }
    __syncthreads();  // the last row's sums have been read
    with_x = block_reduce(with_x, first, 0.0f, Add()) / width;
    alone = layer ? block_reduce(alone, second, 0.0f, Add()) / width : 0.0f;
    for (int i = threadIdx.x; i < width; i += PLAIN_THREADS) {
      const float xhat = (widen(x[start + i]) - mean) * rstd;
      const float dw = widen(grad[start + i]) * weight_at(weight, weight_type, i);
      const float past = grad_h ? widen(grad_h[start + i]) : 0.0f;
      narrow(grad_x[start + i], (dw - alone - xhat * with_x) * rstd + past);
    }
  }
}

}  // namespace norms
