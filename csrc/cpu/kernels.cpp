// Norms, activations and the local part of cross-entropy on the CPU. Formulas: megapre/kernels/*.py.
// Compiled once per instruction set with -DMEGAPRE_VARIANT=portable|avx2|avx512.
#include "kernels.h"
#include "simd.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

// --- norms: a row stays in the first-level cache between its passes -------------------------------------------------

template <class T, bool CENTRED>
static void norm_forward(const void* x_, const float* weight, const float* bias, void* y_, float* statistics,
                         int64_t rows, int64_t width, float eps, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* x = (const T*)x_ + row * width;
    T* y = (T*)y_ + row * width;
    const float mean =
        CENTRED ? sum(accumulate(width, [&](int64_t i, int64_t n) { return read(x + i, n); })) / width : 0;
    const Floats squares = accumulate(width, [&](int64_t i, int64_t n) {
      Floats d = read(x + i, n, mean) - mean;
      return d * d;
    });
    float inverse = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
    sweep(width, [&](int64_t i, int64_t n) {
      Floats v = (read(x + i, n) - mean) * inverse * read(weight + i, n);
      if (CENTRED && bias) v += read(bias + i, n);
      write(y + i, v, n);
    });
    if (CENTRED) statistics[row] = mean;
    statistics[(CENTRED ? rows : 0) + row] = inverse;
  }
}

// With g = grad * weight and xhat = (x - mean) / deviation:
// grad_x = (g - mean(g) - xhat mean(g xhat)) / deviation; RMSNorm has no mean(g) term.
template <class T, bool CENTRED>
static void norm_backward(const void* grad_, const void* x_, const float* weight, const float* statistics,
                          void* grad_x_, float* sums, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  memset(sums, 0, sizeof(float) * width * (CENTRED ? 2 : 1));
  for (int64_t row = begin; row < end; row++) {
    const T* grad = (const T*)grad_ + row * width;
    const T* x = (const T*)x_ + row * width;
    T* grad_x = (T*)grad_x_ + row * width;
    const float mean = CENTRED ? statistics[row] : 0;
    const float inverse = statistics[(CENTRED ? rows : 0) + row];
    Floats along = all(0), level = all(0);
    sweep(width, [&](int64_t i, int64_t n) {
      Floats g = read(grad + i, n);
      Floats scaled = g * read(weight + i, n);
      Floats xhat = (read(x + i, n) - mean) * inverse;
      along += scaled * xhat;
      write(sums + i, read(sums + i, n) + g * xhat, n);
      if (CENTRED) {
        level += scaled;
        write(sums + width + i, read(sums + width + i, n) + g, n);
      }
    });
    const float a = sum(along) / width, c = CENTRED ? sum(level) / width : 0;
    sweep(width, [&](int64_t i, int64_t n) {
      Floats xhat = (read(x + i, n) - mean) * inverse;
      write(grad_x + i, (read(grad + i, n) * read(weight + i, n) - c - xhat * a) * inverse, n);
    });
  }
}

// --- cross-entropy --------------------------------------------------------------------------------------------------

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

template <class T>
static void ce_statistics(const void* logits_, const int64_t* targets, float* statistics, int64_t rows,
                          int64_t stride, int64_t valid, int64_t begin, int64_t end) {
  const float infinity = __builtin_inff();
  for (int64_t row = begin; row < end; row++) {
    const T* x = (const T*)logits_ + row * stride;
    Floats top[4] = {all(-infinity), all(-infinity), all(-infinity), all(-infinity)};
    int64_t i = 0;
    for (; i + 4 * LANES <= valid; i += 4 * LANES)
      for (int k = 0; k < 4; k++) {
        Floats v = load(x + i + k * LANES);
        top[k] = v > top[k] ? v : top[k];
      }
    const int64_t whole = i;
    sweep(valid - whole, [&](int64_t j, int64_t n) {
      Floats v = read(x + whole + j, n, -infinity);
      top[0] = v > top[0] ? v : top[0];
    });
    for (int k = 1; k < 4; k++) top[0] = top[k] > top[0] ? top[k] : top[0];
    const float maximum = largest(top[0]);
    const float base = maximum == -infinity ? 0 : maximum;
    const Floats total = accumulate(
        valid, [&](int64_t j, int64_t n) { return exponential(read(x + j, n, -infinity) - base); });
    const int64_t target = targets[row];
    statistics[row] = maximum;
    statistics[rows + row] = sum(total);
    statistics[2 * rows + row] = target >= 0 && target < valid ? widen(x[target]) : 0;
  }
}

template <class T>
static void ce_gradient(void* logits_, const int64_t* targets, const float* lse, const float* scale, int64_t width,
                        int64_t stride, int64_t valid, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* x = (T*)logits_ + row * stride;
    const int64_t target = targets[row];
    const bool ours = target >= 0 && target < valid;
    const float shift = lse[row], factor = scale[row];
    const Floats chosen = all(ours ? widen(x[target]) : 0);
    sweep(valid, [&](int64_t i, int64_t n) { write(x + i, exponential(read(x + i, n) - shift) * factor, n); });
    if (ours) write(x + target, (exponential(chosen - shift) - 1.0f) * factor, 1);
    memset(x + valid, 0, sizeof(T) * (width - valid));
  }
}

// --- activations: tanh form of GELU is x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) -----------------------------

constexpr float SLOPE = 1.5957691216057308f;  // 2 sqrt(2/pi)

template <class T>
static void gelu_forward(const void* x_, void* y_, int64_t begin, int64_t end) {
  const T* x = (const T*)x_ + begin;
  T* y = (T*)y_ + begin;
  sweep(end - begin, [&](int64_t i, int64_t n) {
    Floats v = read(x + i, n);
    write(y + i, v * sigmoid(SLOPE * (v + 0.044715f * v * v * v)), n);
  });
}

template <class T>
static void gelu_backward(const void* grad_, const void* x_, void* grad_x_, int64_t begin, int64_t end) {
  const T *grad = (const T*)grad_ + begin, *x = (const T*)x_ + begin;
  T* grad_x = (T*)grad_x_ + begin;
  sweep(end - begin, [&](int64_t i, int64_t n) {
    Floats v = read(x + i, n), square = v * v;
    Floats s = sigmoid(SLOPE * v * (1.0f + 0.044715f * square));
    Floats slope = s + v * s * (1.0f - s) * SLOPE * (1.0f + 3 * 0.044715f * square);
    write(grad_x + i, read(grad + i, n) * slope, n);
  });
}

template <class T>
static void swiglu_forward(const void* x_, void* y_, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T *gate = (const T*)x_ + row * 2 * width, *up = gate + width;
    T* y = (T*)y_ + row * width;
    sweep(width, [&](int64_t i, int64_t n) {
      Floats g = read(gate + i, n);
      write(y + i, g * sigmoid(g) * read(up + i, n), n);
    });
  }
}

template <class T>
static void swiglu_backward(const void* grad_, const void* x_, void* grad_x_, int64_t width, int64_t begin,
                            int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T *gate = (const T*)x_ + row * 2 * width, *up = gate + width, *grad = (const T*)grad_ + row * width;
    T *grad_gate = (T*)grad_x_ + row * 2 * width, *grad_up = grad_gate + width;
    sweep(width, [&](int64_t i, int64_t n) {
      Floats g = read(gate + i, n), d = read(grad + i, n), s = sigmoid(g);
      write(grad_gate + i, d * read(up + i, n) * s * (1.0f + g * (1.0f - s)), n);
      write(grad_up + i, d * g * s, n);
    });
  }
}

const Kernels kernels = {
    {norm_forward<float, true>, norm_forward<bf16, true>},
    {norm_forward<float, false>, norm_forward<bf16, false>},
    {norm_backward<float, true>, norm_backward<bf16, true>},
    {norm_backward<float, false>, norm_backward<bf16, false>},
    {ce_statistics<float>, ce_statistics<bf16>},
    {ce_gradient<float>, ce_gradient<bf16>},
    {gelu_forward<float>, gelu_forward<bf16>},
    {gelu_backward<float>, gelu_backward<bf16>},
    {swiglu_forward<float>, swiglu_forward<bf16>},
    {swiglu_backward<float>, swiglu_backward<bf16>},
};

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
