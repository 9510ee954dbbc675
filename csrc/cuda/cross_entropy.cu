// Cross-entropy over the columns of the vocabulary that a rank holds; formulas in megapre/kernels/cross_entropy.py.
// Not yet executed on a GPU.
//
// A block takes a row. Vocabulary in parallel: `statistics` (one read), the caller's exchange, `gradient` in place (one
// read, one write). One rank with the whole vocabulary: `fused` does all of it with the row kept on the chip, in
// registers or in shared memory: one read, one write. Pad columns, from `valid` on, are not read and get 0.
#include "common.cuh"

namespace {

constexpr int THREADS = 256, FUSED_THREADS = 1024;
template <class T>
constexpr int HELD = sizeof(T) == 4 ? 16 : 32;  // logits a thread keeps in registers

struct Loss {
  int64_t stride;  // elements from row to row
  int columns, valid;
  float smoothing, share;  // share: smoothing / global vocabulary
  float z_loss;
};

__device__ __forceinline__ float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }
__device__ __forceinline__ float exponential(float x) { return ptx::exp2(x * LOG2E); }

// p (1 + 2 z lse) - (1 - s) [target] - s / V, times the row's scale.
struct Row {
  float on_p, constant, on_target;
  __device__ Row(const Loss& loss, float lse, float scale)
      : on_p(scale * (1.0f + 2.0f * loss.z_loss * lse)), constant(scale * loss.share), on_target(scale * (1.0f - loss.smoothing)) {}
};

// Zero for the pad columns: one by one up to a multiple of N, then N at a time.
template <class T, int N>
__device__ __forceinline__ void clear(T* row, int first, int columns) {
  const int whole = min((first + N - 1) / N * N, columns);
  if (first + (int)threadIdx.x < whole) narrow(row[first + threadIdx.x], 0.0f);
#pragma unroll 1
  for (int i = whole + threadIdx.x * N; i < columns; i += blockDim.x * N) store<T, N>(row + i, zeros<T, N>());
}

// A thread's share of a row's max, sum of exponentials and sum; the sum is rescaled when a later column is larger.
struct Share {
  float top = -INFINITY, sum = 0, linear = 0;
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    float larger = top;
#pragma unroll
    for (int k = 0; k < N; k++) larger = fmaxf(larger, x[k]), linear += x[k];
    const float shift = shift_of(larger);
    sum *= exponential(top - shift);
#pragma unroll
    for (int k = 0; k < N; k++) sum += exponential(x[k] - shift);
    top = larger;
  }
};

// Max, sum of exp(logit - max), the target's logit and the sum of the logits, fp32 [rows] each. Columns that fill no
// pack of N are taken one by one.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    statistics(const T* __restrict__ logits, const int64_t* __restrict__ targets, float* __restrict__ top_out,
               float* __restrict__ sum_out, float* __restrict__ picked_out, float* __restrict__ linear_out, Loss loss) {
  SHARED(float, shared, 3 * 32);
  const T* row = logits + blockIdx.x * loss.stride;
  const int whole = loss.valid / N * N;
  Share share;
#pragma unroll 2
  for (int i = threadIdx.x * N; i < whole; i += THREADS * N) {
    float x[N];
    load_wide<T, N>(row + i, x);
    share.add(x);
  }
  if (whole + (int)threadIdx.x < loss.valid) {
    const float x[1] = {widen(row[whole + threadIdx.x])};
    share.add(x);
  }
  const float top = block_reduce(share.top, shared, -INFINITY, Max()), shift = shift_of(top);
  const float sum = block_reduce(share.sum * exponential(share.top - shift), shared + 32, 0.0f, Add());
  const float linear = block_reduce(share.linear, shared + 64, 0.0f, Add());
  if (threadIdx.x == 0) {
    const int64_t target = targets[blockIdx.x];
    top_out[blockIdx.x] = top, sum_out[blockIdx.x] = sum, linear_out[blockIdx.x] = linear;
    picked_out[blockIdx.x] = target >= 0 && target < loss.valid ? widen(row[target]) : 0.0f;
  }
}

// The row's logits become their gradient. Rows of scale 0 (ignored tokens) become exact zeros, whatever they hold.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    gradient(T* __restrict__ logits, const int64_t* __restrict__ targets, const float* __restrict__ lse_in,
             const float* __restrict__ scale_in, Loss loss) {
  T* row = logits + blockIdx.x * loss.stride;
  const float lse = lse_in[blockIdx.x], scale = scale_in[blockIdx.x];
  if (scale == 0.0f) return clear<T, N>(row, 0, loss.columns);
  const Row r(loss, lse, scale);
  const int whole = loss.valid / N * N;
  const int64_t target = targets[blockIdx.x];
  const bool ours = target >= 0 && target < loss.valid && threadIdx.x == 0;
  const float picked = ours ? widen(row[target]) : 0.0f;
  __syncthreads();  // the target's logit has been read
#pragma unroll 2
  for (int i = threadIdx.x * N; i < whole; i += THREADS * N) {
    float x[N];
    load_wide<T, N>(row + i, x);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = exponential(x[k] - lse) * r.on_p - r.constant;
    store_narrow(row + i, x);
  }
  const int last = whole + threadIdx.x;
  if (last < loss.valid) narrow(row[last], exponential(widen(row[last]) - lse) * r.on_p - r.constant);
  clear<T, N>(row, loss.valid, loss.columns);
  __syncthreads();  // every column is written; one of them again
  if (ours) narrow(row[target], exponential(picked - lse) * r.on_p - r.constant - r.on_target);
}

// What `fused` writes about a row besides its gradient.
struct Sums {
  float *lse, *picked, *linear;
};

__device__ __forceinline__ void write_sums(const Sums& out, float lse, float picked, float linear) {
  out.lse[blockIdx.x] = lse, out.picked[blockIdx.x] = picked, out.linear[blockIdx.x] = linear;
}

// Statistics and gradient, HELD logits a thread in registers, and one of the columns that fill no pack.
template <class T>
__global__ void __launch_bounds__(FUSED_THREADS)
    fused_registers(T* __restrict__ logits, const int64_t* __restrict__ targets, const float* __restrict__ scale_in,
                    Sums out, Loss loss) {
  constexpr int N = LANES<T>, PACKS = HELD<T> / N;
  SHARED(float, shared, 3 * 32);
  SHARED(float, picked, 1);  // registers are short: thread 0 keeps the target's logit here
  T* row = logits + blockIdx.x * loss.stride;
  const int whole = loss.valid / N * N, last = whole + threadIdx.x;
  const float scale = scale_in[blockIdx.x];
  if (threadIdx.x == 0) {
    const int64_t target = targets[blockIdx.x];
    *picked = target >= 0 && target < loss.valid ? widen(row[target]) : 0.0f;
  }
  float extra = last < loss.valid ? widen(row[last]) : -INFINITY;
  float x[PACKS][N], top = extra, sum = 0, linear = last < loss.valid ? extra : 0.0f;
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
    const int i = (threadIdx.x + j * blockDim.x) * N;
#pragma unroll
    for (int k = 0; k < N; k++) x[j][k] = -INFINITY;
    if (i < whole) load_wide<T, N>(row + i, x[j]);
  }
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
#pragma unroll
    for (int k = 0; k < N; k++) top = fmaxf(top, x[j][k]);
  }
  if (loss.share != 0.0f) {
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
      if ((int)(threadIdx.x + j * blockDim.x) * N < whole) {
#pragma unroll
        for (int k = 0; k < N; k++) linear += x[j][k];
      }
    }
    linear = block_reduce(linear, shared + 64, 0.0f, Add());
  }
  top = shift_of(block_reduce(top, shared, -INFINITY, Max()));
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
#pragma unroll
    for (int k = 0; k < N; k++) x[j][k] = exponential(x[j][k] - top), sum += x[j][k];
  }
  extra = exponential(extra - top);
  sum = block_reduce(sum + extra, shared + 32, 0.0f, Add());
  const float lse = top + LN2 * ptx::log2(sum);
  if (threadIdx.x == 0) write_sums(out, lse, *picked, linear);
  const bool live = scale != 0.0f;  // a row that does not count is cleared, whatever it holds
  const int end = live ? whole : 0;
  const Row r(loss, lse, scale);
  const float on_e = r.on_p * ptx::reciprocal(sum);
#pragma unroll
  for (int j = 0; j < PACKS; j++) {
    const int i = (threadIdx.x + j * blockDim.x) * N;
    if (i < end) {
#pragma unroll
      for (int k = 0; k < N; k++) x[j][k] = x[j][k] * on_e - r.constant;
      store_narrow(row + i, x[j]);
    }
  }
  if (live && last < loss.valid) narrow(row[last], extra * on_e - r.constant);
  clear<T, N>(row, live ? loss.valid : 0, loss.columns);
  __syncthreads();  // every column is written; one of them again
  if (live && threadIdx.x == 0) {
    const int64_t target = targets[blockIdx.x];
    if (target >= 0 && target < loss.valid)
      narrow(row[target], exponential(*picked - top) * on_e - r.constant - r.on_target);
  }
}

// The same with the row in shared memory: it comes by cp.async in two halves, and the first is searched for its largest
// logit while the second is on its way. A thread reads only what it copied itself.
template <class T>
__global__ void __launch_bounds__(FUSED_THREADS)
    fused_shared(T* __restrict__ logits, const int64_t* __restrict__ targets, const float* __restrict__ scale_in,
                 Sums out, Loss loss) {
  constexpr int N = LANES<T>;
  DYNAMIC_SHARED(T, kept);
  SHARED(float, shared, 3 * 32);
  T* row = logits + blockIdx.x * loss.stride;
  const int step = FUSED_THREADS * N, first = threadIdx.x * N;
  const int whole = loss.valid / N * N, middle = whole / (2 * step) * step, last = whole + threadIdx.x;
  const int64_t target = targets[blockIdx.x];
  const bool ours = target >= 0 && target < loss.valid && threadIdx.x == 0;
  const float picked = ours ? widen(row[target]) : 0.0f, scale = scale_in[blockIdx.x];
  for (int i = first; i < middle; i += step) ptx::copy_async_16(kept + i, row + i, true);
  ptx::copy_commit();
  for (int i = middle + first; i < whole; i += step) ptx::copy_async_16(kept + i, row + i, true);
  ptx::copy_commit();
  float extra = last < loss.valid ? widen(row[last]) : -INFINITY;
  float top = extra, sum = 0, linear = last < loss.valid ? extra : 0.0f;
  auto search = [&](int from, int to) {
#pragma unroll 2
    for (int i = from; i < to; i += step) {
      float x[N];
      load_wide<T, N>(kept + i, x);
#pragma unroll
      for (int k = 0; k < N; k++) top = fmaxf(top, x[k]), linear += x[k];
    }
  };
  ptx::copy_wait<1>();
  search(first, middle);
  ptx::copy_wait<0>();
  search(middle + first, whole);
  top = shift_of(block_reduce(top, shared, -INFINITY, Max()));
  linear = block_reduce(linear, shared + 64, 0.0f, Add());
#pragma unroll 2
  for (int i = first; i < whole; i += step) {
    float x[N];
    load_wide<T, N>(kept + i, x);
#pragma unroll
    for (int k = 0; k < N; k++) sum += exponential(x[k] - top);
  }
  extra = exponential(extra - top);
  sum = block_reduce(sum + extra, shared + 32, 0.0f, Add());
  const float lse = top + LN2 * ptx::log2(sum);
  if (threadIdx.x == 0) write_sums(out, lse, picked, linear);
  const bool live = scale != 0.0f;  // a row that does not count is cleared, whatever it holds
  const int end = live ? whole : 0;
  const Row r(loss, lse, scale);
  const float on_e = r.on_p * ptx::reciprocal(sum);
#pragma unroll 2
  for (int i = first; i < end; i += step) {
    float x[N];
    load_wide<T, N>(kept + i, x);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = exponential(x[k] - top) * on_e - r.constant;
    store_narrow(row + i, x);
  }
  if (live && last < loss.valid) narrow(row[last], extra * on_e - r.constant);
  clear<T, N>(row, live ? loss.valid : 0, loss.columns);
  __syncthreads();  // every column is written; one of them again
  if (live && ours) narrow(row[target], exponential(picked - top) * on_e - r.constant - r.on_target);
}

template <class T>
bool whole_packs(const T* logits, const Loss& loss) {
  return aligned(logits) && loss.stride % LANES<T> == 0 && loss.columns % LANES<T> == 0;
}

template <class T>
void run_statistics(const T* logits, const int64_t* targets, float* out, int64_t rows, const Loss& loss, cudaStream_t stream) {
  const dim3 grid((unsigned)rows), block(THREADS);
  float *top = out, *sum = out + rows, *picked = out + 2 * rows, *linear = out + 3 * rows;
  if (whole_packs(logits, loss))
    LAUNCH((statistics<T, LANES<T>>), grid, block, 0, stream, logits, targets, top, sum, picked, linear, loss);
  else
    LAUNCH((statistics<T, 1>), grid, block, 0, stream, logits, targets, top, sum, picked, linear, loss);
}

template <class T>
void run_gradient(T* logits, const int64_t* targets, const float* lse, const float* scale, int64_t rows,
                  const Loss& loss, cudaStream_t stream) {
  const dim3 grid((unsigned)rows), block(THREADS);
  if (whole_packs(logits, loss)) LAUNCH((gradient<T, LANES<T>>), grid, block, 0, stream, logits, targets, lse, scale, loss);
  else LAUNCH((gradient<T, 1>), grid, block, 0, stream, logits, targets, lse, scale, loss);
}

// Whether the row fits on the chip, and then runs it.
template <class T>
bool run_fused(T* logits, const int64_t* targets, const float* scale, float* out, int64_t rows, const Loss& loss,
               cudaStream_t stream) {
  const Sums sums{out, out + rows, out + 2 * rows};
  if (!whole_packs(logits, loss)) return false;
  if (loss.valid <= HELD<T> * FUSED_THREADS) {
    const int threads = (int)ceil_div(ceil_div(std::max(loss.valid, 1), HELD<T>), 32) * 32;
    LAUNCH((fused_registers<T>), dim3((unsigned)rows), dim3((unsigned)threads), 0, stream, logits, targets, scale, sums, loss);
    return true;
  }
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int bytes = (int)(ceil_div(loss.valid, LANES<T>) * 16);
  if (bytes + 3 * 32 * (int)sizeof(float) > most) return false;
  if (cudaFuncSetAttribute(fused_shared<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return false;
  LAUNCH((fused_shared<T>), dim3((unsigned)rows), dim3(FUSED_THREADS), (size_t)bytes, stream, logits, targets, scale, sums, loss);
  return true;
}

}  // namespace

// out: fp32 [4, rows]: max, sum of exp(logit - max), the target's logit (0 where not ours), sum of the logits.
MEGAPRE_EXPORT int megapre_cross_entropy_statistics(const void* logits, const void* targets, void* out, int64_t rows,
                                                    int64_t columns, int64_t stride, int64_t valid, int type,
                                                    void* stream_) {
  if (rows == 0) return 0;
  const auto stream = (cudaStream_t)stream_;
  const auto* t = (const int64_t*)targets;
  const Loss loss{stride, (int)columns, (int)valid, 0, 0, 0};
  if (type == BF16) run_statistics((const bf16*)logits, t, (float*)out, rows, loss, stream);
  else if (type == FP16) run_statistics((const fp16*)logits, t, (float*)out, rows, loss, stream);
  else run_statistics((const float*)logits, t, (float*)out, rows, loss, stream);
  return (int)cudaGetLastError();
}

// In place. lse and scale fp32 [rows]; share is smoothing over the global number of real columns.
MEGAPRE_EXPORT int megapre_cross_entropy_gradient(void* logits, const void* targets, const void* lse,
                                                  const void* scale, int64_t rows, int64_t columns, int64_t stride,
                                                  int64_t valid, float smoothing, float share, float z_loss, int type,
                                                  void* stream_) {
  if (rows == 0) return 0;
  const auto stream = (cudaStream_t)stream_;
  const auto* t = (const int64_t*)targets;
  const auto *l = (const float*)lse, *s = (const float*)scale;
  const Loss loss{stride, (int)columns, (int)valid, smoothing, share, z_loss};
  if (type == BF16) run_gradient((bf16*)logits, t, l, s, rows, loss, stream);
  else if (type == FP16) run_gradient((fp16*)logits, t, l, s, rows, loss, stream);
  else run_gradient((float*)logits, t, l, s, rows, loss, stream);
  return (int)cudaGetLastError();
}

// Statistics and gradient of a whole vocabulary in place; out fp32 [3, rows]: lse, the target's logit, sum of the logits
// (when share is not 0). Returns -1, having done nothing, where a row does not fit on the chip or into 16-byte accesses.
MEGAPRE_EXPORT int megapre_cross_entropy_fused(void* logits, const void* targets, const void* scale, void* out,
                                               int64_t rows, int64_t columns, int64_t stride, int64_t valid,
                                               float smoothing, float share, float z_loss, int type, void* stream_) {
  if (rows == 0) return 0;
  const auto stream = (cudaStream_t)stream_;
  const auto* t = (const int64_t*)targets;
  const auto* s = (const float*)scale;
  const Loss loss{stride, (int)columns, (int)valid, smoothing, share, z_loss};
  bool done;
  if (type == BF16) done = run_fused((bf16*)logits, t, s, (float*)out, rows, loss, stream);
  else if (type == FP16) done = run_fused((fp16*)logits, t, s, (float*)out, rows, loss, stream);
  else done = run_fused((float*)logits, t, s, (float*)out, rows, loss, stream);
  return done ? (int)cudaGetLastError() : -1;
}
