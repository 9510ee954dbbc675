// Counter-based random numbers as torch.ops.megapre.*; the arithmetic is in philox.cpp.
#include "ops.h"

namespace megapre {
namespace {

// Fill `out` with the box of that size at `offset` of the logical tensor of `shape`: trailing whole dimensions are
// one run of consecutive elements, and runs are cut into chunks for the threads.
void philox_normal_(Tensor& out, at::IntArrayRef words, at::IntArrayRef shape, at::IntArrayRef offset) {
  TORCH_CHECK_VALUE(out.is_contiguous() && out.scalar_type() == at::kFloat, "out must be contiguous fp32");
  TORCH_CHECK_VALUE(words.size() == 4 && (int64_t)shape.size() == out.dim() && shape.size() == offset.size(),
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
  TORCH_CHECK_VALUE(probability >= 0 && probability < 1, "dropout probability ", probability, " must be in [0, 1)");
  return (uint32_t)std::min(probability * 4294967296.0 + 0.5, 4294967295.0);
}

Tensor keep_mask(int64_t key, int64_t step, at::IntArrayRef sites, const Tensor& positions, const Tensor& samples,
                 int64_t first, int64_t features, double probability) {
  const int64_t P = positions.numel(), B = samples.numel(), S = sites.size();
  TORCH_CHECK_VALUE(first >= 0 && features >= 0, "features [", first, ", ", first + features, ") must not be negative");
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
  TORCH_CHECK_VALUE(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [positions, samples, features]");
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

Tensor bias_dropout_residual(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual, int64_t key,
                             int64_t step, int64_t site, const Tensor& positions, const Tensor& samples,
                             double probability) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [positions, samples, features]");
  check_like(residual, x, "residual");
  const int64_t B = x.size(1), width = x.size(2), size = x.element_size();
  const Tensor p = as_longs(positions, x.size(0), "positions"), s = as_longs(samples, B, "samples");
  const Tensor b = bias ? as_floats(*bias, width, "bias") : Tensor();
  const float* shift = bias ? b.const_data_ptr<float>() : nullptr;
  Tensor y = at::empty_like(x);
  const uint32_t limit = threshold(probability);
  const float scale = (float)(1.0 / (1.0 - probability));
  const int64_t *position = p.const_data_ptr<int64_t>(), *sample = s.const_data_ptr<int64_t>();
  const char *in = (const char*)x.const_data_ptr(), *base = (const char*)residual.const_data_ptr();
  char* out = (char*)y.mutable_data_ptr();
  const auto function = variant().random->bias_dropout_residual_row[type_of(x)];
  at::parallel_for(0, x.size(0) * B, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      function((uint32_t)key, (uint32_t)step, (uint32_t)site, (uint32_t)position[row / B], sample[row % B], width,
               limit, scale, in + row * width * size, shift, base + row * width * size, out + row * width * size);
  });
  return y;
}

std::vector<int64_t> philox(at::IntArrayRef counter, at::IntArrayRef key) {
  TORCH_CHECK_VALUE(counter.size() == 4 && key.size() == 2, "Philox has four counter words and two key words");
  uint32_t c[4], k[2] = {(uint32_t)key[0], (uint32_t)key[1]}, out[4];
  for (int i = 0; i < 4; i++) c[i] = (uint32_t)counter[i];
  variant().random->philox(c, k, out);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megapre, m) {
  m.def("philox_normal_(Tensor(a!) out, int[] words, int[] shape, int[] offset) -> ()");
  m.def(
      "keep_mask(int key, int step, int[] sites, Tensor positions, Tensor samples, int first, int features, "
      "float probability) -> Tensor");
  m.def(
      "dropout(Tensor x, int key, int step, int site, Tensor positions, Tensor samples, float probability) -> Tensor");
  m.def(
      "bias_dropout_residual(Tensor x, Tensor? bias, Tensor residual, int key, int step, int site, Tensor positions, "
      "Tensor samples, float probability) -> Tensor");
  m.def("philox", &philox);
}

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("philox_normal_", &philox_normal_);
  m.impl("keep_mask", &keep_mask);
  m.impl("dropout", &dropout);
  m.impl("bias_dropout_residual", &bias_dropout_residual);
}

}  // namespace megapre
