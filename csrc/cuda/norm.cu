// Entry points of the norms: which kernel of norm.cuh a call gets. Not yet executed on a GPU.
#include "norm.cuh"

namespace {

using namespace norms;

constexpr int COLUMNS = 32, GROUPS = 8;

// Columns of partial [blocks, width], eight rows at a time, into the weight's gradient; blockIdx.y: weight, bias.
__global__ void __launch_bounds__(COLUMNS* GROUPS)
    sum_columns(const float* __restrict__ partial, void* __restrict__ weight, void* __restrict__ bias, int blocks,
                int width, int type) {
  SHARED(float, shared, COLUMNS * GROUPS);
  const int column = blockIdx.x * COLUMNS + threadIdx.x;
  const float* from = partial + blockIdx.y * (int64_t)blocks * width;
  float total = 0;
  if (column < width)
    for (int b = threadIdx.y; b < blocks; b += GROUPS) total += from[b * (int64_t)width + column];
  shared[threadIdx.y * COLUMNS + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
#pragma unroll
  for (int g = 1; g < GROUPS; g++) total += shared[g * COLUMNS + threadIdx.x];
  void* out = blockIdx.y ? bias : weight;
  if (type == BF16) narrow(((bf16*)out)[column], total);
  else if (type == FP16) narrow(((fp16*)out)[column], total);
  else ((float*)out)[column] = total;
}

struct Forward {
  const void *x, *residual, *weight, *bias;
  void *y, *h;
  float *mean, *rstd;
  int64_t rows;
  int width;
  float eps;
  cudaStream_t stream;
};

struct Backward {
  const void *grad, *grad_h, *x, *weight;
  const float *mean, *rstd;
  void* grad_x;
  float* partial;
  int rows, width, blocks;
  cudaStream_t stream;
};

// Packs and threads for a row: 8, 16 or 32 elements a thread, the fewest that `narrow` threads can hold (the last:
// `wide` threads); no packs where even that is too little.
struct Shape {
  int packs, threads;
};
template <class T>
Shape shape(int width, int narrow, int wide) {
  constexpr int UNIT = 8 / LANES<T>;
  const int packs = width / LANES<T>;
  for (int each = UNIT; each <= 4 * UNIT; each *= 2) {
    const int threads = (int)ceil_div(ceil_div(packs, each), 32) * 32;
    if (threads <= (each == 4 * UNIT ? wide : narrow)) return {each, threads};
  }
  return {0, 0};
}

template <class T, class W, int PACKS, bool LAYER>
void run(const Forward& a, int threads) {
  const dim3 grid((unsigned)a.rows), block((unsigned)threads);
  if (a.residual)
    LAUNCH((forward<T, W, PACKS, LAYER, true>), grid, block, 0, a.stream, (const T*)a.x, (const T*)a.residual,
           (const W*)a.weight, (const W*)a.bias, (T*)a.y, (T*)a.h, a.mean, a.rstd, a.width, 1.0f / a.width, a.eps);
  else
    LAUNCH((forward<T, W, PACKS, LAYER, false>), grid, block, 0, a.stream, (const T*)a.x, nullptr, (const W*)a.weight,
           (const W*)a.bias, (T*)a.y, nullptr, a.mean, a.rstd, a.width, 1.0f / a.width, a.eps);
}

template <class T, class W, int PACKS, bool LAYER>
void run(const Backward& a, int threads) {
  LAUNCH((backward<T, W, PACKS, LAYER>), dim3((unsigned)a.blocks), dim3((unsigned)threads), 0, a.stream,
         (const T*)a.grad, (const T*)a.grad_h, (const T*)a.x, (const W*)a.weight, a.mean, a.rstd, (T*)a.grad_x,
         a.partial, a.rows, a.width, 1.0f / a.width);
}

// Whether the row fits into registers, and then runs it. LayerNorm's backward pass has two sums a column, and
// holds 16 elements a thread at most.
template <class T, class W>
bool run(const Forward& a, bool layer) {
  constexpr int UNIT = 8 / LANES<T>;
  const Shape s = shape<T>(a.width, NARROW_THREADS, FORWARD_THREADS<T>);
  if (s.packs == UNIT) layer ? run<T, W, UNIT, true>(a, s.threads) : run<T, W, UNIT, false>(a, s.threads);
  else if (s.packs == 2 * UNIT) layer ? run<T, W, 2 * UNIT, true>(a, s.threads) : run<T, W, 2 * UNIT, false>(a, s.threads);
  else if (s.packs) layer ? run<T, W, 4 * UNIT, true>(a, s.threads) : run<T, W, 4 * UNIT, false>(a, s.threads);
  return s.packs != 0;
}

template <class T, class W>
bool run(const Backward& a, bool layer) {
  constexpr int UNIT = 8 / LANES<T>;
  Shape s = shape<T>(a.width, NARROW_THREADS, 0);
  if (!s.packs) s = shape<T>(a.width, BACKWARD_THREADS, layer ? 0 : BACKWARD_THREADS);
  if (s.packs == UNIT) layer ? run<T, W, UNIT, true>(a, s.threads) : run<T, W, UNIT, false>(a, s.threads);
  else if (s.packs == 2 * UNIT) layer ? run<T, W, 2 * UNIT, true>(a, s.threads) : run<T, W, 2 * UNIT, false>(a, s.threads);
  else if (s.packs) run<T, W, 4 * UNIT, false>(a, s.threads);
  return s.packs != 0;
}

template <class A>
bool run_wide(const A& a, bool layer, int type, int weight_type) {
  if (a.width % (type == FP32 ? 4 : 8)) return false;
  if (type == FP32 && weight_type == FP32) return run<float, float>(a, layer);
  if (type == BF16 && weight_type == BF16) return run<bf16, bf16>(a, layer);
  if (type == BF16 && weight_type == FP32) return run<bf16, float>(a, layer);
  if (type == FP16 && weight_type == FP16) return run<fp16, fp16>(a, layer);
  return false;
}

template <class T>
void plain(const Forward& a, bool layer, int weight_type) {
  LAUNCH((forward_plain<T>), dim3((unsigned)a.rows), dim3(PLAIN_THREADS), 0, a.stream, (const T*)a.x,
         (const T*)a.residual, a.weight, a.bias, (T*)a.y, (T*)a.h, a.mean, a.rstd, a.width, a.eps, (int)layer,
         weight_type);
}

template <class T>
void plain(const Backward& a, bool layer, int weight_type) {
  LAUNCH((backward_plain<T>), dim3((unsigned)a.blocks), dim3(PLAIN_THREADS), 0, a.stream, (const T*)a.grad,
         (const T*)a.grad_h, (const T*)a.x, a.weight, a.mean, a.rstd, (T*)a.grad_x, a.partial, a.rows, a.width,
         (int)layer, weight_type);
}

template <class A>
void any(const A& a, bool layer, int type, int weight_type) {
  if (type == BF16) plain<bf16>(a, layer, weight_type);
  else if (type == FP16) plain<fp16>(a, layer, weight_type);
  else plain<float>(a, layer, weight_type);
}

}  // namespace

// residual, bias, h and mean may be null; with a residual the statistics are those of h. Types: common.cuh.
MEGAPRE_EXPORT int megapre_norm_forward(const void* x, const void* residual, const void* weight, const void* bias,
                                        void* y, void* h, void* mean, void* rstd, int64_t rows, int64_t width,
                                        float eps, int layer, int type, int weight_type, void* stream) {
  if (rows == 0) return 0;
  const Forward a{x, residual, weight, bias, y, h, (float*)mean, (float*)rstd, rows, (int)width, eps,
                  (cudaStream_t)stream};
  const bool wide = aligned(x) && aligned(residual) && aligned(weight) && aligned(bias) && aligned(y) && aligned(h);
  if (!wide || !run_wide(a, layer, type, weight_type)) any(a, layer, type, weight_type);
  return (int)cudaGetLastError();
}

// partial: fp32 [1 + layer, blocks, width]; grad_weight and grad_bias have the weight's type.
MEGAPRE_EXPORT int megapre_norm_backward(const void* grad, const void* grad_h, const void* x, const void* weight,
                                         const void* mean, const void* rstd, void* grad_x, void* partial,
                                         void* grad_weight, void* grad_bias, int64_t rows, int64_t width,
                                         int64_t blocks, int layer, int type, int weight_type, void* stream_) {
  const auto stream = (cudaStream_t)stream_;
  const Backward a{grad, grad_h, x, weight, (const float*)mean, (const float*)rstd, grad_x, (float*)partial,
                   (int)rows, (int)width, (int)blocks, stream};
  const bool wide = aligned(grad) && aligned(grad_h) && aligned(x) && aligned(weight) && aligned(grad_x) && aligned(partial);
  if (!wide || !run_wide(a, layer, type, weight_type)) any(a, layer, type, weight_type);
  LAUNCH(sum_columns, dim3((unsigned)ceil_div(width, COLUMNS), layer ? 2 : 1), dim3(COLUMNS, GROUPS), 0, stream,
         (const float*)partial, grad_weight, grad_bias, (int)blocks, (int)width, weight_type);
  return (int)cudaGetLastError();
}
