// Entry points of attention: which kernel of attention.cuh a call gets. Not yet executed on a GPU.
#include "attention.cuh"

namespace {

using namespace attention;

template <class K>
int launch(K kernel, dim3 grid, int tiles_of_64, int width, const Problem& p, cudaStream_t stream) {
  const int bytes = tiles_of_64 * ROWS * width * (int)sizeof(bf16) / 2;  // counted in halves of a tile
  if (bytes > 48 << 10) {
    const int code = (int)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code) return code;
  }
  LAUNCH(kernel, grid, dim3(THREADS), (size_t)bytes, stream, p);
  return (int)cudaGetLastError();
}

template <int D, bool EXTRA>
int run_forward(const Problem& p, cudaStream_t stream) {
  const dim3 grid((unsigned)ceil_div(p.s, ROWS), (unsigned)p.heads, (unsigned)p.batch);
  return launch(forward<D, EXTRA>, grid, 10, D, p, stream);
}

template <int D, bool EXTRA>
int run_backward(const Problem& p, cudaStream_t stream) {
  const dim3 queries((unsigned)ceil_div(p.s, ROWS), (unsigned)p.heads, (unsigned)p.batch);
  const dim3 keys((unsigned)ceil_div(p.t, ROWS), (unsigned)p.groups, (unsigned)p.batch);
  int code = launch(backward_queries<D, EXTRA>, queries, D <= 128 ? 12 : 8, D, p, stream);
  if (code) return code;
  if constexpr (D <= 128) {
    return launch(backward_keys<D, EXTRA, true, true>, keys, D <= 64 ? 12 : 8, D, p, stream);
  } else {  // 16 rows a warp of both gradients do not fit into registers: one after the other
    code = launch(backward_keys<D, EXTRA, true, false>, keys, 8, D, p, stream);
    return code ? code : launch(backward_keys<D, EXTRA, false, true>, keys, 8, D, p, stream);
  }
}

template <bool EXTRA>
int run(const Problem& p, bool backward, cudaStream_t stream) {
  if (p.width <= 32) return backward ? run_backward<32, EXTRA>(p, stream) : run_forward<32, EXTRA>(p, stream);
  if (p.width <= 64) return backward ? run_backward<64, EXTRA>(p, stream) : run_forward<64, EXTRA>(p, stream);
  if (p.width <= 128) return backward ? run_backward<128, EXTRA>(p, stream) : run_forward<128, EXTRA>(p, stream);
  return backward ? run_backward<256, EXTRA>(p, stream) : run_forward<256, EXTRA>(p, stream);
}

Rows rows(const void* at, const int64_t* strides) { return {(const bf16*)at, strides[0], strides[1], strides[2]}; }

}  // namespace

// strides: of q, k, v and grad, [row, batch, head] each, in elements. numbers: s, t, batch, heads, groups, width, causal,
// window, q_offset, k_offset, key, step, threshold, wide, extra. Backward where there is a grad: out is dq.
MEGAPRE_EXPORT int megapre_attention(const void* q, const void* k, const void* v, const void* grad, void* out, void* dk,
                                     void* dv, void* lse, const void* delta, const void* limit, const void* order,
                                     const void* asking, const void* asked, const void* query_spans,
                                     const void* key_spans, const void* bias, const void* sites, const void* samples,
                                     const int64_t* strides, const int64_t* numbers, float scale, float gain,
                                     void* stream) {
  Problem p = {};
  p.q = rows(q, strides), p.k = rows(k, strides + 3), p.v = rows(v, strides + 6), p.grad = rows(grad, strides + 9);
  p.s = (int)numbers[0], p.t = (int)numbers[1], p.batch = (int)numbers[2], p.heads = (int)numbers[3];
  p.groups = (int)numbers[4], p.width = (int)numbers[5], p.causal = (int)numbers[6], p.window = (int)numbers[7];
  p.q_offset = (int)numbers[8], p.k_offset = (int)numbers[9];
  p.key = (uint32_t)numbers[10], p.step = (uint32_t)numbers[11], p.threshold = (uint32_t)numbers[12];
  p.wide = (int)numbers[13], p.scale = scale, p.gain = gain;
  p.limit = (const int*)limit, p.order = (const int*)order, p.asking = (const int*)asking, p.asked = (const int*)asked;
  p.queries = (const Span*)query_spans, p.keys = (const Span*)key_spans, p.bias = (const float*)bias;
  p.sites = (const int64_t*)sites, p.samples = (const int64_t*)samples;
  p.out = out, p.dk = dk, p.dv = dv, p.lse = (float*)lse, p.delta = (const float*)delta;
  if (p.s == 0 || p.batch == 0 || (!grad && p.t == 0)) return 0;
  return numbers[14] ? run<true>(p, grad != nullptr, (cudaStream_t)stream) : run<false>(p, grad != nullptr, (cudaStream_t)stream);
}
