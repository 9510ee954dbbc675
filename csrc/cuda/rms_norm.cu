// RMSNorm, forward and backward; formulas in megapre/kernels/norm.py. One block of 256 threads a row, 16 bytes a load
// where the width allows it, statistics in fp32. Not yet executed on a GPU.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int THREADS = 256;

// N elements of T as fp32; N x sizeof(T) is 16 bytes, or N is 1.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T element[N];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float& y, float x) { y = x; }
__device__ __forceinline__ void narrow(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

// Sum over the block, returned to every thread. The first barrier keeps a later call from overwriting `shared` early.
__device__ float block_sum(float x) {
  __shared__ float shared[THREADS / 32];
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < THREADS / 32; i++) total += shared[i];
  return total;
}

template <class T, int N>
__global__ void forward(const T* x, const float* weight, T* y, float* rstd, int64_t width, float eps) {
  using P = Pack<T, N>;
  const P* in = (const P*)(x + blockIdx.x * width);
  P* out = (P*)(y + blockIdx.x * width);
  float squares = 0;
  for (int64_t i = threadIdx.x; i < width / N; i += THREADS) {
    const P p = in[i];
#pragma unroll
    for (int k = 0; k < N; k++) squares += widen(p.element[k]) * widen(p.element[k]);
  }
  const float inverse = 1.0f / sqrtf(block_sum(squares) / width + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = inverse;
  for (int64_t i = threadIdx.x; i < width / N; i += THREADS) {
    P p = in[i];
#pragma unroll
    for (int k = 0; k < N; k++) narrow(p.element[k], widen(p.element[k]) * inverse * weight[i * N + k]);
    out[i] = p;
  }
}

// A block takes rows blockIdx, blockIdx + gridDim, ...; partial [gridDim, width] gets its share of the weight's
// gradient, each column owned by one thread, so the sum has one order.
template <class T, int N>
__global__ void backward(const T* grad, const T* x, const float* weight, const float* rstd, T* grad_x, float* partial,
                         int64_t rows, int64_t width) {
  using P = Pack<T, N>;
  float* mine = partial + blockIdx.x * width;
  for (int64_t i = threadIdx.x; i < width / N; i += THREADS)
    for (int k = 0; k < N; k++) mine[i * N + k] = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const P *in = (const P*)(x + row * width), *up = (const P*)(grad + row * width);
    P* out = (P*)(grad_x + row * width);
    const float inverse = rstd[row];
    float along = 0;
    for (int64_t i = threadIdx.x; i < width / N; i += THREADS) {
      const P a = in[i], g = up[i];
#pragma unroll
      for (int k = 0; k < N; k++) {
        const float xhat = widen(a.element[k]) * inverse, d = widen(g.element[k]);
        along += d * weight[i * N + k] * xhat;
        mine[i * N + k] += d * xhat;
      }
    }
    const float mean = block_sum(along) / width;
    for (int64_t i = threadIdx.x; i < width / N; i += THREADS) {
      const P a = in[i], g = up[i];
      P p;
#pragma unroll
      for (int k = 0; k < N; k++) {
        const float scaled = widen(g.element[k]) * weight[i * N + k];
        narrow(p.element[k], (scaled - widen(a.element[k]) * inverse * mean) * inverse);
      }
      out[i] = p;
    }
  }
}

__global__ void sum_columns(const float* partial, float* out, int64_t blocks, int64_t width) {
  const int64_t column = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (column >= width) return;
  float total = 0;
  for (int64_t b = 0; b < blocks; b++) total += partial[b * width + column];
  out[column] = total;
}

template <class T, int N>
void run_forward(const void* x, const float* weight, void* y, float* rstd, int64_t rows, int64_t width, float eps,
                 cudaStream_t stream) {
  forward<T, N><<<(unsigned)rows, THREADS, 0, stream>>>((const T*)x, weight, (T*)y, rstd, width, eps);
}

template <class T, int N>
void run_backward(const void* grad, const void* x, const float* weight, const float* rstd, void* grad_x,
                  float* partial, int64_t rows, int64_t width, int64_t blocks, cudaStream_t stream) {
  backward<T, N><<<(unsigned)blocks, THREADS, 0, stream>>>((const T*)grad, (const T*)x, weight, rstd, (T*)grad_x,
                                                           partial, rows, width);
}

bool aligned(const void* p) { return (uintptr_t)p % 16 == 0; }

}  // namespace

extern "C" __attribute__((visibility("default"))) int megapre_rms_norm_forward(
    const void* x, const void* weight, void* y, void* rstd, int64_t rows, int64_t width, float eps, int64_t half,
    void* stream_) {
  if (rows == 0) return 0;
  const auto stream = (cudaStream_t)stream_;
  const float* w = (const float*)weight;
  const bool wide = aligned(x) && aligned(y) && width % (half ? 8 : 4) == 0;
  if (half && wide) run_forward<__nv_bfloat16, 8>(x, w, y, (float*)rstd, rows, width, eps, stream);
  else if (half) run_forward<__nv_bfloat16, 1>(x, w, y, (float*)rstd, rows, width, eps, stream);
  else if (wide) run_forward<float, 4>(x, w, y, (float*)rstd, rows, width, eps, stream);
  else run_forward<float, 1>(x, w, y, (float*)rstd, rows, width, eps, stream);
  return (int)cudaGetLastError();
}

extern "C" __attribute__((visibility("default"))) int megapre_rms_norm_backward(
    const void* grad, const void* x, const void* weight, const void* rstd, void* grad_x, void* partial,
    void* grad_weight, int64_t rows, int64_t width, int64_t blocks, int64_t half, void* stream_) {
  const auto stream = (cudaStream_t)stream_;
  const float *w = (const float*)weight, *r = (const float*)rstd;
  float* part = (float*)partial;
  const bool wide = aligned(x) && aligned(grad) && aligned(grad_x) && width % (half ? 8 : 4) == 0;
  if (half && wide) run_backward<__nv_bfloat16, 8>(grad, x, w, r, grad_x, part, rows, width, blocks, stream);
  else if (half) run_backward<__nv_bfloat16, 1>(grad, x, w, r, grad_x, part, rows, width, blocks, stream);
  else if (wide) run_backward<float, 4>(grad, x, w, r, grad_x, part, rows, width, blocks, stream);
  else run_backward<float, 1>(grad, x, w, r, grad_x, part, rows, width, blocks, stream);
  sum_columns<<<(unsigned)((width + 255) / 256), 256, 0, stream>>>(part, (float*)grad_weight, blocks, width);
  return (int)cudaGetLastError();
}
