// The CPU kernels as torch.ops.megapre.*: checks, allocation and threads; the arithmetic is in kernels.cpp and
// philox.cpp. Fake versions are in megapre/random/native.py. A range is cut the same way whatever the number of
// threads where sums depend on the cut, so results are bitwise the same on any machine width.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace megapre {
namespace {

using at::Tensor;

struct Variant {
  const char* name;
  const Kernels* kernels;
  const Random* random;
};

// The best instruction set of this machine, or the one that MEGAPRE_CPU names (tests compare them).
Variant pick() {
  const char* asked = std::getenv("MEGAPRE_CPU");
  const std::string wanted = asked ? asked : "";
#ifdef MEGAPRE_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return {"avx512", &avx512::kernels, &avx512::random};
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return {"avx2", &avx2::kernels, &avx2::random};
#endif
  return {"portable", &portable::kernels, &portable::random};
}

const Variant& variant() {
  static const Variant chosen = pick();
  return chosen;
}

Type type_of(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "expected fp32 or bf16, got ",
              x.scalar_type());
  return x.scalar_type() == at::kFloat ? FP32 : BF16;
}

void check_matrix(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), name, " must be contiguous [rows, width], got ", x.sizes());
}

Tensor as_floats(const Tensor& x, int64_t width, const char* name) {
  TORCH_CHECK(x.dim() == 1 && x.numel() == width, name, " must be [", width, "], got ", x.sizes());
  return x.to(at::kFloat).contiguous();
}

Tensor as_longs(const Tensor& x, int64_t length, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kLong && x.numel() == length, name, " must be int64 [", length, "], got ",
              x.scalar_type(), " ", x.sizes());
  return x.contiguous();
}

// Rows per task so that a task is worth handing to a thread.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// --- norms ----------------------------------------------------------------------------------------------------------

template <class F>
std::tuple<Tensor, Tensor> norm_forward(F function, int64_t per_row, const Tensor& x, const Tensor& weight,
                                        const std::optional<Tensor>& bias, double eps) {
  check_matrix(x, "x");
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor w = as_floats(weight, width, "weight");
  const Tensor b = bias ? as_floats(*bias, width, "bias") : Tensor();
  Tensor y = at::empty_like(x), statistics = at::empty({per_row, rows}, x.options().dtype(at::kFloat));
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(x.const_data_ptr(), w.const_data_ptr<float>(), b.defined() ? b.const_data_ptr<float>() : nullptr,
             y.mutable_data_ptr(), statistics.mutable_data_ptr<float>(), rows, width, (float)eps, begin, end);
  });
  return {y, statistics};
}

template <class F>
std::tuple<Tensor, Tensor> norm_backward(F function, int64_t per_row, const Tensor& grad, const Tensor& x,
                                         const Tensor& weight, const Tensor& statistics) {
  check_matrix(x, "x");
  check_matrix(grad, "grad");
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "grad must be like x");
  const int64_t rows = x.size(0), width = x.size(1);
  TORCH_CHECK(statistics.is_contiguous() && statistics.numel() == per_row * rows, "statistics do not fit x");
  const Tensor w = as_floats(weight, width, "weight");
  const int64_t parts = std::clamp<int64_t>(rows / 32, 1, 16);
  Tensor grad_x = at::empty_like(x), partial = at::empty({parts, per_row, width}, x.options().dtype(at::kFloat));
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; part++)
      function(grad.const_data_ptr(), x.const_data_ptr(), w.const_data_ptr<float>(),
               statistics.const_data_ptr<float>(), grad_x.mutable_data_ptr(),
               partial.mutable_data_ptr<float>() + part * per_row * width, rows, width, rows * part / parts,
               rows * (part + 1) / parts);
  });
  return {grad_x, partial.sum(0)};
}

std::tuple<Tensor, Tensor> layer_norm_forward(const Tensor& x, const Tensor& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  return norm_forward(variant().kernels->layer_norm_forward[type_of(x)], 2, x, weight, bias, eps);
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight, double eps) {
  return norm_forward(variant().kernels->rms_norm_forward[type_of(x)], 1, x, weight, std::nullopt, eps);
}

std::tuple<Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const Tensor& statistics) {
  return norm_backward(variant().kernels->layer_norm_backward[type_of(x)], 2, grad, x, weight, statistics);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& statistics) {
  return norm_backward(variant().kernels->rms_norm_backward[type_of(x)], 1, grad, x, weight, statistics);
}

// --- cross-entropy --------------------------------------------------------------------------------------------------

void check_logits(const Tensor& logits, int64_t valid) {
  TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1), "logits must have rows in one piece");
  TORCH_CHECK(0 <= valid && valid <= logits.size(1), valid, " valid columns of ", logits.size(1));
}

Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& targets, int64_t valid) {
  check_logits(logits, valid);
  const int64_t rows = logits.size(0);
  const Tensor t = as_longs(targets, rows, "targets");
  Tensor statistics = at::empty({3, rows}, logits.options().dtype(at::kFloat));
  const auto function = variant().kernels->ce_statistics[type_of(logits)];
  at::parallel_for(0, rows, grain(valid), [&](int64_t begin, int64_t end) {
    function(logits.const_data_ptr(), t.const_data_ptr<int64_t>(), statistics.mutable_data_ptr<float>(), rows,
             logits.stride(0), valid, begin, end);
  });
  return statistics;
}

void cross_entropy_gradient_(Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& scale,
                             int64_t valid) {
  check_logits(logits, valid);
  const int64_t rows = logits.size(0), width = logits.size(1);
  const Tensor t = as_longs(targets, rows, "targets"), l = as_floats(lse, rows, "lse");
  const Tensor s = as_floats(scale, rows, "scale");
  const auto function = variant().kernels->ce_gradient[type_of(logits)];
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(logits.mutable_data_ptr(), t.const_data_ptr<int64_t>(), l.const_data_ptr<float>(),
             s.const_data_ptr<float>(), width, logits.stride(0), valid, begin, end);
  });
}

// --- activations ----------------------------------------------------------------------------------------------------

constexpr int64_t ELEMENTS = 16384;  // of an element-wise op, per task

Tensor gelu_forward(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  Tensor y = at::empty_like(x);
  const auto function = variant().kernels->gelu_forward[type_of(x)];
  at::parallel_for(0, x.numel(), ELEMENTS, [&](int64_t begin, int64_t end) {
    function(x.const_data_ptr(), y.mutable_data_ptr(), begin, end);
  });
  return y;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && grad.is_contiguous() && grad.sizes() == x.sizes() &&
              grad.scalar_type() == x.scalar_type(), "grad must be like x, both contiguous");
  Tensor grad_x = at::empty_like(x);
  const auto function = variant().kernels->gelu_backward[type_of(x)];
  at::parallel_for(0, x.numel(), ELEMENTS, [&](int64_t begin, int64_t end) {
    function(grad.const_data_ptr(), x.const_data_ptr(), grad_x.mutable_data_ptr(), begin, end);
  });
  return grad_x;
}

Tensor swiglu_forward(const Tensor& x) {
  check_matrix(x, "x");
  TORCH_CHECK(x.size(1) % 2 == 0, "gate and up must be equally wide, got ", x.size(1), " together");
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor y = at::empty({rows, width}, x.options());
  const auto function = variant().kernels->swiglu_forward[type_of(x)];
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(x.const_data_ptr(), y.mutable_data_ptr(), width, begin, end);
  });
  return y;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& x) {
  check_matrix(x, "x");
  check_matrix(grad, "grad");
  TORCH_CHECK(grad.size(0) == x.size(0) && 2 * grad.size(1) == x.size(1) && grad.scalar_type() == x.scalar_type(),
              "grad ", grad.sizes(), " does not fit x ", x.sizes());
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor grad_x = at::empty_like(x);
  const auto function = variant().kernels->swiglu_backward[type_of(x)];
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(grad.const_data_ptr(), x.const_data_ptr(), grad_x.mutable_data_ptr(), width, begin, end);
  });
  return grad_x;
}

// --- random ---------------------------------------------------------------------------------------------------------

// Fill `out` with the box of that size at `offset` of the logical tensor of `shape`: trailing whole dimensions are
// one run of consecutive elements, and runs are cut into chunks for the threads.
void philox_normal_(Tensor& out, at::IntArrayRef words, at::IntArrayRef shape, at::IntArrayRef offset) {
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == at::kFloat, "out must be contiguous fp32");
  TORCH_CHECK(words.size() == 4 && (int64_t)shape.size() == out.dim() && shape.size() == offset.size(),
              "words, shape or offset do not fit out");
  const uint32_t name[4] = {(uint32_t)words[0], (uint32_t)words[1], (uint32_t)words[2], (uint32_t)words[3]};
  int64_t outer = out.dim(), run = 1, whole = 1;  // run: elements of the box in one piece; whole: of the tensor
  while (outer > 0) {
    outer--;
    run *= out.size(outer);
    whole *= shape[outer];
    if (out.size(outer) != shape[outer]) break;
  }
  if (out.numel() == 0) return;
  int64_t inner_start = 0, stride = 1;
  for (int64_t d = out.dim() - 1; d >= outer; d--) inner_start += offset[d] * stride, stride *= shape[d];
  constexpr int64_t CHUNK = 16384;
  const int64_t chunks = (run + CHUNK - 1) / CHUNK, runs = out.numel() / run;
  const auto start_of = [&](int64_t r) {
    int64_t start = inner_start, step = whole;
    for (int64_t d = outer - 1; d >= 0; d--) {
      start += (r % out.size(d) + offset[d]) * step;
      r /= out.size(d), step *= shape[d];
    }
    return start;
  };
  float* data = out.mutable_data_ptr<float>();
  const auto function = variant().random->normal;
  at::parallel_for(0, runs * chunks, grain(std::min(run, CHUNK)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t r = task / chunks, at = task % chunks * CHUNK;
      function(name, start_of(r) + at, std::min(CHUNK, run - at), data + r * run + at);
    }
  });
}

uint32_t threshold(double probability) {
  TORCH_CHECK(probability >= 0 && probability < 1, "dropout probability ", probability, " must be in [0, 1)");
  return (uint32_t)std::min(probability * 4294967296.0 + 0.5, 4294967295.0);
}

Tensor keep_mask(int64_t key, int64_t step, at::IntArrayRef sites, const Tensor& positions, const Tensor& samples,
                 int64_t first, int64_t features, double probability) {
  const int64_t P = positions.numel(), B = samples.numel(), S = sites.size();
  TORCH_CHECK(first >= 0 && features >= 0, "features [", first, ", ", first + features, ") must not be negative");
  const Tensor p = as_longs(positions, P, "positions"), s = as_longs(samples, B, "samples");
  Tensor kept = at::empty({S, P, B, features}, positions.options().dtype(at::kBool));
  const uint32_t limit = threshold(probability);
  const int64_t *position = p.const_data_ptr<int64_t>(), *sample = s.const_data_ptr<int64_t>();
  uint8_t* out = (uint8_t*)kept.mutable_data_ptr();
  const auto function = variant().random->keep_row;
  at::parallel_for(0, S * P * B, grain(features), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      function((uint32_t)key, (uint32_t)step, (uint32_t)sites[row / (P * B)], (uint32_t)position[row / B % P],
               sample[row % B], first, features, limit, out + row * features);
  });
  return kept;
}

Tensor dropout(const Tensor& x, int64_t key, int64_t step, int64_t site, const Tensor& positions,
               const Tensor& samples, double probability) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [positions, samples, features]");
  const int64_t B = x.size(1), width = x.size(2), size = x.element_size();
  const Tensor p = as_longs(positions, x.size(0), "positions"), s = as_longs(samples, B, "samples");
  Tensor y = at::empty_like(x);
  const uint32_t limit = threshold(probability);
  const float scale = (float)(1.0 / (1.0 - probability));
  const int64_t *position = p.const_data_ptr<int64_t>(), *sample = s.const_data_ptr<int64_t>();
  const char* in = (const char*)x.const_data_ptr();
  char* out = (char*)y.mutable_data_ptr();
  const auto function = variant().random->dropout_row[type_of(x)];
  at::parallel_for(0, x.size(0) * B, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      function((uint32_t)key, (uint32_t)step, (uint32_t)site, (uint32_t)position[row / B], sample[row % B], width,
               limit, scale, in + row * width * size, out + row * width * size);
  });
  return y;
}

std::vector<int64_t> philox(at::IntArrayRef counter, at::IntArrayRef key) {
  TORCH_CHECK(counter.size() == 4 && key.size() == 2, "Philox has four counter words and two key words");
  uint32_t c[4], k[2] = {(uint32_t)key[0], (uint32_t)key[1]}, out[4];
  for (int i = 0; i < 4; i++) c[i] = (uint32_t)counter[i];
  variant().random->philox(c, k, out);
  return {out[0], out[1], out[2], out[3]};
}

std::string cpu_variant() { return variant().name; }

}  // namespace

TORCH_LIBRARY(megapre, m) {
  m.def("layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  m.def("layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor)");
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor)");
  m.def("cross_entropy_statistics(Tensor logits, Tensor targets, int valid) -> Tensor");
  m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor scale, int valid) -> ()");
  m.def("gelu_forward(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("swiglu_forward(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("philox_normal_(Tensor(a!) out, int[] words, int[] shape, int[] offset) -> ()");
  m.def(
      "keep_mask(int key, int step, int[] sites, Tensor positions, Tensor samples, int first, int features, "
      "float probability) -> Tensor");
  m.def(
      "dropout(Tensor x, int key, int step, int site, Tensor positions, Tensor samples, float probability) -> Tensor");
  m.def("philox", &philox);
  m.def("cpu_variant", &cpu_variant);
}

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("layer_norm_forward", &layer_norm_forward);
  m.impl("layer_norm_backward", &layer_norm_backward);
  m.impl("rms_norm_forward", &rms_norm_forward);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("cross_entropy_statistics", &cross_entropy_statistics);
  m.impl("cross_entropy_gradient_", &cross_entropy_gradient_);
  m.impl("gelu_forward", &gelu_forward);
  m.impl("gelu_backward", &gelu_backward);
  m.impl("swiglu_forward", &swiglu_forward);
  m.impl("swiglu_backward", &swiglu_backward);
  m.impl("philox_normal_", &philox_normal_);
  m.impl("keep_mask", &keep_mask);
  m.impl("dropout", &dropout);
}

}  // namespace megapre
