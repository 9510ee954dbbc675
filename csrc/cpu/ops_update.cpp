// Rotary positions and the optimizer as torch.ops.megapre.*; the arithmetic is in kernels.cpp.
#include "ops.h"

#include <cmath>

namespace megapre {
namespace {

// --- rotary positions -----------------------------------------------------------------------------------------------

// Heads and features in one piece; positions and samples may be at any distance, as in a slice of fused q, k, v.
void check_heads(const Tensor& x, const Tensor& cosines) {
  TORCH_CHECK_VALUE(x.dim() == 4 && (x.size(3) <= 1 || x.stride(3) == 1) && (x.size(2) <= 1 || x.stride(2) == x.size(3)),
                    "rope: x must be [seq, batch, heads, dim] with each position's heads in one piece, got ",
                    x.sizes(), " of strides ", x.strides());
  TORCH_CHECK_VALUE(x.size(0) == cosines.size(0) && x.size(1) == cosines.size(1) && x.size(3) == 2 * cosines.size(2),
                    "rope: tables ", cosines.sizes(), " do not fit x ", x.sizes());
}

void turn(const Tensor& x, const Tensor& y, const Tensor& cosines, const Tensor& sines, bool interleaved,
          bool inverse) {
  const int64_t batch = x.size(1), heads = x.size(2), half = x.size(3) / 2, size = x.element_size();
  const char* in = (const char*)x.const_data_ptr();
  char* out = (char*)y.mutable_data_ptr();
  const float *c = cosines.const_data_ptr<float>(), *s = sines.const_data_ptr<float>();
  const auto function = variant().kernels->rope[type_of(x)];
  at::parallel_for(0, x.size(0) * batch, grain(2 * half * heads), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t p = row / batch, b = row % batch;
      function(in + (p * x.stride(0) + b * x.stride(1)) * size, out + (p * y.stride(0) + b * y.stride(1)) * size,
               c + row * half, s + row * half, heads, half, interleaved, inverse ? -1.0f : 1.0f);
    }
  });
}

void check_tables(const Tensor& cosines, const Tensor& sines) {
  TORCH_CHECK_VALUE(cosines.dim() == 3 && cosines.sizes() == sines.sizes() && cosines.is_contiguous() &&
                    sines.is_contiguous() && cosines.scalar_type() == at::kFloat && sines.scalar_type() == at::kFloat,
                    "rope: tables must be contiguous fp32 [seq, batch, dim/2], got ", cosines.sizes());
}

std::vector<Tensor> rope(at::TensorList xs, const Tensor& cosines, const Tensor& sines, bool interleaved,
                         bool inverse) {
  check_tables(cosines, sines);
  std::vector<Tensor> out;
  for (const Tensor& x : xs) {
    check_heads(x, cosines);
    out.push_back(at::empty(x.sizes(), x.options()));
    turn(x, out.back(), cosines, sines, interleaved, inverse);
  }
  return out;
}

void rope_(at::TensorList xs, const Tensor& cosines, const Tensor& sines, bool interleaved, bool inverse) {
  check_tables(cosines, sines);
  for (const Tensor& x : xs) check_heads(x, cosines);
  for (const Tensor& x : xs) turn(x, x, cosines, sines, interleaved, inverse);
}

// --- optimizer ------------------------------------------------------------------------------------------------------

// Everything is on the CPU, so reading the scalars waits for nothing.
void adamw_(Tensor& master, const Tensor& gradient, Tensor& average, Tensor& square, const std::optional<Tensor>& model,
            const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, const Tensor& step,
            const Tensor& divisor, const Tensor& skip) {
  for (const Tensor* x : {(const Tensor*)&master, &gradient, (const Tensor*)&average, (const Tensor*)&square})
    TORCH_CHECK_VALUE(x->is_contiguous() && x->scalar_type() == at::kFloat && x->numel() == master.numel(),
                      "adamw: master, gradient and both averages must be contiguous fp32 of one length, got ",
                      x->scalar_type(), " ", x->sizes(), " beside ", master.sizes());
  TORCH_CHECK_VALUE(!model || (model->is_contiguous() && model->numel() == master.numel()),
                    "adamw: the model's copy must be contiguous and as long as the master weights");
  if (skip.item<double>() != 0) return;
  const double rate = lr.item<double>(), count = step.item<double>();
  AdamW c;
  c.beta1 = (float)beta1, c.beta2 = (float)beta2, c.rest1 = (float)(1 - beta1), c.rest2 = (float)(1 - beta2);
  c.eps = (float)eps, c.inverse = (float)(1 / divisor.item<double>()), c.keep = (float)(1 - rate * weight_decay);
  c.rate = (float)(rate / (1 - std::pow(beta1, count))), c.root = (float)(1 / std::sqrt(1 - std::pow(beta2, count)));
  void* copy = model ? model->mutable_data_ptr() : nullptr;
  const auto function = variant().kernels->adamw[model ? type_of(*model) : FP32];
  at::parallel_for(0, master.numel(), ELEMENTS, [&](int64_t begin, int64_t end) {
    function(master.mutable_data_ptr<float>(), gradient.const_data_ptr<float>(), average.mutable_data_ptr<float>(),
             square.mutable_data_ptr<float>(), copy, c, begin, end);
  });
}

void accumulate_(Tensor& to, const Tensor& x) {
  const bool turned = x.dim() == 2 && !x.is_contiguous() && x.t().is_contiguous();
  TORCH_CHECK_VALUE(to.is_contiguous() && to.scalar_type() == at::kFloat && (turned || x.is_contiguous()) &&
                    x.sizes() == to.sizes(),
                    "accumulate: a contiguous fp32 sum and an addend of its shape are needed, got ", to.scalar_type(),
                    " ", to.sizes(), " and ", x.sizes());
  float* sum = to.mutable_data_ptr<float>();
  if (turned) {
    const int64_t rows = x.size(0), width = x.size(1);
    const auto function = variant().kernels->accumulate_turned[type_of(x)];
    at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      function(sum, x.const_data_ptr(), rows, width, begin, end);
    });
    return;
  }
  const auto function = variant().kernels->accumulate[type_of(x)];
  at::parallel_for(0, to.numel(), ELEMENTS, [&](int64_t begin, int64_t end) {
    function(sum, x.const_data_ptr(), begin, end);
  });
}

Tensor square_sum(const Tensor& flat) {
  TORCH_CHECK_VALUE(flat.is_contiguous(), "square_sum: the shard must be contiguous");
  constexpr int64_t CHUNK = 1 << 16;
  const int64_t total = flat.numel(), parts = (total + CHUNK - 1) / CHUNK;
  std::vector<double> partial(parts);
  const auto function = variant().kernels->square_sum[type_of(flat)];
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++)
      partial[part] = function(flat.const_data_ptr(), part * CHUNK, std::min(total, (part + 1) * CHUNK));
  });
  double sum = 0;
  for (double x : partial) sum += x;
  Tensor out = at::empty({}, flat.options().dtype(at::kFloat));
  *out.mutable_data_ptr<float>() = (float)sum;
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megapre, m) {
  m.def("rope(Tensor[] xs, Tensor cosines, Tensor sines, bool interleaved, bool inverse) -> Tensor[]");
  m.def("rope_(Tensor(a!)[] xs, Tensor cosines, Tensor sines, bool interleaved, bool inverse) -> ()");
  m.def(
      "adamw_(Tensor(a!) master, Tensor gradient, Tensor(b!) average, Tensor(c!) square, Tensor(d!)? model, Tensor lr, "
      "float beta1, float beta2, float eps, float weight_decay, Tensor step, Tensor divisor, Tensor skip) -> ()");
  m.def("accumulate_(Tensor(a!) to, Tensor x) -> ()");
  m.def("square_sum(Tensor flat) -> Tensor");
}

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("rope", &rope);
  m.impl("rope_", &rope_);
  m.impl("adamw_", &adamw_);
  m.impl("accumulate_", &accumulate_);
  m.impl("square_sum", &square_sum);
}

}  // namespace megapre
