// Attention as torch.ops.megapre.*: checks, memory and threads; the arithmetic is in attention.cpp. Work is cut by the
// shape alone, and what several tasks add to is summed afterwards in one order: results do not depend on the threads.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "ops.h"

namespace megapre {
namespace {

const AttentionKernels* pick() {
#ifdef MEGAPRE_X86
  const std::string name = variant().name;
  if (has_tiles()) return amx::attention;
  if (name == "avx512") return avx512::attention;
  if (name == "avx2") return avx2::attention;
#endif
  return portable::attention;
}

using Maybe = std::optional<Tensor>;

Rows rows_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor with_whole_heads(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

const int32_t* numbers(const Maybe& x, int64_t batch, int64_t n, const char* name) {
  if (!x) return nullptr;
  TORCH_CHECK_VALUE(x->scalar_type() == at::kInt && x->is_contiguous() && x->dim() == 2 && x->size(0) == batch &&
                        x->size(1) == n, name, " must be int32 [", batch, ", ", n, "], got ", x->sizes());
  return x->const_data_ptr<int32_t>();
}

// A call's tensors in the form the kernels read, which own what the problem points to.
struct Call {
  AttentionProblem p = {};
  Tensor q, k, v, bias, sites, samples;
  const AttentionKernels* kernels;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Maybe& limit, const Maybe& order, const Maybe& asking,
       const Maybe& asked, const Maybe& bias_, const Maybe& sites_, const Maybe& samples_, int64_t key, int64_t step,
       int64_t threshold, double gain, bool causal, int64_t window, int64_t q_offset, int64_t k_offset, double scale) {
    TORCH_CHECK_VALUE(q_.dim() == 4 && k_.dim() == 4 && k_.sizes() == v_.sizes() && q_.size(1) == k_.size(1) &&
                          q_.size(3) == k_.size(3) && k_.size(2) > 0 && q_.size(2) % k_.size(2) == 0,
                      "q ", q_.sizes(), ", k ", k_.sizes(), " and v ", v_.sizes(), " do not fit together");
    TORCH_CHECK_VALUE(q_.scalar_type() == k_.scalar_type() && q_.scalar_type() == v_.scalar_type() && q_.size(3) <= 256,
                      "q, k and v must be of one type, with heads of at most 256, got ", q_.sizes());
    TORCH_CHECK_VALUE(scale > 0, "the scale must be positive, got ", scale);
    q = with_whole_heads(q_), k = with_whole_heads(k_), v = with_whole_heads(v_);
    kernels = &attention_kernels()[type_of(q)];
    p.s = q.size(0), p.t = k.size(0), p.batch = q.size(1), p.heads = q.size(2), p.groups = k.size(2), p.width = q.size(3);
    p.scale = (float)scale, p.causal = causal, p.window = window, p.q_offset = q_offset, p.k_offset = k_offset;
    p.limit = numbers(limit, p.batch, p.s, "limit"), p.order = numbers(order, p.batch, p.t, "order");
    p.asking = numbers(asking, p.batch, p.s, "documents"), p.asked = numbers(asked, p.batch, p.t, "documents");
    p.span = p.s + p.t - 1 + 2 * BIAS_MARGIN;
    if (bias_) {
      TORCH_CHECK_VALUE(bias_->sizes() == at::IntArrayRef({p.heads, p.s + p.t - 1}), "bias must be [", p.heads, ", ",
                        p.s + p.t - 1, "], got ", bias_->sizes());
      bias = at::constant_pad_nd(bias_->to(at::kFloat).flip({1}), {BIAS_MARGIN, BIAS_MARGIN}).contiguous();
      p.bias = bias.const_data_ptr<float>();
    }
    if (sites_) {
      sites = as_longs(*sites_, p.heads, "sites"), samples = as_longs(*samples_, p.batch, "samples");
      p.sites = sites.const_data_ptr<int64_t>(), p.samples = samples.const_data_ptr<int64_t>();
      p.key = (uint32_t)key, p.step = (uint32_t)step, p.threshold = (uint32_t)threshold, p.gain = (float)gain;
    }
  }

  Tensor bytes(int64_t count) const { return at::empty({count}, q.options().dtype(at::kByte)); }

  // tasks numbered [0, count), each thread with scratch of its own.
  template <class F>
  void parallel(int64_t count, int64_t scratch, F f) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Tensor memory = bytes(scratch);
      kernels->begin();
      for (int64_t task = begin; task < end; task++) f(task, memory.mutable_data_ptr());
      kernels->end();
    });
  }

  // The keys of every (sample, key head), packed.
  Tensor pack(bool backward) const {
    const int64_t each = kernels->packed_bytes(p, backward), blocks = kernels->key_blocks(p, backward);
    const Tensor packed = bytes(p.batch * p.groups * each);
    char* at = (char*)packed.mutable_data_ptr();
    parallel(p.batch * p.groups * blocks, PACK_BYTES, [&](int64_t task, void* scratch) {
      const int64_t which = task / blocks, b = which / p.groups;
      kernels->pack(p, rows_of(k), rows_of(v), backward, b, which % p.groups, task % blocks, at + which * each, scratch);
      if (task % blocks == 0) kernels->pack_numbers(p, backward, b, at + which * each);
    });
    return packed;
  }
};

// One query: the keys are cut into parts, whose results are put together in order. Dropout is for training alone.
void decode(const Call& call, Tensor& out, Tensor& lse) {
  constexpr int64_t PART = 512;
  const AttentionProblem& p = call.p;
  const int64_t parts = (p.t + PART - 1) / PART, each = p.heads / p.groups, size = each * (2 + p.width);
  const auto options = call.q.options().dtype(at::kFloat);
  const Tensor partial = at::empty({p.batch * p.groups * parts, size}, options);
  const Tensor result = at::empty({p.batch, p.heads, p.width}, options);
  float *from = partial.mutable_data_ptr<float>(), *to = result.mutable_data_ptr<float>();
  call.parallel(p.batch * p.groups * parts, 4 * each * (PART + 512), [&](int64_t task, void* scratch) {
    const int64_t which = task / parts, begin = task % parts * PART;
    call.kernels->decode(p, rows_of(call.q), rows_of(call.k), rows_of(call.v), which / p.groups, which % p.groups, begin,
                         std::min(p.t, begin + PART), from + task * size, (float*)scratch);
  });
  for (int64_t row = 0; row < p.batch * p.heads; row++) {
    const float* mine = from + row / each * parts * size + row % each * (2 + p.width);
    float top = -INFINITY, total = 0, *y = to + row * p.width;
    for (int64_t i = 0; i < parts; i++) top = std::max(top, mine[i * size]);
    std::fill(y, y + p.width, 0.0f);
    for (int64_t i = 0; i < parts; i++) {
      const float* part = mine + i * size;
      const float factor = part[0] == -INFINITY ? 0.0f : std::exp(part[0] - top);
      total += factor * part[1];
      for (int64_t l = 0; l < p.width; l++) y[l] += factor * part[2 + l];
    }
    for (int64_t l = 0; l < p.width; l++) y[l] = total == 0 ? 0.0f : y[l] / total;
    lse.mutable_data_ptr<float>()[row] = total == 0 ? -INFINITY : top + std::log(total);
  }
  out.copy_(result.unsqueeze(0));
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& limit, const Maybe& order, const Maybe& asking,
    const Maybe& asked, const Maybe& bias, const Maybe& sites, const Maybe& samples, int64_t key, int64_t step,
    int64_t threshold, double gain, bool causal, int64_t window, int64_t q_offset, int64_t k_offset, double scale,
    bool wide) {
  const Call call(q, k, v, limit, order, asking, asked, bias, sites, samples, key, step, threshold, gain, causal, window,
                  q_offset, k_offset, scale);
  const AttentionProblem& p = call.p;
  Tensor out = at::empty(q.sizes(), q.options().dtype(wide ? at::kFloat : q.scalar_type()));
  Tensor lse = at::empty({p.batch, p.heads, p.s}, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, lse};
  if (p.t == 0) return {out.zero_(), lse.fill_(-INFINITY)};
  if (p.s == 1 && !p.sites) {
    decode(call, out, lse);
    return {out, lse};
  }
  const Tensor packed = call.pack(false);
  const char* at = (const char*)packed.const_data_ptr();
  const int64_t each = call.kernels->packed_bytes(p, false), blocks = call.kernels->query_blocks(p);
  const int64_t group = p.heads / p.groups;
  call.parallel(p.batch * p.heads * blocks, call.kernels->forward_bytes(p), [&](int64_t task, void* scratch) {
    const int64_t b = task / blocks / p.heads, head = task / blocks % p.heads;
    call.kernels->forward(p, rows_of(call.q), at + (b * p.groups + head / group) * each, out.mutable_data_ptr(), wide,
                          lse.mutable_data_ptr<float>(), b, head, task % blocks, scratch);
  });
  return {out, lse};
}

// x [t, batch, heads, width] in fp32, summed over the query heads of each of `groups` key heads.
Tensor over_group(const Tensor& x, int64_t groups, const at::TensorOptions& options) {
  const int64_t each = x.size(2) / groups, width = x.size(3);
  Tensor y = at::empty({x.size(0), x.size(1), groups, width}, options);
  const auto function = variant().kernels->group_sums[type_of(y)];
  at::parallel_for(0, x.size(0) * x.size(1), grain(x.size(2) * width), [&](int64_t begin, int64_t end) {
    char* to = (char*)y.mutable_data_ptr() + begin * groups * width * y.element_size();
    function(x.const_data_ptr<float>() + begin * x.size(2) * width, to, (end - begin) * groups, each, width);
  });
  return y;
}

Tensor attention_delta(const Tensor& grad, const Tensor& out) {
  TORCH_CHECK_VALUE(grad.dim() == 4 && grad.sizes() == out.sizes() && grad.scalar_type() == out.scalar_type() &&
                        grad.is_contiguous() && out.is_contiguous(),
                    "delta: grad must be like out, contiguous ", out.sizes(), ", got ", grad.sizes());
  const int64_t s = out.size(0), batch = out.size(1), heads = out.size(2), row = heads * out.size(3);
  Tensor delta = at::empty({batch, heads, s}, out.options().dtype(at::kFloat));
  const auto function = variant().kernels->row_dots[type_of(out)];
  const char *x = (const char*)grad.const_data_ptr(), *y = (const char*)out.const_data_ptr();
  at::parallel_for(0, s * batch, grain(row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* to = delta.mutable_data_ptr<float>() + i % batch * heads * s + i / batch;
      function(x + i * row * out.element_size(), y + i * row * out.element_size(), to, heads, s, out.size(3));
    }
  });
  return delta;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse_, const Tensor& delta_,
    const Maybe& limit, const Maybe& order, const Maybe& asking, const Maybe& asked, const Maybe& bias,
    const Maybe& sites, const Maybe& samples, int64_t key, int64_t step, int64_t threshold, double gain, bool causal,
    int64_t window, int64_t q_offset, int64_t k_offset, double scale, bool wide) {
  const Call call(q, k, v, limit, order, asking, asked, bias, sites, samples, key, step, threshold, gain, causal, window,
                  q_offset, k_offset, scale);
  const AttentionProblem& p = call.p;
  const Tensor grad = with_whole_heads(grad_.to(q.scalar_type()));
  TORCH_CHECK_VALUE(grad.sizes() == q.sizes(), "grad must be like q, ", q.sizes(), ", got ", grad.sizes());
  const Tensor lse = as_floats(lse_.flatten(), p.batch * p.heads * p.s, "lse");
  const Tensor delta = as_floats(delta_.flatten(), p.batch * p.heads * p.s, "delta");
  const auto options = q.options().dtype(wide ? at::kFloat : q.scalar_type());
  const int64_t group = p.heads / p.groups;
  Tensor dq = at::empty(q.sizes(), options), dbias = at::zeros({bias ? p.batch : 0, p.heads, p.span}, q.options().dtype(at::kFloat));
  // Several query heads of one key head: each has its own share, summed below.
  Tensor dk = at::empty({p.t, p.batch, p.heads, p.width}, group > 1 ? options.dtype(at::kFloat) : options);
  Tensor dv = at::empty_like(dk);
  const bool wide_keys = wide || group > 1;
  const int64_t element = dk.element_size();
  if (p.t == 0 || q.numel() == 0) {
    dq.zero_(), dk.zero_(), dv.zero_();
  } else {
    const Tensor packed = call.pack(true);
    const char* at = (const char*)packed.const_data_ptr();
    const int64_t each = call.kernels->packed_bytes(p, true);
    call.parallel(p.batch * p.heads, call.kernels->backward_bytes(p), [&](int64_t task, void* scratch) {
      const int64_t b = task / p.heads, head = task % p.heads, place = (b * p.heads + head) * p.width * element;
      call.kernels->backward(p, rows_of(call.q), rows_of(grad), at + (b * p.groups + head / group) * each,
                             lse.const_data_ptr<float>(), delta.const_data_ptr<float>(), dq.mutable_data_ptr(), wide,
                             (char*)dk.mutable_data_ptr() + place, (char*)dv.mutable_data_ptr() + place,
                             p.batch * p.heads * p.width, wide_keys,
                             bias ? dbias.mutable_data_ptr<float>() + task * p.span : nullptr, b, head, scratch);
    });
  }
  if (group > 1) dk = over_group(dk, p.groups, options), dv = over_group(dv, p.groups, options);
  if (bias) dbias = dbias.sum(0).narrow(1, BIAS_MARGIN, p.s + p.t - 1).flip({1}).contiguous();
  return {dq, dk, dv, dbias};
}

std::string attention_variant() {
#ifdef MEGAPRE_X86
  if (attention_kernels() == amx::attention) return "amx";
#endif
  return variant().name;
}

}  // namespace

const AttentionKernels* attention_kernels() {
  static const AttentionKernels* chosen = pick();
  return chosen;
}

#define MASK                                                                                                       \
  "Tensor? limit, Tensor? order, Tensor? asking, Tensor? asked, Tensor? bias, Tensor? sites, Tensor? samples, "    \
  "int key, int step, int threshold, float gain, bool causal, int window, int q_offset, int k_offset, float scale, " \
  "bool wide)"

TORCH_LIBRARY_FRAGMENT(megapre, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, " MASK " -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, " MASK
        " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("attention_delta(Tensor grad, Tensor out) -> Tensor");
  m.def("attention_variant", &attention_variant);
}

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("attention_forward", &attention_forward);
  m.impl("attention_backward", &attention_backward);
  m.impl("attention_delta", &attention_delta);
}

}  // namespace megapre
