// Philox4x32-10 and what is drawn from it: the definitions of megapre/random/philox.py, bit for bit.
// Compiled once per instruction set, with -ffp-contract=off: a fused multiply-add would round differently from the
// reference. Plain loops over arrays, which the compiler vectorises.
#include "kernels.h"
#include "philox.h"
#include "simd.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

constexpr int64_t BLOCK = 64;  // counters at a time; four words each

struct Block {
  uint32_t x[4][BLOCK];
};

static void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  memcpy(out, counter, 16);
  rounds(out[0], out[1], out[2], out[3], key[0], key[1]);
}

// --- normal values --------------------------------------------------------------------------------------------------

INLINE double log_series(double z) {
  double v = 1.0 / 19;
  v = v * z + 1.0 / 17, v = v * z + 1.0 / 15, v = v * z + 1.0 / 13, v = v * z + 1.0 / 11, v = v * z + 1.0 / 9;
  v = v * z + 1.0 / 7, v = v * z + 1.0 / 5, v = v * z + 1.0 / 3;
  return v * z + 1.0;
}

INLINE double sine_series(double z) {
  double v = 1.0 / 355687428096000.0;
  v = v * z + -1.0 / 1307674368000.0, v = v * z + 1.0 / 6227020800.0, v = v * z + -1.0 / 39916800.0;
  v = v * z + 1.0 / 362880.0, v = v * z + -1.0 / 5040.0, v = v * z + 1.0 / 120.0, v = v * z + -1.0 / 6.0;
  return v * z + 1.0;
}

INLINE double cosine_series(double z) {
  double v = 1.0 / 20922789888000.0;
  v = v * z + -1.0 / 87178291200.0, v = v * z + 1.0 / 479001600.0, v = v * z + -1.0 / 3628800.0;
  v = v * z + 1.0 / 40320.0, v = v * z + -1.0 / 720.0, v = v * z + 1.0 / 24.0, v = v * z + -1.0 / 2.0;
  return v * z + 1.0;
}

// sqrt(-2 ln((x + 1) / 2^32))
INLINE double radius(uint32_t x) {
  const double value = (double)x + 1.0;
  uint64_t bits;
  memcpy(&bits, &value, 8);
  const uint64_t half = (bits & 0xFFFFFFFFFFFFFull) | 0x3FE0000000000000ull;
  double m;
  memcpy(&m, &half, 8);
  const bool low = m < 0.7071067811865476;
  const double exponent = (double)((int32_t)(bits >> 52) - 1022 - (low ? 33 : 32));
  m = low ? m * 2.0 : m;
  const double s = (m - 1.0) / (m + 1.0);
  return __builtin_sqrt((exponent * 0.6931471805599453 + 2.0 * s * log_series(s * s)) * -2.0);
}

// One Box-Muller pair of each (radius word, phase word).
static void pairs(const uint32_t* __restrict__ first, const uint32_t* __restrict__ second, int64_t n,
                  float* __restrict__ even, float* __restrict__ odd) {
  for (int64_t i = 0; i < n; i++) {
    const double r = radius(first[i]);
    const uint32_t quadrant = (second[i] + 0x20000000u) >> 30;  // modulo a turn
    const int32_t d = (int32_t)(second[i] - (quadrant << 30));
    const double angle = (double)d * (3.141592653589793 / 2 / 1073741824.0), z = angle * angle;
    const double sine = angle * sine_series(z), cosine = cosine_series(z);
    const double c = (quadrant & 1) ? sine : cosine, s = (quadrant & 1) ? cosine : sine;
    even[i] = (float)(r * (((quadrant + 1) & 2) ? -c : c));
    odd[i] = (float)(r * ((quadrant & 2) ? -s : s));
  }
}

static void normal(const uint32_t words[4], int64_t start, int64_t count, float* out) {
  for (int64_t done = 0; done < count;) {
    const uint64_t block = (uint64_t)(start + done) >> 2;
    const int64_t skip = (start + done) & 3, left = count - done + skip;
    const int64_t n = left >= 4 * BLOCK ? BLOCK : (left + 3) / 4;
    const uint32_t a = words[2], b = words[3], k0 = words[0], k1 = words[1];
    Block w;
    for (int64_t i = 0; i < n; i++) {
      uint32_t c0 = (uint32_t)(block + i), c1 = (uint32_t)((block + i) >> 32), c2 = a, c3 = b;
      rounds(c0, c1, c2, c3, k0, k1);
      w.x[0][i] = c0, w.x[1][i] = c1, w.x[2][i] = c2, w.x[3][i] = c3;
    }
    float value[4][BLOCK], four[4 * BLOCK];
    pairs(w.x[0], w.x[1], n, value[0], value[1]);
    pairs(w.x[2], w.x[3], n, value[2], value[3]);
    for (int64_t i = 0; i < n; i++)
      for (int64_t lane = 0; lane < 4; lane++) four[4 * i + lane] = value[lane][i];
    const int64_t written = left < 4 * n ? left - skip : 4 * n - skip;
    memcpy(out + done, four + skip, written * sizeof(float));
    done += written;
  }
}

// --- keep mask ------------------------------------------------------------------------------------------------------

// One byte per feature for n <= 64 groups of four features, starting at `group`.
INLINE void keep_groups(uint32_t k0, uint32_t k1, uint32_t sample, uint32_t position, uint32_t group, uint32_t site,
                        uint32_t threshold, int64_t n, uint32_t* __restrict__ four) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t c0 = sample, c1 = position, c2 = group + (uint32_t)i, c3 = site;
    rounds(c0, c1, c2, c3, k0, k1);
    four[i] = (uint32_t)(c0 >= threshold) | (uint32_t)(c1 >= threshold) << 8 | (uint32_t)(c2 >= threshold) << 16 |
              (uint32_t)(c3 >= threshold) << 24;
  }
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the four lanes are packed for a little-endian machine"
#endif
}

static void keep_row(uint32_t key, uint32_t step, uint32_t site, uint32_t position, int64_t sample, int64_t first,
                     int64_t count, uint32_t threshold, uint8_t* out) {
  const uint32_t k0 = key ^ (uint32_t)((uint64_t)sample >> 32);
  for (int64_t done = 0; done < count;) {
    const int64_t skip = (first + done) & 3, left = count - done + skip;
    const int64_t n = left >= 4 * BLOCK ? BLOCK : (left + 3) / 4;
    uint32_t four[BLOCK];
    keep_groups(k0, step, (uint32_t)sample, position, (uint32_t)((first + done) >> 2), site, threshold, n, four);
    const int64_t written = left < 4 * n ? left - skip : 4 * n - skip;
    memcpy(out + done, (const uint8_t*)four + skip, written);
    done += written;
  }
}

template <class T>
static void dropout_row(uint32_t key, uint32_t step, uint32_t site, uint32_t position, int64_t sample, int64_t count,
                        uint32_t threshold, float scale, const void* x_, void* y_) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  const uint32_t k0 = key ^ (uint32_t)((uint64_t)sample >> 32);
  for (int64_t done = 0; done < count; done += 4 * BLOCK) {
    const int64_t here = count - done < 4 * BLOCK ? count - done : 4 * BLOCK;
    uint32_t four[BLOCK];
    keep_groups(k0, step, (uint32_t)sample, position, (uint32_t)(done >> 2), site, threshold, (here + 3) / 4, four);
    sweep(here, [&](int64_t i, int64_t n) INLINED {
      Bytes kept;
      memcpy(&kept, (const uint8_t*)four + i, LANES);
      Floats v = read(x + done + i, n) * scale;
      write(y + done + i, __builtin_convertvector(kept, Ints) != 0 ? v : all(0), n);
    });
  }
}

template <class T>
static void bias_dropout_residual_row(uint32_t key, uint32_t step, uint32_t site, uint32_t position, int64_t sample,
                                      int64_t count, uint32_t threshold, float scale, const void* x_,
                                      const float* bias, const void* residual_, void* y_) {
  const T *x = (const T*)x_, *residual = (const T*)residual_;
  T* y = (T*)y_;
  const uint32_t k0 = key ^ (uint32_t)((uint64_t)sample >> 32);
  for (int64_t done = 0; done < count; done += 4 * BLOCK) {
    const int64_t here = count - done < 4 * BLOCK ? count - done : 4 * BLOCK;
    uint32_t four[BLOCK];
    if (threshold)
      keep_groups(k0, step, (uint32_t)sample, position, (uint32_t)(done >> 2), site, threshold, (here + 3) / 4, four);
    else
      memset(four, 1, sizeof four);  // nothing is dropped, so nothing need be drawn
    sweep(here, [&](int64_t i, int64_t n) INLINED {
      Bytes kept;
      memcpy(&kept, (const uint8_t*)four + i, LANES);
      Floats v = read(x + done + i, n);
      if (bias) v = v + read(bias + done + i, n);
      v = __builtin_convertvector(kept, Ints) != 0 ? v * scale : all(0);
      write(y + done + i, read(residual + done + i, n) + v, n);
    });
  }
}

const Random random = {normal,
                       keep_row,
                       {dropout_row<float>, dropout_row<bf16>},
                       {bias_dropout_residual_row<float>, bias_dropout_residual_row<bf16>},
                       philox};

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
