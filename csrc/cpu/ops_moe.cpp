// Mixture of experts as torch.ops.megapre.*: checks, memory and threads; the arithmetic is in moe.cpp. Each element of
// a result is one task's alone, summed in one order: results do not depend on the threads.
#include "moe.h"

#include <ATen/ops/zeros.h>

#include <climits>
#include <cstring>

#include "ops.h"

namespace megapre {
namespace {

const MoEKernels* pick() {
#ifdef MEGAPRE_X86
  const std::string name = variant().name;
  if (has_tiles()) return amx::moe;
  if (name == "avx512") return avx512::moe;
  if (name == "avx2") return avx2::moe;
#endif
  return portable::moe;
}

const MoEKernels& kernels(const Tensor& x) {
  static const MoEKernels* chosen = pick();
  return chosen[type_of(x)];
}

void check_sizes(at::IntArrayRef sizes, int64_t experts, int64_t rows, const char* name) {
  int64_t total = 0, least = 0;
  for (int64_t size : sizes) total += size, least = std::min(least, size);
  TORCH_CHECK_VALUE((int64_t)sizes.size() == experts && total == rows && least >= 0, name, ": sizes ", sizes,
                    " do not cut ", rows, " rows for ", experts, " experts");
}

// All blocks of all products, a few of which may be empty.
void run(const std::vector<Product>& products, const MoEKernels& kernels, const Tensor& like) {
  struct Task {
    const Product* product;
    int64_t row, column;
  };
  std::vector<Task> tasks;
  for (const Product& p : products)
    for (int64_t column = 0; column < p.n; column += PRODUCT_COLUMNS)
      for (int64_t row = 0; row < p.m; row += PRODUCT_ROWS) tasks.push_back({&p, row, column});
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    const Tensor memory = at::empty({kernels.product_bytes + 64}, like.options().dtype(at::kByte));
    void* scratch = (void*)(((uintptr_t)memory.mutable_data_ptr() + 63) / 64 * 64);
    kernels.begin();
    for (int64_t i = begin; i < end; i++) kernels.product(*tasks[i].product, tasks[i].row, tasks[i].column, scratch);
    kernels.end();
  });
}

Tensor grouped_mm(const Tensor& x, const Tensor& weight_, at::IntArrayRef sizes) {
  check_matrix(x, "x");
  TORCH_CHECK_VALUE(weight_.dim() == 3 && weight_.size(2) == x.size(1) && weight_.scalar_type() == x.scalar_type(),
                    "grouped_mm: weight must be ", x.scalar_type(), " [experts, out, ", x.size(1), "], got ",
                    weight_.scalar_type(), " ", weight_.sizes());
  check_sizes(sizes, weight_.size(0), x.size(0), "grouped_mm");
  const bool turned = weight_.stride(2) != 1 && weight_.stride(1) == 1;
  const Tensor weight = turned || weight_.stride(2) == 1 ? weight_ : weight_.contiguous();
  const int64_t out = weight.size(1), depth = weight.size(2), element = x.element_size();
  Tensor y = at::empty({x.size(0), out}, x.options());
  if (depth == 0) return y.zero_();
  std::vector<Product> products;
  int64_t first = 0;
  for (int64_t e = 0; e < (int64_t)sizes.size(); first += sizes[e++]) {
    const Operand rows = {(const char*)x.const_data_ptr() + first * depth * element, depth, false};
    const Operand matrix = {(const char*)weight.const_data_ptr() + e * weight.stride(0) * element,
                            weight.stride(turned ? 2 : 1), !turned};
    products.push_back({rows, matrix, sizes[e], out, depth, (char*)y.mutable_data_ptr() + first * out * element, out, false});
  }
  run(products, kernels(x), x);
  return y;
}

void grouped_dw_(Tensor& main, const Tensor& dy, const Tensor& x, at::IntArrayRef sizes) {
  check_matrix(x, "x");
  check_matrix(dy, "dy");
  TORCH_CHECK_VALUE(main.dim() == 3 && main.scalar_type() == at::kFloat && main.stride(2) == 1 &&
                        dy.size(0) == x.size(0) && main.size(1) == dy.size(1) && main.size(2) == x.size(1) &&
                        dy.scalar_type() == x.scalar_type(),
                    "grouped_dw: main must be fp32 [experts, ", dy.size(1), ", ", x.size(1), "], got ",
                    main.scalar_type(), " ", main.sizes());
  check_sizes(sizes, main.size(0), x.size(0), "grouped_dw");
  const int64_t out = dy.size(1), in = x.size(1), element = x.element_size();
  std::vector<Product> products;
  int64_t first = 0;
  for (int64_t e = 0; e < (int64_t)sizes.size(); first += sizes[e++]) {
    const Operand left = {(const char*)dy.const_data_ptr() + first * out * element, out, true};
    const Operand right = {(const char*)x.const_data_ptr() + first * in * element, in, false};
    if (sizes[e] == 0) continue;
    products.push_back({left, right, out, in, sizes[e], main.mutable_data_ptr<float>() + e * main.stride(0), main.stride(1), true});
  }
  run(products, kernels(x), x);
}

void check_rows(const Tensor& rows, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.scalar_type() == at::kLong && rows.is_contiguous(), name,
                    ": rows must be contiguous int64 [tokens, choices], got ", rows.scalar_type(), " ", rows.sizes());
}

Tensor combine(const Tensor& y, const std::optional<Tensor>& weights, const Tensor& rows) {
  check_matrix(y, "y");
  check_rows(rows, "combine");
  const int64_t tokens = rows.size(0), choices = rows.size(1), width = y.size(1);
  const Tensor scale = weights ? as_floats(weights->flatten(), tokens * choices, "weights") : Tensor();
  Tensor out = at::empty({tokens, width}, y.options());
  const auto function = kernels(y).combine;
  at::parallel_for(0, tokens, grain(width * choices), [&](int64_t begin, int64_t end) {
    function(y.const_data_ptr(), scale.defined() ? scale.const_data_ptr<float>() : nullptr, rows.const_data_ptr<int64_t>(),
             out.mutable_data_ptr(), y.size(0), choices, width, begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor> spread(const Tensor& grad, const Tensor& y, const Tensor& weights, const Tensor& rows) {
  check_matrix(grad, "grad");
  check_matrix(y, "y");
  check_rows(rows, "spread");
  const int64_t tokens = rows.size(0), choices = rows.size(1), width = y.size(1);
  TORCH_CHECK_VALUE(grad.size(0) == tokens && grad.size(1) == width && grad.scalar_type() == y.scalar_type(),
                    "spread: grad must be like the result, got ", grad.scalar_type(), " ", grad.sizes());
  const Tensor scale = as_floats(weights.flatten(), tokens * choices, "weights");
  Tensor grad_y = at::empty_like(y), grad_weights = at::empty({tokens, choices}, scale.options());
  const auto function = kernels(y).spread;
  at::parallel_for(0, tokens, grain(width * choices), [&](int64_t begin, int64_t end) {
    function(grad.const_data_ptr(), y.const_data_ptr(), scale.const_data_ptr<float>(), rows.const_data_ptr<int64_t>(),
             grad_y.mutable_data_ptr(), grad_weights.mutable_data_ptr<float>(), y.size(0), choices, width, begin, end);
  });
  return {grad_y, grad_weights};
}

// Where the k largest of each row are, largest first, equal ones by number, NaN before all. Each round takes the first
// of the largest numbers, which order as the scores do; -2^31 where one is taken.
void top_k(const float* scores, int64_t* ids, int64_t experts, int64_t k, int64_t begin, int64_t end) {
  std::vector<int32_t> keys(experts);
  for (int64_t row = begin; row < end; row++) {
    for (int64_t i = 0; i < experts; i++) {
      const float x = scores[row * experts + i];
      int32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      bits = bits < 0 ? bits ^ 0x7fffffff : bits;
      keys[i] = x != x ? INT_MAX : x == 0 ? 0 : bits;
    }
    for (int64_t j = 0; j < k; j++) {
      int32_t top = INT_MIN;
      for (int64_t i = 0; i < experts; i++) top = std::max(top, keys[i]);
      int64_t at = 0;
      while (keys[at] != top) at++;
      ids[row * k + j] = at;
      keys[at] = INT_MIN;
    }
  }
}

Tensor top_k_of(const Tensor& scores, int64_t k) {
  check_matrix(scores, "scores");
  TORCH_CHECK_VALUE(scores.scalar_type() == at::kFloat && k >= 0 && k <= scores.size(1), "top_k: fp32 scores of at least ",
                    k, " experts are needed, got ", scores.scalar_type(), " ", scores.sizes());
  Tensor ids = at::empty({scores.size(0), k}, scores.options().dtype(at::kLong));
  at::parallel_for(0, scores.size(0), grain(scores.size(1) * (1 + k)), [&](int64_t begin, int64_t end) {
    top_k(scores.const_data_ptr<float>(), ids.mutable_data_ptr<int64_t>(), scores.size(1), k, begin, end);
  });
  return ids;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megapre, m) {
  m.def("moe_top_k(Tensor scores, int k) -> Tensor");
  m.def("moe_combine(Tensor y, Tensor? weights, Tensor rows) -> Tensor");
  m.def("moe_spread(Tensor grad, Tensor y, Tensor weights, Tensor rows) -> (Tensor, Tensor)");
  m.def("grouped_mm(Tensor x, Tensor weight, int[] sizes) -> Tensor");
  m.def("grouped_dw_(Tensor(a!) main, Tensor dy, Tensor x, int[] sizes) -> ()");
}

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("moe_top_k", &top_k_of);
  m.impl("moe_combine", &combine);
  m.impl("moe_spread", &spread);
  m.impl("grouped_mm", &grouped_mm);
  m.impl("grouped_dw_", &grouped_dw_);
}

}  // namespace megapre
