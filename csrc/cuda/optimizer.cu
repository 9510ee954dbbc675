// AdamW (arXiv 1711.05101) over flat fp32 shards, and the sum of squares of a flat gradient.
// Not yet executed on a GPU.
#include "common.cuh"

namespace {

constexpr int THREADS = 256, SUM_THREADS = 512;

// What a step's update needs besides the shards, the same for every element.
struct alignas(16) Step {
  float decay;         // 1 - lr x weight_decay
  float rate;          // lr / (1 - beta1^step)
  float beta1, rest1;  // rest: 1 - beta, rounded once; 1 - 0.999f is wrong by 5e-5 of itself
  float beta2, rest2;
  float inverse_root;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float inverse;       // 1 / divisor
  float skip;
  float unused[2];
};

struct Settings {
  double lr, beta1, beta2, eps, weight_decay, step;
  const float *lr_at, *step_at, *divisor_at, *skip_at;  // 0-d tensors that take the place of numbers, or null
};

// One thread, fp64: learning rate, step count, divisor and skip flag live on the device, so that no step waits for the
// host; 1 - beta^step would lose half its digits in fp32.
__global__ void prepare(Step* out, Settings a) {
  const double lr = a.lr_at ? *a.lr_at : a.lr, step = a.step_at ? *a.step_at : a.step;
  *out = Step{(float)(1.0 - lr * a.weight_decay),
              (float)(lr / -expm1(step * log(a.beta1))),
              (float)a.beta1,
              (float)(1.0 - a.beta1),
              (float)a.beta2,
              (float)(1.0 - a.beta2),
              (float)(1.0 / sqrt(-expm1(step * log(a.beta2)))),
              (float)a.eps,
              a.divisor_at ? 1.0f / *a.divisor_at : 1.0f,
              a.skip_at ? *a.skip_at : 0.0f};
}

struct None {};

__device__ __forceinline__ void update(float& p, float g, float& m, float& v, const Step& s) {
  m = s.beta1 * m + s.rest1 * g;
  v = s.beta2 * v + s.rest2 * (g * g);
  p = p * s.decay - s.rate * m * ptx::reciprocal(ptx::square_root(v) * s.inverse_root + s.eps);
}

// One pass: reads p, g, m, v, writes p, m, v and the copy `model` of type M. A set `skip` leaves all as it is.
template <class M, int N>
__global__ void __launch_bounds__(THREADS)
    adamw(float* __restrict__ master, const float* __restrict__ gradient, float* __restrict__ exp_avg,
          float* __restrict__ exp_avg_sq, M* __restrict__ model, const Step* __restrict__ step_in, int64_t count) {
  const Step step = *step_in;
  if (step.skip != 0.0f) return;
  const int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * N;
  if (i >= count) return;
  float p[N], g[N], m[N], v[N];
  load_wide<float, N>(master + i, p);
  load_wide<float, N>(gradient + i, g);
  load_wide<float, N>(exp_avg + i, m);
  load_wide<float, N>(exp_avg_sq + i, v);
#pragma unroll
  for (int k = 0; k < N; k++) update(p[k], g[k] * step.inverse, m[k], v[k], step);
  store_narrow(master + i, p);
  store_narrow(exp_avg + i, m);
  store_narrow(exp_avg_sq + i, v);
  if constexpr (sizeof(M) == 2) store_narrow(model + i, p);
}

template <class T, int N>
__global__ void __launch_bounds__(SUM_THREADS) squares(const T* __restrict__ flat, float* __restrict__ partial, int64_t count) {
  SHARED(float, shared, 32);
  const int64_t stride = (int64_t)gridDim.x * SUM_THREADS * N, whole = count / N * N;
  float total = 0;
#pragma unroll 2
  for (int64_t i = (blockIdx.x * (int64_t)SUM_THREADS + threadIdx.x) * N; i < whole; i += stride) {
    float x[N];
    load_wide<T, N>(flat + i, x);
#pragma unroll
    for (int k = 0; k < N; k++) total += x[k] * x[k];
  }
  if (blockIdx.x == 0 && whole + threadIdx.x < count) {
    const float x = widen(flat[whole + threadIdx.x]);
    total += x * x;
  }
  total = block_reduce(total, shared, 0.0f, Add());
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One warp, fixed order, fp64. found_inf is raised (never lowered) when the sum is not finite.
__global__ void __launch_bounds__(32)
    finish_squares(const float* __restrict__ partial, float* __restrict__ out, float* __restrict__ found_inf, int blocks) {
  double total = 0;
  for (int i = threadIdx.x; i < blocks; i += 32) total += partial[i];
#pragma unroll
  for (int distance = 16; distance; distance >>= 1) total += __shfl_xor_sync(ALL, total, distance);
  if (threadIdx.x) return;
  *out = (float)total;
  if (found_inf && !isfinite((float)total)) *found_inf = 1.0f;
}

struct Shards {
  float* master;
  const float* gradient;
  float *exp_avg, *exp_avg_sq;
  void* model;
  const Step* step;
  int64_t count;
  cudaStream_t stream;
};

template <class M, int N>
void run(const Shards& a, int64_t first, int64_t count) {
  if (count == 0) return;
  LAUNCH((adamw<M, N>), dim3((unsigned)ceil_div(count, THREADS * N)), dim3(THREADS), 0, a.stream, a.master + first,
         a.gradient + first, a.exp_avg + first, a.exp_avg_sq + first, a.model ? (M*)a.model + first : nullptr, a.step,
         count);
}

// Four elements a thread, and the last three at most one by one.
template <class M>
void run(const Shards& a) {
  const bool wide = aligned(a.master) && aligned(a.gradient) && aligned(a.exp_avg) && aligned(a.exp_avg_sq) && aligned(a.model, 8);
  const int64_t whole = wide ? a.count / 4 * 4 : 0;
  run<M, 4>(a, 0, whole);
  run<M, 1>(a, whole, a.count - whole);
}

template <class T>
void sum(const void* flat, float* partial, int64_t count, int blocks, cudaStream_t stream) {
  if (aligned(flat))
    LAUNCH((squares<T, LANES<T>>), dim3((unsigned)blocks), dim3(SUM_THREADS), 0, stream, (const T*)flat, partial, count);
  else
    LAUNCH((squares<T, 1>), dim3((unsigned)blocks), dim3(SUM_THREADS), 0, stream, (const T*)flat, partial, count);
}

}  // namespace

// lr, step (from 1), divisor and skip: fp32 0-d tensors on the device, or null for the numbers beside them. model (of
// model_type) may be null. constants: 48 bytes to work in, 16-byte aligned.
MEGAPRE_EXPORT int megapre_adamw(void* master, const void* gradient, void* exp_avg, void* exp_avg_sq, void* model,
                                 void* constants, const void* lr_at, const void* step_at, const void* divisor_at,
                                 const void* skip_at, int64_t count, double lr, double step, double beta1,
                                 double beta2, double eps, double weight_decay, int model_type, void* stream_) {
  if (count == 0) return 0;
  const auto stream = (cudaStream_t)stream_;
  const Settings settings{lr, beta1, beta2, eps, weight_decay, step, (const float*)lr_at, (const float*)step_at,
                          (const float*)divisor_at, (const float*)skip_at};
  LAUNCH(prepare, dim3(1), dim3(1), 0, stream, (Step*)constants, settings);
  const Shards a{(float*)master, (const float*)gradient, (float*)exp_avg, (float*)exp_avg_sq, model,
                 (const Step*)constants, count, stream};
  if (!model) run<None>(a);
  else if (model_type == BF16) run<bf16>(a);
  else run<fp16>(a);
  return (int)cudaGetLastError();
}

// out: fp32 sum of squares of flat [count]; partial: fp32 [blocks]; found_inf (fp32) may be null, and becomes 1 where the sum is
// not finite.
MEGAPRE_EXPORT int megapre_square_sum(const void* flat, void* partial, void* out, void* found_inf, int64_t count,
                                      int64_t blocks, int type, void* stream_) {
  const auto stream = (cudaStream_t)stream_;
  if (type == BF16) sum<bf16>(flat, (float*)partial, count, (int)blocks, stream);
  else if (type == FP16) sum<fp16>(flat, (float*)partial, count, (int)blocks, stream);
  else sum<float>(flat, (float*)partial, count, (int)blocks, stream);
  LAUNCH(finish_squares, dim3(1), dim3(32), 0, stream, (const float*)partial, (float*)out, (float*)found_inf,
         (int)blocks);
  return (int)cudaGetLastError();
}
