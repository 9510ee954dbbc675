// The CPU kernels, one table per instruction set: kernels.cpp and philox.cpp are compiled once for each and picked at
// run time, so that one build serves every machine. No torch and no C++ library headers on this side: an inline
// function of the standard library compiled for AVX-512 could be the copy the linker keeps for everyone.
#pragma once
#include <stdint.h>

namespace megapre {

// Index of a function pointer pair: activations are fp32 or bf16; statistics and weights are always fp32.
enum Type { FP32 = 0, BF16 = 1 };

// Scalars of one AdamW step: keep = 1 - lr decay, rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t).
struct AdamW {
  float beta1, beta2, rest1, rest2, eps, inverse, keep, rate, root;
};

struct Kernels {
  // Rows [begin, end) of x [rows, width]. statistics: mean then 1/deviation [2, rows], or 1/rms [1, rows].
  // With a residual, total = x + residual is written and normalised; without, both are null.
  using NormForward = void (*)(const void* x, const void* residual, const float* weight, const float* bias, void* y,
                               void* total, float* statistics, int64_t rows, int64_t width, float eps, int64_t begin,
                               int64_t end);
  // sums [2 or 1, width]: this range's share of the gradients of weight (and bias), overwritten. grad_total may be
  // null; it is added to grad_x.
  using NormBackward = void (*)(const void* grad, const void* grad_total, const void* x, const float* weight,
                                const float* statistics, void* grad_x, float* sums, int64_t rows, int64_t width,
                                int64_t begin, int64_t end);
  NormForward layer_norm_forward[2], rms_norm_forward[2];
  NormBackward layer_norm_backward[2], rms_norm_backward[2];
  // Rows of logits [rows, width] at a distance of `stride`. statistics [4, rows]: max, sum of exp, target's logit,
  // sum. share: smoothing over the size of the vocabulary. A row of scale 0 is overwritten by zeros unread.
  void (*ce_statistics[2])(const void* logits, const int64_t* targets, float* statistics, int64_t rows,
                           int64_t stride, int64_t valid, int64_t begin, int64_t end);
  void (*ce_gradient[2])(void* logits, const int64_t* targets, const float* lse, const float* scale, int64_t width,
                         int64_t stride, int64_t valid, float smoothing, float share, float z_loss, int64_t begin,
                         int64_t end);
  // Elements or rows [begin, end); GLU rows are [gate, up] of `width` features each. sums [width]: overwritten.
  void (*gelu_forward[2])(const void* x, void* y, int64_t begin, int64_t end);
  void (*gelu_backward[2])(const void* grad, const void* x, void* grad_x, int64_t begin, int64_t end);
  void (*bias_gelu_forward[2])(const void* x, const float* bias, void* y, int64_t width, int64_t begin, int64_t end);
  void (*bias_gelu_backward[2])(const void* grad, const void* x, const float* bias, void* grad_x, float* sums,
                                int64_t width, int64_t begin, int64_t end);
  using GluForward = void (*)(const void* x, void* y, int64_t width, int64_t begin, int64_t end);
  using GluBackward = void (*)(const void* grad, const void* x, void* grad_x, int64_t width, int64_t begin,
                               int64_t end);
  GluForward swiglu_forward[2];
  GluBackward swiglu_backward[2];
  GluForward geglu_forward[2];
  GluBackward geglu_backward[2];
  // One position of one sample; y may be x.
  void (*rope[2])(const void* x, void* y, const float* cosines, const float* sines, int64_t heads, int64_t half,
                  bool interleaved, float sign);
  // Elements [begin, end); the index is the type of the model's copy, which may be null.
  void (*adamw[2])(float* master, const float* gradient, float* average, float* square, void* model, const AdamW& c,
                   int64_t begin, int64_t end);
  void (*accumulate[2])(float* to, const void* x, int64_t begin, int64_t end);
  void (*accumulate_turned[2])(float* to, const void* x, int64_t rows, int64_t width, int64_t begin, int64_t end);
  double (*square_sum[2])(const void* x, int64_t begin, int64_t end);
  // sums[i * apart] of x_i y_i, for `count` neighbouring rows of `width`.
  void (*row_dots[2])(const void* x, const void* y, float* sums, int64_t count, int64_t apart, int64_t width);
  // y [groups, width] of x [groups, each, width], summed over the middle; the index is y's type.
  void (*group_sums[2])(const float* x, void* y, int64_t groups, int64_t each, int64_t width);
};

struct Random {
  // Elements [start, start + count) of the N(0, 1) tensor that `words` names.
  void (*normal)(const uint32_t words[4], int64_t start, int64_t count, float* out);
  // One row of the keep mask: features [first, first + count) of (site, position, sample).
  void (*keep_row)(uint32_t key, uint32_t step, uint32_t site, uint32_t position, int64_t sample, int64_t first,
                   int64_t count, uint32_t threshold, uint8_t* out);
  void (*dropout_row[2])(uint32_t key, uint32_t step, uint32_t site, uint32_t position, int64_t sample, int64_t count,
                         uint32_t threshold, float scale, const void* x, void* y);
  // y = residual + dropout(x + bias), where bias may be null.
  void (*bias_dropout_residual_row[2])(uint32_t key, uint32_t step, uint32_t site, uint32_t position, int64_t sample,
                                       int64_t count, uint32_t threshold, float scale, const void* x,
                                       const float* bias, const void* residual, void* y);
  void (*philox)(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
};

namespace portable { extern const Kernels kernels; extern const Random random; }
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEGAPRE_X86 1
namespace avx2 { extern const Kernels kernels; extern const Random random; }
namespace avx512 { extern const Kernels kernels; extern const Random random; }
#endif

}  // namespace megapre
