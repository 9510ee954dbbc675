// Norms, activations and the local part of cross-entropy on the CPU. Formulas: megapre/kernels/*.py.
// Compiled once per instruction set with -DMEGAPRE_VARIANT=portable|avx2|avx512.
#include "kernels.h"
#include "simd.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

// --- norms: a row stays in the first-level cache between its passes; the last pass asks for the next row -------------

template <class T, bool CENTRED>
static void norm_forward(const void* x_, const void* residual_, const float* weight, const float* bias, void* y_,
                         void* total_, float* statistics, int64_t rows, int64_t width, float eps, int64_t begin,
                         int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* x = (const T*)x_ + row * width;
    T* y = (T*)y_ + row * width;
    if (residual_) {
      const T* residual = (const T*)residual_ + row * width;
      T* total = (T*)total_ + row * width;
      sweep(width, [&](int64_t i, int64_t n) INLINED { write(total + i, read(x + i, n) + read(residual + i, n), n); });
      x = total;  // rounded: the norm must see what the backward pass will
    }
    const float mean =
        CENTRED ? sum(accumulate(width, [&](int64_t i, int64_t n) INLINED { return read(x + i, n); })) / width : 0;
    const Floats squares = accumulate(width, [&](int64_t i, int64_t n) INLINED {
      Floats d = read(x + i, n, mean) - mean;
      return d * d;
    });
    float inverse = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
    const T* next = (const T*)x_ + (row + 1) * width;
    sweep(width, [&](int64_t i, int64_t n) INLINED {
      __builtin_prefetch(next + i, 0, 2);
      __builtin_prefetch(y + width + i, 1);
      Floats v = (read(x + i, n) - mean) * inverse * read(weight + i, n);
      if (CENTRED && bias) v += read(bias + i, n);
      write(y + i, v, n);
    });
    if (CENTRED) statistics[row] = mean;
    statistics[(CENTRED ? rows : 0) + row] = inverse;
  }
}

// With g = grad * weight and xhat = (x - mean) / deviation:
// grad_x = (g - mean(g) - xhat mean(g xhat)) / deviation, plus the gradient of the residual sum where there is one;
// RMSNorm has no mean(g) term.
template <class T, bool CENTRED>
static void norm_backward(const void* grad_, const void* grad_total_, const void* x_, const float* weight,
                          const float* statistics, void* grad_x_, float* sums, int64_t rows, int64_t width,
                          int64_t begin, int64_t end) {
  memset(sums, 0, sizeof(float) * width * (CENTRED ? 2 : 1));
  for (int64_t row = begin; row < end; row++) {
    const T* grad = (const T*)grad_ + row * width;
    const T* x = (const T*)x_ + row * width;
    T* grad_x = (T*)grad_x_ + row * width;
    const float mean = CENTRED ? statistics[row] : 0;
    const float inverse = statistics[(CENTRED ? rows : 0) + row];
    Floats along = all(0), level = all(0);
    sweep(width, [&](int64_t i, int64_t n) INLINED {
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
    const T* grad_total = grad_total_ ? (const T*)grad_total_ + row * width : nullptr;
    sweep(width, [&](int64_t i, int64_t n) INLINED {
      __builtin_prefetch(x + width + i, 0, 2);
      __builtin_prefetch(grad + width + i, 0, 2);
      __builtin_prefetch(grad_x + width + i, 1);
      Floats xhat = (read(x + i, n) - mean) * inverse;
      Floats g = (read(grad + i, n) * read(weight + i, n) - c - xhat * a) * inverse;
      write(grad_x + i, grad_total ? g + read(grad_total + i, n) : g, n);
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

// Bytes by which a row's stream is asked for ahead: the hardware stops at every page.
constexpr int64_t AHEAD = 4096;

// A row is read once from memory, a piece at a time: the piece's maximum, then its exponentials out of the first-level
// cache, the sum so far being scaled to each new maximum.
template <class T>
static void ce_statistics(const void* logits_, const int64_t* targets, float* statistics, int64_t rows,
                          int64_t stride, int64_t valid, int64_t begin, int64_t end) {
  const float infinity = __builtin_inff();
  constexpr int64_t PIECE = AHEAD / sizeof(T);
  for (int64_t row = begin; row < end; row++) {
    const T* x = (const T*)logits_ + row * stride;
    float maximum = -infinity, total = 0, level = 0;
    for (int64_t at = 0; at < valid; at += PIECE) {
      const T* piece = x + at;
      const int64_t count = valid - at < PIECE ? valid - at : PIECE;
      Floats top[4] = {all(-infinity), all(-infinity), all(-infinity), all(-infinity)};
      Floats sums[4] = {all(0), all(0), all(0), all(0)};
      int64_t i = 0;
      for (; i + 4 * LANES <= count; i += 4 * LANES) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
          Floats v = load(piece + i + k * LANES);
          top[k] = larger(v, top[k]);
          sums[k] += v;
        }
      }
      const int64_t whole = i;
      sweep(count - whole, [&](int64_t j, int64_t n) INLINED {
        top[0] = larger(read(piece + whole + j, n, -infinity), top[0]);
        sums[1] += read(piece + whole + j, n);
      });
      const float highest = largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
      level += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      const float before = maximum;
      maximum = highest > maximum ? highest : maximum;
      const float base = maximum == -infinity ? 0 : maximum;
      if (before < maximum) total *= exponential(all(before - maximum))[0];
      total += sum(accumulate(count, [&](int64_t j, int64_t n) INLINED {
        __builtin_prefetch((const char*)(piece + j) + AHEAD);
        return exponential(read(piece + j, n, -infinity) - base);
      }));
    }
    const int64_t target = targets[row];
    statistics[row] = maximum;
    statistics[rows + row] = total;
    statistics[2 * rows + row] = target >= 0 && target < valid ? widen(x[target]) : 0;
    statistics[3 * rows + row] = level;
  }
}

template <class T>
static void ce_gradient(void* logits_, const int64_t* targets, const float* lse, const float* scale, int64_t width,
                        int64_t stride, int64_t valid, float smoothing, float share, float z_loss, int64_t begin,
                        int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* x = (T*)logits_ + row * stride;
    const int64_t target = targets[row];
    const bool ours = target >= 0 && target < valid;
    const float shift = lse[row], factor = scale[row];
    if (factor == 0) {  // an ignored row may hold infinities and NaN
      memset(x, 0, sizeof(T) * width);
      continue;
    }
    const Floats chosen = all(ours ? widen(x[target]) : 0);
    const float slope = (1.0f + 2.0f * z_loss * shift), level = share * factor;
    const float product = slope * factor;
    sweep(valid, [&](int64_t i, int64_t n) INLINED {
      __builtin_prefetch((const char*)(x + i) + AHEAD, 1);
      write(x + i, exponential(read(x + i, n) - shift) * product - level, n);
    });
    if (ours) write(x + target, (exponential(chosen - shift) * slope - (share + 1.0f - smoothing)) * factor, 1);
    memset(x + valid, 0, sizeof(T) * (width - valid));
  }
}

// --- activations: tanh form of GELU is x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) -----------------------------

constexpr float SLOPE = 1.5957691216057308f;  // 2 sqrt(2/pi)

// The value and the slope at v.
INLINE Floats gelu(Floats v) { return v * sigmoid(SLOPE * v * (1.0f + 0.044715f * v * v)); }

INLINE Floats gelu_slope(Floats v, Floats* value) {
  Floats square = v * v, s = sigmoid(SLOPE * v * (1.0f + 0.044715f * square));
  *value = v * s;
  return s + v * s * (1.0f - s) * SLOPE * (1.0f + 3 * 0.044715f * square);
}

INLINE Floats silu_slope(Floats v, Floats* value) {
  Floats s = sigmoid(v);
  *value = v * s;
  return s + v * s * (1.0f - s);
}

template <class T>
static void gelu_forward(const void* x_, void* y_, int64_t begin, int64_t end) {
  const T* x = (const T*)x_ + begin;
  T* y = (T*)y_ + begin;
  sweep(end - begin, [&](int64_t i, int64_t n) INLINED { write(y + i, gelu(read(x + i, n)), n); });
}

template <class T>
static void gelu_backward(const void* grad_, const void* x_, void* grad_x_, int64_t begin, int64_t end) {
  const T *grad = (const T*)grad_ + begin, *x = (const T*)x_ + begin;
  T* grad_x = (T*)grad_x_ + begin;
  sweep(end - begin, [&](int64_t i, int64_t n) INLINED {
    Floats value;
    write(grad_x + i, read(grad + i, n) * gelu_slope(read(x + i, n), &value), n);
  });
}

template <class T>
static void bias_gelu_forward(const void* x_, const float* bias, void* y_, int64_t width, int64_t begin,
                              int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* x = (const T*)x_ + row * width;
    T* y = (T*)y_ + row * width;
    sweep(width, [&](int64_t i, int64_t n) INLINED { write(y + i, gelu(read(x + i, n) + read(bias + i, n)), n); });
  }
}

template <class T>
static void bias_gelu_backward(const void* grad_, const void* x_, const float* bias, void* grad_x_, float* sums,
                               int64_t width, int64_t begin, int64_t end) {
  memset(sums, 0, sizeof(float) * width);
  for (int64_t row = begin; row < end; row++) {
    const T *grad = (const T*)grad_ + row * width, *x = (const T*)x_ + row * width;
    T* grad_x = (T*)grad_x_ + row * width;
    sweep(width, [&](int64_t i, int64_t n) INLINED {
      Floats value, g = read(grad + i, n) * gelu_slope(read(x + i, n) + read(bias + i, n), &value);
      write(grad_x + i, g, n);
      write(sums + i, read(sums + i, n) + g, n);
    });
  }
}

// Rows of [gate, up]: silu(gate) up, or gelu(gate) up.
template <class T, bool SILU>
static void glu_forward(const void* x_, void* y_, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T *gate = (const T*)x_ + row * 2 * width, *up = gate + width;
    T* y = (T*)y_ + row * width;
    sweep(width, [&](int64_t i, int64_t n) INLINED {
      Floats g = read(gate + i, n);
      write(y + i, (SILU ? g * sigmoid(g) : gelu(g)) * read(up + i, n), n);
    });
  }
}

template <class T, bool SILU>
static void glu_backward(const void* grad_, const void* x_, void* grad_x_, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T *grad = (const T*)grad_ + row * width, *gate = (const T*)x_ + row * 2 * width, *up = gate + width;
    T *grad_gate = (T*)grad_x_ + row * 2 * width, *grad_up = grad_gate + width;
    sweep(width, [&](int64_t i, int64_t n) INLINED {
      Floats d = read(grad + i, n), g = read(gate + i, n), value;
      Floats slope = SILU ? silu_slope(g, &value) : gelu_slope(g, &value);
      write(grad_gate + i, d * read(up + i, n) * slope, n);
      write(grad_up + i, d * value, n);
    });
  }
}

// --- rotary positions: `sign` -1 turns back -------------------------------------------------------------------------

INLINE void load_pairs(const bf16* p, Floats* even, Floats* odd) {
  Words pairs;  // little-endian: the even feature is the lower half
  memcpy(&pairs, p, sizeof pairs);
  *even = (Floats)(pairs << 16);
  *odd = (Floats)(pairs & 0xffff0000u);
}

INLINE void store_pairs(bf16* p, Floats even, Floats odd) {
  bf16 low[LANES], high[LANES];
  store(low, even);
  store(high, odd);
  Halves a, b;
  memcpy(&a, low, sizeof a);
  memcpy(&b, high, sizeof b);
  Words pairs = widen(a) | widen(b) << 16;
  memcpy(p, &pairs, sizeof pairs);
}

INLINE void load_pairs(const float* p, Floats* even, Floats* odd) {
  float a[LANES], b[LANES];
  for (int i = 0; i < LANES; i++) a[i] = p[2 * i], b[i] = p[2 * i + 1];
  *even = load(a);
  *odd = load(b);
}

INLINE void store_pairs(float* p, Floats even, Floats odd) {
  for (int i = 0; i < LANES; i++) p[2 * i] = even[i], p[2 * i + 1] = odd[i];
}

// One position of one sample: heads of 2 * half features at x, written to y, which may be x.
template <class T>
static void rope(const void* x_, void* y_, const float* cosines, const float* sines, int64_t heads, int64_t half,
                 bool interleaved, float sign) {
  for (int64_t head = 0; head < heads; head++) {
    const T* x = (const T*)x_ + head * 2 * half;
    T* y = (T*)y_ + head * 2 * half;
    int64_t i = 0;
    if (!interleaved) {
      sweep(half, [&](int64_t j, int64_t n) INLINED {
        Floats a = read(x + j, n), b = read(x + half + j, n);
        Floats c = read(cosines + j, n), s = read(sines + j, n) * sign;
        write(y + j, a * c - b * s, n);
        write(y + half + j, b * c + a * s, n);
      });
      continue;
    }
    for (; i + LANES <= half; i += LANES) {
      Floats a, b, c = load(cosines + i), s = load(sines + i) * sign;
      load_pairs(x + 2 * i, &a, &b);
      store_pairs(y + 2 * i, a * c - b * s, b * c + a * s);
    }
    for (; i < half; i++) {
      Floats a = read(x + 2 * i, 1), b = read(x + 2 * i + 1, 1);
      Floats c = read(cosines + i, 1), s = read(sines + i, 1) * sign;
      write(y + 2 * i, a * c - b * s, 1);
      write(y + 2 * i + 1, b * c + a * s, 1);
    }
  }
}

// --- optimizer: plain loops, which the compiler vectorises ----------------------------------------------------------

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = (uint16_t)(x == x ? rounded : 0x7fc0);
}

template <class T, bool COPY>
static void adamw_over(float* __restrict__ master, const float* __restrict__ gradient, float* __restrict__ average,
                       float* __restrict__ square, T* __restrict__ model, const AdamW& c, int64_t begin,
                       int64_t end) {
  const float b1 = c.beta1, b2 = c.beta2, a1 = c.rest1, a2 = c.rest2, eps = c.eps;
  const float inverse = c.inverse, keep = c.keep, rate = c.rate, root = c.root;
  for (int64_t i = begin; i < end; i++) {
    const float g = gradient[i] * inverse;
    const float m = average[i] * b1 + g * a1;
    const float v = square[i] * b2 + g * g * a2;
    const float w = master[i] * keep - rate * m / (__builtin_sqrtf(v) * root + eps);
    average[i] = m;
    square[i] = v;
    master[i] = w;
    if (COPY) narrow(w, model + i);
  }
}

template <class T>
static void adamw(float* master, const float* gradient, float* average, float* square, void* model, const AdamW& c,
                  int64_t begin, int64_t end) {
  if (model) adamw_over<T, true>(master, gradient, average, square, (T*)model, c, begin, end);
  else adamw_over<T, false>(master, gradient, average, square, (T*)model, c, begin, end);
}

template <class T>
static void accumulate_into(float* to, const void* x_, int64_t begin, int64_t end) {
  const T* x = (const T*)x_ + begin;
  to += begin;
  sweep(end - begin, [&](int64_t i, int64_t n) INLINED {
    __builtin_prefetch((const char*)(to + i) + AHEAD, 1);
    write(to + i, read(to + i, n) + read(x + i, n), n);
  });
}

// Rows [begin, end) of to [rows, width] += x^T of x [width, rows], by tiles that stay in the first cache.
template <class T>
static void accumulate_turned(float* to, const void* x_, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t TILE = 32;
  float tile[TILE][TILE];
  const T* x = (const T*)x_;
  for (int64_t row = begin; row < end; row += TILE) {
    const int64_t here = end - row < TILE ? end - row : TILE;
    for (int64_t column = 0; column < width; column += TILE) {
      const int64_t columns = width - column < TILE ? width - column : TILE;
      for (int64_t j = 0; j < columns; j++)
        sweep(here, [&](int64_t i, int64_t n) INLINED { write(tile[j] + i, read(x + (column + j) * rows + row + i, n), n); });
      float* corner = to + row * width + column;
      const int64_t whole = here & ~3, across = columns & ~3;
      for (int64_t i = 0; i < whole; i += 4) {
        for (int64_t k = 0; k < 4; k++) __builtin_prefetch(corner + (i + k) * width + TILE, 1);
        for (int64_t j = 0; j < across; j += 4) add_turned(corner + i * width + j, width, &tile[j][i], TILE);
      }
      for (int64_t i = 0; i < here; i++)
        for (int64_t j = i < whole ? across : 0; j < columns; j++) corner[i * width + j] += tile[j][i];
    }
  }
}

template <class T>
static double square_sum(const void* x_, int64_t begin, int64_t end) {
  const T* x = (const T*)x_;
  double total = 0;
  for (int64_t at = begin; at < end; at += 4096) {  // few enough terms for fp32
    const int64_t count = end - at < 4096 ? end - at : 4096;
    total += sum(accumulate(count, [&](int64_t i, int64_t n) INLINED {
      Floats v = read(x + at + i, n);
      return v * v;
    }));
  }
  return total;
}

template <class T>
static void row_dots(const void* x_, const void* y_, float* sums, int64_t count, int64_t apart, int64_t width) {
  for (int64_t row = 0; row < count; row++) {
    const T *x = (const T*)x_ + row * width, *y = (const T*)y_ + row * width;
    sums[row * apart] = sum(accumulate(width, [&](int64_t i, int64_t n) INLINED {
      return read(x + i, n) * read(y + i, n);
    }));
  }
}

template <class T>
static void group_sums(const float* x, void* y, int64_t groups, int64_t each, int64_t width) {
  for (int64_t g = 0; g < groups; g++)
    sweep(width, [&](int64_t i, int64_t n) INLINED {
      Floats total = read(x + g * each * width + i, n);
      for (int64_t k = 1; k < each; k++) total += read(x + (g * each + k) * width + i, n);
      write((T*)y + g * width + i, total, n);
    });
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
    {bias_gelu_forward<float>, bias_gelu_forward<bf16>},
    {bias_gelu_backward<float>, bias_gelu_backward<bf16>},
    {glu_forward<float, true>, glu_forward<bf16, true>},
    {glu_backward<float, true>, glu_backward<bf16, true>},
    {glu_forward<float, false>, glu_forward<bf16, false>},
    {glu_backward<float, false>, glu_backward<bf16, false>},
    {rope<float>, rope<bf16>},
    {adamw<float>, adamw<bf16>},
    {accumulate_into<float>, accumulate_into<bf16>},
    {accumulate_turned<float>, accumulate_turned<bf16>},
    {square_sum<float>, square_sum<bf16>},
    {row_dots<float>, row_dots<bf16>},
    {group_sums<float>, group_sums<bf16>},
};

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
