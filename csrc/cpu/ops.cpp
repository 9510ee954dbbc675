// The CPU kernels as torch.ops.megapre.*: checks, allocation and threads; the arithmetic is in kernels.cpp and
// philox.cpp; random numbers are in ops_random.cpp, positions and the optimizer in ops_update.cpp. Fake versions are in megapre/random/native.py. A range is cut the same way whatever the number of
// threads where sums depend on the cut, so results are bitwise the same on any machine width.
#include "ops.h"

#include <cstdlib>

#ifdef MEGAPRE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace megapre {
namespace {

// The best instruction set of this machine, or the one that MEGAPRE_CPU names (tests compare them).
Variant pick() {
  const char* asked = std::getenv("MEGAPRE_CPU");
  const std::string wanted = asked ? asked : "";
#ifdef MEGAPRE_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (wanted.empty() || wanted == "avx512" || wanted == "amx")) return {"avx512", &avx512::kernels, &avx512::random};
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return {"avx2", &avx2::kernels, &avx2::random};
#endif
  return {"portable", &portable::kernels, &portable::random};
}

bool find_tiles() {
#if defined(MEGAPRE_X86) && defined(__linux__)
  const std::string asked = std::getenv("MEGAPRE_CPU") ? std::getenv("MEGAPRE_CPU") : "";
  unsigned a, b, c, d;
  if (std::string(variant().name) != "avx512" || asked == "avx512") return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
  return false;
#endif
}

}  // namespace

const Variant& variant() {
  static const Variant chosen = pick();
  return chosen;
}

bool has_tiles() {
  static const bool found = find_tiles();
  return found;
}

namespace {

// --- norms ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> norm_forward(Kernels::NormForward function, int64_t per_row, const Tensor& x,
                                                const std::optional<Tensor>& residual, const Tensor& weight,
                                                const std::optional<Tensor>& bias, double eps) {
  check_matrix(x, "x");
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor total;
  if (residual) {
    check_like(*residual, x, "residual");
    total = at::empty_like(x);
  }
  const Tensor w = as_floats(weight, width, "weight");
  const Tensor b = bias ? as_floats(*bias, width, "bias") : Tensor();
  Tensor y = at::empty_like(x), statistics = at::empty({per_row, rows}, x.options().dtype(at::kFloat));
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr, w.const_data_ptr<float>(),
             b.defined() ? b.const_data_ptr<float>() : nullptr, y.mutable_data_ptr(),
             residual ? total.mutable_data_ptr() : nullptr, statistics.mutable_data_ptr<float>(), rows, width,
             (float)eps, begin, end);
  });
  return {y, total, statistics};
}

std::tuple<Tensor, Tensor> norm_backward(Kernels::NormBackward function, int64_t per_row, const Tensor& grad,
                                         const Tensor& x, const Tensor& weight, const Tensor& statistics,
                                         const std::optional<Tensor>& grad_total) {
  check_matrix(x, "x");
  check_like(grad, x, "grad");
  if (grad_total) check_like(*grad_total, x, "grad_total");
  const int64_t rows = x.size(0), width = x.size(1);
  TORCH_CHECK_VALUE(statistics.is_contiguous() && statistics.numel() == per_row * rows, "statistics do not fit x");
  const Tensor w = as_floats(weight, width, "weight");
  const int64_t parts = parts_of(rows);
  Tensor grad_x = at::empty_like(x), partial = at::empty({parts, per_row, width}, x.options().dtype(at::kFloat));
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; part++)
      function(grad.const_data_ptr(), grad_total ? grad_total->const_data_ptr() : nullptr, x.const_data_ptr(),
               w.const_data_ptr<float>(), statistics.const_data_ptr<float>(), grad_x.mutable_data_ptr(),
               partial.mutable_data_ptr<float>() + part * per_row * width, rows, width, rows * part / parts,
               rows * (part + 1) / parts);
  });
  return {grad_x, partial.sum(0)};
}

std::tuple<Tensor, Tensor> layer_norm_forward(const Tensor& x, const Tensor& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  auto [y, total, statistics] =
      norm_forward(variant().kernels->layer_norm_forward[type_of(x)], 2, x, std::nullopt, weight, bias, eps);
  return {y, statistics};
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight, double eps) {
  auto [y, total, statistics] =
      norm_forward(variant().kernels->rms_norm_forward[type_of(x)], 1, x, std::nullopt, weight, std::nullopt, eps);
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                                          double eps) {
  return norm_forward(variant().kernels->layer_norm_forward[type_of(x)], 2, x, residual, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                        double eps) {
  return norm_forward(variant().kernels->rms_norm_forward[type_of(x)], 1, x, residual, weight, std::nullopt, eps);
}

std::tuple<Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const Tensor& statistics, const std::optional<Tensor>& grad_total) {
  return norm_backward(variant().kernels->layer_norm_backward[type_of(x)], 2, grad, x, weight, statistics, grad_total);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& statistics, const std::optional<Tensor>& grad_total) {
  return norm_backward(variant().kernels->rms_norm_backward[type_of(x)], 1, grad, x, weight, statistics, grad_total);
}

// --- cross-entropy --------------------------------------------------------------------------------------------------

void check_logits(const Tensor& logits, int64_t valid) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1), "logits must have rows in one piece");
  TORCH_CHECK_VALUE(0 <= valid && valid <= logits.size(1), valid, " valid columns of ", logits.size(1));
}

Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& targets, int64_t valid) {
  check_logits(logits, valid);
  const int64_t rows = logits.size(0);
  const Tensor t = as_longs(targets, rows, "targets");
  Tensor statistics = at::empty({4, rows}, logits.options().dtype(at::kFloat));
  const auto function = variant().kernels->ce_statistics[type_of(logits)];
  at::parallel_for(0, rows, grain(valid), [&](int64_t begin, int64_t end) {
    function(logits.const_data_ptr(), t.const_data_ptr<int64_t>(), statistics.mutable_data_ptr<float>(), rows,
             logits.stride(0), valid, begin, end);
  });
  return statistics;
}

void cross_entropy_gradient_(Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& scale,
                             int64_t valid, double smoothing, int64_t vocab, double z_loss) {
  check_logits(logits, valid);
  const int64_t rows = logits.size(0), width = logits.size(1);
  const Tensor t = as_longs(targets, rows, "targets"), l = as_floats(lse, rows, "lse");
  const Tensor s = as_floats(scale, rows, "scale");
  const float share = smoothing == 0 ? 0 : (float)(smoothing / (double)vocab);
  const auto function = variant().kernels->ce_gradient[type_of(logits)];
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(logits.mutable_data_ptr(), t.const_data_ptr<int64_t>(), l.const_data_ptr<float>(),
             s.const_data_ptr<float>(), width, logits.stride(0), valid, (float)smoothing, share, (float)z_loss, begin, end);
  });
}

// --- activations ----------------------------------------------------------------------------------------------------

Tensor gelu_forward(const Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "x must be contiguous");
  Tensor y = at::empty_like(x);
  const auto function = variant().kernels->gelu_forward[type_of(x)];
  at::parallel_for(0, x.numel(), ELEMENTS, [&](int64_t begin, int64_t end) {
    function(x.const_data_ptr(), y.mutable_data_ptr(), begin, end);
  });
  return y;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous() && grad.is_contiguous() && grad.sizes() == x.sizes() &&
              grad.scalar_type() == x.scalar_type(), "grad must be like x, both contiguous");
  Tensor grad_x = at::empty_like(x);
  const auto function = variant().kernels->gelu_backward[type_of(x)];
  at::parallel_for(0, x.numel(), ELEMENTS, [&](int64_t begin, int64_t end) {
    function(grad.const_data_ptr(), x.const_data_ptr(), grad_x.mutable_data_ptr(), begin, end);
  });
  return grad_x;
}

Tensor bias_gelu_forward(const Tensor& x, const Tensor& bias) {
  check_matrix(x, "x");
  const int64_t width = x.size(1);
  const Tensor b = as_floats(bias, width, "bias");
  Tensor y = at::empty_like(x);
  const auto function = variant().kernels->bias_gelu_forward[type_of(x)];
  at::parallel_for(0, x.size(0), grain(width), [&](int64_t begin, int64_t end) {
    function(x.const_data_ptr(), b.const_data_ptr<float>(), y.mutable_data_ptr(), width, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias) {
  check_matrix(x, "x");
  check_like(grad, x, "grad");
  const int64_t rows = x.size(0), width = x.size(1), parts = parts_of(rows);
  const Tensor b = as_floats(bias, width, "bias");
  Tensor grad_x = at::empty_like(x), partial = at::empty({parts, width}, x.options().dtype(at::kFloat));
  const auto function = variant().kernels->bias_gelu_backward[type_of(x)];
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; part++)
      function(grad.const_data_ptr(), x.const_data_ptr(), b.const_data_ptr<float>(), grad_x.mutable_data_ptr(),
               partial.mutable_data_ptr<float>() + part * width, width, rows * part / parts,
               rows * (part + 1) / parts);
  });
  return {grad_x, partial.sum(0)};
}

Tensor glu_forward(Kernels::GluForward function, const Tensor& x) {
  check_matrix(x, "x");
  TORCH_CHECK_VALUE(x.size(1) % 2 == 0, "gate and up must be equally wide, got ", x.size(1), " together");
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor y = at::empty({rows, width}, x.options());
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(x.const_data_ptr(), y.mutable_data_ptr(), width, begin, end);
  });
  return y;
}

Tensor glu_backward(Kernels::GluBackward function, const Tensor& grad, const Tensor& x) {
  check_matrix(x, "x");
  check_matrix(grad, "grad");
  TORCH_CHECK_VALUE(grad.size(0) == x.size(0) && 2 * grad.size(1) == x.size(1) &&
                    grad.scalar_type() == x.scalar_type(), "grad ", grad.sizes(), " does not fit x ", x.sizes());
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor grad_x = at::empty_like(x);
  at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    function(grad.const_data_ptr(), x.const_data_ptr(), grad_x.mutable_data_ptr(), width, begin, end);
  });
  return grad_x;
}

Tensor swiglu_forward(const Tensor& x) { return glu_forward(variant().kernels->swiglu_forward[type_of(x)], x); }

Tensor swiglu_backward(const Tensor& grad, const Tensor& x) {
  return glu_backward(variant().kernels->swiglu_backward[type_of(x)], grad, x);
}

Tensor geglu_forward(const Tensor& x) { return glu_forward(variant().kernels->geglu_forward[type_of(x)], x); }

Tensor geglu_backward(const Tensor& grad, const Tensor& x) {
  return glu_backward(variant().kernels->geglu_backward[type_of(x)], grad, x);
}

std::string cpu_variant() { return variant().name; }

}  // namespace

TORCH_LIBRARY(megapre, m) {
  m.def("layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics, Tensor? grad_total=None) "
      "-> (Tensor, Tensor)");
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics, Tensor? grad_total=None) "
      "-> (Tensor, Tensor)");
  m.def("add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_statistics(Tensor logits, Tensor targets, int valid) -> Tensor");
  m.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor scale, int valid, "
      "float smoothing=0.0, int vocab=0, float z_loss=0.0) -> ()");
  m.def("gelu_forward(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("bias_gelu_forward(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
  m.def("geglu_forward(Tensor x) -> Tensor");
  m.def("geglu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("swiglu_forward(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
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
  m.impl("add_layer_norm_forward", &add_layer_norm_forward);
  m.impl("add_rms_norm_forward", &add_rms_norm_forward);
  m.impl("bias_gelu_forward", &bias_gelu_forward);
  m.impl("bias_gelu_backward", &bias_gelu_backward);
  m.impl("geglu_forward", &geglu_forward);
  m.impl("geglu_backward", &geglu_backward);
  m.impl("swiglu_forward", &swiglu_forward);
  m.impl("swiglu_backward", &swiglu_backward);
}

}  // namespace megapre
