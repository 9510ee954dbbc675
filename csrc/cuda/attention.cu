// Entry points of attention: which kernel a call gets. Not yet executed on a GPU.
#include "attention_backward.cuh"
#include "attention_forward.cuh"

namespace {

using namespace attention;

template <class K>
int launch(K kernel, dim3 grid, int threads, int bytes, const Problem& p, cudaStream_t stream) {
  if (bytes > 48 << 10) {
    const int code = (int)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code) return code;
  }
  LAUNCH(kernel, grid, dim3(threads), (size_t)bytes, stream, p);
  return (int)cudaGetLastError();
}

template <int D, Kind KIND>
int run_forward(const Problem& p, cudaStream_t stream) {
  using Shape = ForwardShape<D, KIND>;
  const dim3 grid((unsigned)ceil_div(p.s, Shape::ROWS), (unsigned)p.heads, (unsigned)p.batch);
  return launch(forward<D, KIND>, grid, Shape::THREADS, Shape::BYTES, p, stream);
}

template <int D, Kind KIND>
int run_backward(const Problem& p, cudaStream_t stream) {
  const dim3 grid((unsigned)p.splits, (unsigned)p.groups, (unsigned)p.batch);
  const int code = launch(backward<D, KIND>, grid, BACKWARD_THREADS, BackwardShape<D, KIND>::BYTES, p, stream);
  if (code || !p.dbias || KIND != EVERYTHING) return code;
  const dim3 tiles((unsigned)(ceil_div(p.s, SPAN) + ceil_div(p.t, SPAN) - 1), (unsigned)p.heads);
  const int bytes = 4 * SPAN * D * (int)sizeof(bf16) + SPAN * (SPAN + 1) * (int)sizeof(float);
  return launch(bias_gradient<D>, tiles, 128, bytes, p, stream);
}

template <Kind KIND>
int run(const Problem& p, bool backward, cudaStream_t stream) {
  if (p.width <= 32) return backward ? run_backward<32, KIND>(p, stream) : run_forward<32, KIND>(p, stream);
  if (p.width <= 64) return backward ? run_backward<64, KIND>(p, stream) : run_forward<64, KIND>(p, stream);
  if (p.width <= 128) return backward ? run_backward<128, KIND>(p, stream) : run_forward<128, KIND>(p, stream);
  return backward ? run_backward<256, KIND>(p, stream) : run_forward<256, KIND>(p, stream);
}

Rows rows(const void* at, const int64_t* strides) { return {(const bf16*)at, (int)strides[0], strides[1], strides[2]}; }

}  // namespace

// strides: of q, k, v and grad, [row, batch, head] each, in elements. numbers: s, t, batch, heads, groups, width, causal,
// window, q_offset, k_offset, key, step, threshold, wide, kind, splits, padded. Backward where there is a grad.
MEGAPRE_EXPORT int megapre_attention(const void* q, const void* k, const void* v, const void* grad, void* out, void* dk,
                                     void* dv, void* lse, const void* delta, const void* limit, const void* order,
                                     const void* asking, const void* asked, const void* query_spans,
                                     const void* key_spans, const void* bias, void* dbias, const void* sites,
                                     const void* samples, const int64_t* strides, const int64_t* numbers, float scale,
                                     float gain, void* stream) {
  Problem p = {};
  p.q = rows(q, strides), p.k = rows(k, strides + 3), p.v = rows(v, strides + 6), p.grad = rows(grad, strides + 9);
  p.s = (int)numbers[0], p.t = (int)numbers[1], p.batch = (int)numbers[2], p.heads = (int)numbers[3];
  p.groups = (int)numbers[4], p.width = (int)numbers[5], p.causal = (int)numbers[6], p.window = (int)numbers[7];
  p.q_offset = (int)numbers[8], p.k_offset = (int)numbers[9];
  p.key = (uint32_t)numbers[10], p.step = (uint32_t)numbers[11], p.threshold = (uint32_t)numbers[12];
  p.wide = (int)numbers[13], p.splits = (int)numbers[15], p.padded = (int)numbers[16], p.scale = scale, p.gain = gain;
  p.limit = (const int*)limit, p.order = (const int*)order, p.asking = (const int*)asking, p.asked = (const int*)asked;
  p.queries = (const Span*)query_spans, p.keys = (const Span*)key_spans, p.bias = (const float*)bias;
  p.dbias = (float*)dbias, p.sites = (const int64_t*)sites, p.samples = (const int64_t*)samples;
  p.out = out, p.dk = dk, p.dv = dv, p.lse = (float*)lse, p.delta = (const float*)delta;
  if (p.s == 0 || p.batch == 0 || (!grad && p.t == 0)) return 0;
  const cudaStream_t on = (cudaStream_t)stream;
  if (numbers[14] == PLAIN) return run<PLAIN>(p, grad != nullptr, on);
  return numbers[14] == MASKED ? run<MASKED>(p, grad != nullptr, on) : run<EVERYTHING>(p, grad != nullptr, on);
}
