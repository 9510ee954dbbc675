// Products grouped by expert, and the ways of tokens to experts and back. Formula and meaning of the arguments:
// megapre/kernels/moe.py. Compiled once per instruction set with -DMEGAPRE_VARIANT=portable|avx2|avx512|amx.
#include "moe.h"

#include "products.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

constexpr int64_t PANEL = 32;  // columns of B that are packed together, rows of A and C that a product takes at once

// --- products -------------------------------------------------------------------------------------------------------

// Elements [first, first + count) of a row or column of C, of `size` in all, and as they are padded.
struct Range {
  int64_t first, count, padded;
  Range(int64_t first, int64_t most, int64_t size)
      : first(first), count(least(most, size - first)), padded(round_up(count, PANEL)) {}
  bool full() const { return count == padded; }
};

template <class E, class T>
struct Block {
  typedef typename E::Cell Cell;
  static constexpr bool SAME = sizeof(T) == sizeof(Cell);
  static constexpr int64_t A = PRODUCT_ROWS * PRODUCT_DEPTH, B = PRODUCT_DEPTH * PRODUCT_COLUMNS;
  static constexpr int64_t BYTES = (3 * A + B) * sizeof(Cell) + 4 * PRODUCT_ROWS * PRODUCT_COLUMNS + 1024;
  Cell *left, *right, *rows, *words;
  float* sums;

  explicit Block(void* scratch) {
    Memory memory = {(char*)scratch};
    left = memory.take<Cell>(A), right = memory.take<Cell>(B), rows = memory.take<Cell>(A), words = memory.take<Cell>(A);
    sums = memory.take<float>(PRODUCT_ROWS * PRODUCT_COLUMNS);
  }

  // Rows i of A at features l of the depth: where they lie if that will do, else a copy. Returns their distance.
  int64_t pack_left(const Operand& a, const Range& i, const Range& l, const Cell*& at) {
    const T* from = (const T*)a.at + (a.turned ? l.first * a.ld + i.first : i.first * a.ld + l.first);
    at = left;
    if (a.turned) {
      copy_rows(rows, i.padded, from, a.ld, l.count, l.padded, i.count);
      transpose_rows<E>(rows, left, words, l.padded, i.padded);
    } else if (SAME && i.full() && l.full()) {
      at = (const Cell*)from;
      return a.ld;
    } else {
      copy_rows(left, l.padded, from, a.ld, i.count, i.padded, l.count);
    }
    return l.padded;
  }

  // B by panels: words [depth / PACK, PANEL] of the columns j.
  void pack_right(const Operand& b, const Range& l, const Range& j) {
    for (int64_t c = 0; c < j.count; c += PANEL) {
      const int64_t count = least(PANEL, j.count - c);
      const T* from = (const T*)b.at + (b.turned ? (j.first + c) * b.ld + l.first : l.first * b.ld + j.first + c);
      Cell* to = right + c * l.padded;
      const Cell* whole = SAME && count == PANEL && l.full() ? (const Cell*)from : rows;
      int64_t ld = b.ld;
      if (b.turned) {
        if (whole == rows || ld % E::PACK) {
          copy_rows(rows, l.padded, from, b.ld, count, PANEL, l.count);
          whole = rows, ld = l.padded;
        }
        transpose((const uint32_t*)whole, ld / E::PACK, (uint32_t*)to, PANEL, PANEL, l.padded / E::PACK);
      } else {
        if (whole == rows) {
          copy_rows(rows, PANEL, from, b.ld, l.count, l.padded, count);
          ld = PANEL;
        }
        pair_rows(whole, ld, to, l.padded, PANEL);
      }
    }
  }

  void run(const Product& p, int64_t row, int64_t column) {
    const Range i(row, PRODUCT_ROWS, p.m), j(column, PRODUCT_COLUMNS, p.n);
    float *c = sums, *to = (float*)p.c + row * p.ldc + column;
    int64_t ldc = j.padded;
    bool add = false;
    if (p.add && i.full() && j.full()) c = to, ldc = p.ldc, add = true;  // straight into the sum
    for (int64_t depth = 0; depth < p.k; depth += PRODUCT_DEPTH) {
      const Range l(depth, PRODUCT_DEPTH, p.k);
      const Cell* a;
      const int64_t lda = pack_left(p.a, i, l, a);
      pack_right(p.b, l, j);
      for (int64_t n = 0; n < j.padded; n += PANEL) {
        const Cell* b = right + n * l.padded;
        if (add) E::template multiply<true>(c + n, ldc, a, lda, b, PANEL, i.padded, PANEL, l.padded);
        else E::template multiply<false>(c + n, ldc, a, lda, b, PANEL, i.padded, PANEL, l.padded);
      }
      add = true;
    }
    if (!p.add) {
      for (int64_t r = 0; r < i.count; r++)
        sweep(j.count, [&](int64_t n, int64_t m) INLINED {
          write((T*)p.c + (row + r) * p.ldc + column + n, read(c + r * ldc + n, m), m);
        });
    } else if (c == sums) {
      for (int64_t r = 0; r < i.count; r++)
        sweep(j.count, [&](int64_t n, int64_t m) INLINED {
          write(to + r * p.ldc + n, read(to + r * p.ldc + n, m) + read(c + r * ldc + n, m), m);
        });
    }
  }
};

template <class E, class T>
static void product(const Product& p, int64_t row, int64_t column, void* scratch) {
  Block<E, T>(scratch).run(p, row, column);
}

// --- ways of tokens -------------------------------------------------------------------------------------------------

template <class T>
static void combine(const void* y, const float* weights, const int64_t* rows, void* out, int64_t kept, int64_t choices,
                    int64_t width, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++)
    sweep(width, [&](int64_t l, int64_t n) INLINED {
      Floats sum = all(0);
      for (int64_t j = t * choices; j < (t + 1) * choices; j++) {
        if (rows[j] >= kept) continue;
        const Floats x = read((const T*)y + rows[j] * width + l, n);
        sum += weights ? x * weights[j] : x;
      }
      write((T*)out + t * width + l, sum, n);
    });
}

template <class T>
static void spread(const void* grad, const void* y, const float* weights, const int64_t* rows, void* grad_y,
                   float* grad_weights, int64_t kept, int64_t choices, int64_t width, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    const T* g = (const T*)grad + t * width;
    for (int64_t j = t * choices; j < (t + 1) * choices; j++) {
      grad_weights[j] = 0;
      if (rows[j] >= kept) continue;
      const T* x = (const T*)y + rows[j] * width;
      T* to = (T*)grad_y + rows[j] * width;
      const float weight = weights[j];
      grad_weights[j] = sum(accumulate(width, [&](int64_t l, int64_t n) INLINED {
        const Floats up = read(g + l, n);
        write(to + l, up * weight, n);
        return up * read(x + l, n);
      }));
    }
  }
}

// --- table ----------------------------------------------------------------------------------------------------------

template <class E, class T>
constexpr MoEKernels table() {
  return {Block<E, T>::BYTES, product<E, T>, E::begin, E::end, combine<T>, spread<T>};
}

#if defined(__AMX_TILE__)
const MoEKernels moe[2] = {table<Plain, float>(), table<Tiles, bf16>()};
#else
const MoEKernels moe[2] = {table<Plain, float>(), table<Plain, bf16>()};
#endif

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
