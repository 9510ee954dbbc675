// SwiGLU [rows, 2f] -> [rows, f], gate first: gate sigmoid(gate) up; formula in megapre/kernels/activation.py.
// Not yet executed on a GPU.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float sigmoid(float x) { return ptx::reciprocal(1.0f + ptx::exp2(-LOG2E * x)); }

// blockIdx.x: row, blockIdx.y: N x THREADS columns of it.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    forward(const T* __restrict__ gate_up, T* __restrict__ out, int width) {
  const int i = (blockIdx.y * THREADS + threadIdx.x) * N;
  if (i >= width) return;
  const T* from = gate_up + blockIdx.x * (2 * (int64_t)width) + i;
  float gate[N], up[N];
  load_wide<T, N>(from, gate);
  load_wide<T, N>(from + width, up);
#pragma unroll
  for (int k = 0; k < N; k++) up[k] *= gate[k] * sigmoid(gate[k]);
  store_narrow(out + blockIdx.x * (int64_t)width + i, up);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    backward(const T* __restrict__ grad, const T* __restrict__ gate_up, T* __restrict__ out, int width) {
  const int i = (blockIdx.y * THREADS + threadIdx.x) * N;
  if (i >= width) return;
  const int64_t at = blockIdx.x * (2 * (int64_t)width) + i;
  float gate[N], up[N], d[N];
  load_wide<T, N>(grad + blockIdx.x * (int64_t)width + i, d);
  load_wide<T, N>(gate_up + at, gate);
  load_wide<T, N>(gate_up + at + width, up);
#pragma unroll
  for (int k = 0; k < N; k++) {
    const float s = sigmoid(gate[k]), silu = gate[k] * s;
    gate[k] = d[k] * up[k] * (s + silu * (1.0f - s));
    up[k] = d[k] * silu;
  }
  store_narrow(out + at, gate);
  store_narrow(out + at + width, up);
}

template <class T, int N>
void run(const void* grad, const void* gate_up, void* out, int64_t rows, int64_t width, cudaStream_t stream) {
  const dim3 grid((unsigned)rows, (unsigned)ceil_div(width, THREADS * N)), block(THREADS);
  if (grad) LAUNCH((backward<T, N>), grid, block, 0, stream, (const T*)grad, (const T*)gate_up, (T*)out, (int)width);
  else LAUNCH((forward<T, N>), grid, block, 0, stream, (const T*)gate_up, (T*)out, (int)width);
}

template <class T>
void run(bool wide, const void* grad, const void* gate_up, void* out, int64_t rows, int64_t width, cudaStream_t s) {
  if (wide && width % LANES<T> == 0) run<T, LANES<T>>(grad, gate_up, out, rows, width, s);
  else run<T, 1>(grad, gate_up, out, rows, width, s);
}

}  // namespace

// Forward when grad is null (out [rows, width]), else backward (out [rows, 2 width]).
MEGAPRE_EXPORT int megapre_swiglu(const void* grad, const void* gate_up, void* out, int64_t rows, int64_t width,
                                  int type, void* stream_) {
  if (rows == 0 || width == 0) return 0;
  const auto stream = (cudaStream_t)stream_;
  const bool wide = aligned(grad) && aligned(gate_up) && aligned(out);
  if (type == BF16) run<bf16>(wide, grad, gate_up, out, rows, width, stream);
  else if (type == FP16) run<fp16>(wide, grad, gate_up, out, rows, width, stream);
  else run<float>(wide, grad, gate_up, out, rows, width, stream);
  return (int)cudaGetLastError();
}
