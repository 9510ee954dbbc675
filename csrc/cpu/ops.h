// What the files of ops share: the chosen instruction set, checks of arguments and the cut of work into tasks.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace megapre {

using at::Tensor;

struct Variant {
  const char* name;
  const Kernels* kernels;
  const Random* random;
};

const Variant& variant();

// Whether products of bf16 are AMX tiles': the variant is AVX-512, not by MEGAPRE_CPU, and the processor and the kernel
// of the operating system have them.
bool has_tiles();

// The attention kernels of this machine, by Type: as `variant`, or AMX tiles.
const AttentionKernels* attention_kernels();

inline Type type_of(const Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "expected fp32 or bf16, got ",
              x.scalar_type());
  return x.scalar_type() == at::kFloat ? FP32 : BF16;
}

inline void check_matrix(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), name, " must be contiguous [rows, width], got ", x.sizes());
}

inline void check_like(const Tensor& y, const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(y.is_contiguous() && y.sizes() == x.sizes() && y.scalar_type() == x.scalar_type(), name,
                    " must be like x, contiguous ", x.scalar_type(), " ", x.sizes(), ", got ", y.scalar_type(), " ",
                    y.sizes());
}

inline Tensor as_floats(const Tensor& x, int64_t width, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.numel() == width, name, " must be [", width, "], got ", x.sizes());
  return x.to(at::kFloat).contiguous();
}

inline Tensor as_longs(const Tensor& x, int64_t length, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kLong && x.numel() == length, name, " must be int64 [", length, "], got ",
              x.scalar_type(), " ", x.sizes());
  return x.contiguous();
}

// Rows per task so that a task is worth handing to a thread.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

constexpr int64_t ELEMENTS = 16384;  // of an element-wise op, per task

// Share `part` of [0, rows) when it is cut into `parts`, which depends on the rows alone: so do sums over a share.
inline int64_t parts_of(int64_t rows) { return std::clamp<int64_t>(rows / 32, 1, 16); }

}  // namespace megapre
