// Rotary positions of q and k in one launch; formulas in megapre/kernels/rope.py. Not yet executed on a GPU.
//
// A thread takes N pairs of features of one token, holds their cosines and sines, and turns them in every fourth head
// or so: the tables are read once a token, not once a head.
#include "common.cuh"

namespace {

constexpr int THREADS = 256, HEADS_EACH = 4;

// Turn N pairs, features [first, first + N) and [second, second + N), in heads head, head + blockDim.y, ...
template <class T, int N, bool INTERLEAVED>
__device__ __forceinline__ void turn(const T* from, T* to, int head, int heads, int dim, int first, int second,
                                     const float (&c)[N], const float (&s)[N]) {
  const int step = blockDim.y * dim;
  const T *a_at = from + head * dim + first, *b_at = from + head * dim + second;
  T *x_at = to + head * dim + first, *y_at = to + head * dim + second;
#pragma unroll 2
  for (; head < heads; head += blockDim.y, a_at += step, b_at += step, x_at += step, y_at += step) {
    float a[N], b[N], x[N], y[N];
    load_wide<T, N>(a_at, a);
    load_wide<T, N>(b_at, b);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if constexpr (INTERLEAVED) {
        // a then b are 2N neighbours; pair i is (2i, 2i + 1) of them.
        const int even = 2 * i, odd = 2 * i + 1;
        const float u = even < N ? a[even % N] : b[even % N], v = odd < N ? a[odd % N] : b[odd % N];
        (even < N ? x : y)[even % N] = u * c[i] - v * s[i];
        (odd < N ? x : y)[odd % N] = v * c[i] + u * s[i];
      } else {
        x[i] = a[i] * c[i] - b[i] * s[i], y[i] = b[i] * c[i] + a[i] * s[i];
      }
    }
    store_narrow(x_at, x);
    store_narrow(y_at, y);
  }
}

// threadIdx: x the N pairs, y the head, z the token inside the block. Offsets in elements: *_stride from token to token,
// heads are `dim` apart. in and out may be the same tensor: a thread reads what it writes, before it writes.
template <class T, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS)
    rotate(const T* q, const T* k, T* q_out, T* k_out, const float* __restrict__ cosines,
           const float* __restrict__ sines, int64_t q_stride, int64_t k_stride, int64_t q_out_stride,
           int64_t k_out_stride, int tokens, int q_heads, int k_heads, int dim, float sign) {
  const int half = dim / 2, token = blockIdx.x * blockDim.z + threadIdx.z;
  if (token >= tokens) return;
  for (int pair = (blockIdx.y * blockDim.x + threadIdx.x) * N; pair < half; pair += gridDim.y * blockDim.x * N) {
    float c[N], s[N];
    load_wide<float, N>(cosines + token * (int64_t)half + pair, c);
    load_wide<float, N>(sines + token * (int64_t)half + pair, s);
#pragma unroll
    for (int i = 0; i < N; i++) s[i] *= sign;
    const int first = INTERLEAVED ? 2 * pair : pair, second = INTERLEAVED ? 2 * pair + N : pair + half;
    turn<T, N, INTERLEAVED>(q + token * q_stride, q_out + token * q_out_stride, threadIdx.y, q_heads, dim, first, second, c, s);
    // Where q's heads do not end with a full round of threads, k's begin with the threads that are left.
    const int k_first = (threadIdx.y + blockDim.y - q_heads % blockDim.y) % blockDim.y;
    turn<T, N, INTERLEAVED>(k + token * k_stride, k_out + token * k_out_stride, k_first, k_heads, dim, first, second, c, s);
  }
}

struct Call {
  const void *q, *k;
  void *q_out, *k_out;
  const float *cosines, *sines;
  int64_t q_stride, k_stride, q_out_stride, k_out_stride;
  int tokens, q_heads, k_heads, dim;
  float sign;
  cudaStream_t stream;
};

template <class T, int N, bool INTERLEAVED>
void run(const Call& a) {
  const int groups = std::min((int)ceil_div(a.dim / 2, N), 32);
  const int rows = std::min((int)ceil_div(a.q_heads + a.k_heads, HEADS_EACH), THREADS / groups);
  const int tokens = std::min(std::max(1, THREADS / (groups * rows)), std::min(64, a.tokens));
  LAUNCH((rotate<T, N, INTERLEAVED>), dim3((unsigned)ceil_div(a.tokens, tokens)),
         dim3((unsigned)groups, (unsigned)rows, (unsigned)tokens), 0, a.stream, (const T*)a.q, (const T*)a.k,
         (T*)a.q_out, (T*)a.k_out, a.cosines, a.sines, a.q_stride, a.k_stride, a.q_out_stride, a.k_out_stride,
         a.tokens, a.q_heads, a.k_heads, a.dim, a.sign);
}

template <class T>
void run(const Call& a, bool interleaved) {
  constexpr int N = LANES<T>;
  const bool even = a.dim % (2 * N) == 0 && (a.q_stride | a.k_stride | a.q_out_stride | a.k_out_stride) % N == 0;
  const bool wide = even && aligned(a.q) && aligned(a.k) && aligned(a.q_out) && aligned(a.k_out) &&
                    aligned(a.cosines) && aligned(a.sines);
  if (wide) interleaved ? run<T, N, true>(a) : run<T, N, false>(a);
  else interleaved ? run<T, 1, true>(a) : run<T, 1, false>(a);
}

}  // namespace

// q [tokens, q_heads, dim], k [tokens, k_heads, dim], tables fp32 [tokens, dim / 2]; inverse turns back (the gradient).
MEGAPRE_EXPORT int megapre_rope(const void* q, const void* k, void* q_out, void* k_out, const void* cosines,
                                const void* sines, int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t dim,
                                int64_t q_stride, int64_t k_stride, int64_t q_out_stride, int64_t k_out_stride,
                                int interleaved, int inverse, int type, void* stream) {
  if (tokens == 0 || q_heads + k_heads == 0) return 0;
  const Call a{q, k, q_out, k_out, (const float*)cosines, (const float*)sines, q_stride, k_stride, q_out_stride,
               k_out_stride, (int)tokens, (int)q_heads, (int)k_heads, (int)dim, inverse ? -1.0f : 1.0f,
               (cudaStream_t)stream};
  if (type == BF16) run<bf16>(a, interleaved);
  else if (type == FP16) run<fp16>(a, interleaved);
  else run<float>(a, interleaved);
  return (int)cudaGetLastError();
}
