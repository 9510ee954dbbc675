// Keys and values of one (sample, key head), packed once for all of its queries.
#pragma once
#include "attention.h"
#include "products.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

constexpr int64_t STRIP = 32;  // keys that a mask is judged for at once
constexpr int32_t NOBODY = INT32_MIN, EVERYTHING = INT32_MAX;

// Order and document of a range of keys or queries.
struct Span {
  int32_t first, last, from, to;  // of the limits or orders, of the documents
};

static Span span_of(const int32_t* order, const int32_t* document, int64_t n) {
  Span s = {order[0], order[0], document[0], document[0]};
  for (int64_t i = 1; i < n; i++) {
    s.first = order[i] < s.first ? order[i] : s.first;
    s.last = order[i] > s.last ? order[i] : s.last;
    s.from = document[i] < s.from ? document[i] : s.from;
    s.to = document[i] > s.to ? document[i] : s.to;
  }
  return s;
}

// What is kept of the keys of one (sample, key head): by blocks of KEYS, K in rows and then V transposed (forward), or
// K transposed and V in rows (backward); orders and documents of the keys; the span of each strip.
template <class E, bool BACKWARD>
struct Packed {
  typedef typename E::Cell Cell;
  static constexpr int64_t KEYS = BACKWARD ? E::BACKWARD_KEYS : E::FORWARD_KEYS, FORMS = BACKWARD ? 3 : 2;
  int64_t wide, blocks;
  Cell* cells;
  int32_t *order, *document;
  Span* spans;

  Packed(const AttentionProblem& p, void* memory) {
    wide = round_up(p.width, 32), blocks = (p.t + KEYS - 1) / KEYS;
    cells = (Cell*)memory;
    order = (int32_t*)(cells + blocks * FORMS * KEYS * wide);
    document = order + blocks * KEYS;
    spans = (Span*)(document + blocks * KEYS);
  }
  static int64_t bytes(const AttentionProblem& p) {
    const Packed x(p, nullptr);
    return round_up((char*)(x.spans + x.blocks * KEYS / STRIP) - (char*)nullptr, 64);
  }
  Cell* form(int64_t block, int64_t which) const { return cells + (block * FORMS + which) * KEYS * wide; }
};

template <class E, class T, bool BACKWARD>
static void pack_block(const AttentionProblem& p, Rows k, Rows v, int64_t b, int64_t group, int64_t block, void* memory,
                       void* scratch) {
  typedef typename E::Cell Cell;
  const Packed<E, BACKWARD> to(p, memory);
  constexpr int64_t KEYS = Packed<E, BACKWARD>::KEYS;
  const int64_t first = block * KEYS, count = least(KEYS, p.t - first), wide = to.wide;
  const T* keys = (const T*)k.at + b * k.batch + group * k.head + first * k.row;
  const T* values = (const T*)v.at + b * v.batch + group * v.head + first * v.row;
  Cell *words = (Cell*)scratch, *rows = words + KEYS * wide;
  copy_rows(to.form(block, 0), wide, keys, k.row, count, KEYS, p.width);
  if (BACKWARD) {
    transpose_rows<E>(to.form(block, 0), to.form(block, 1), words, KEYS, wide);
    copy_rows(to.form(block, 2), wide, values, v.row, count, KEYS, p.width);
  } else {
    copy_rows(rows, wide, values, v.row, count, KEYS, p.width);
    transpose_rows<E>(rows, to.form(block, 1), words, KEYS, wide);
  }
}

template <class E, class T>
static void pack(const AttentionProblem& p, Rows k, Rows v, bool backward, int64_t b, int64_t group, int64_t block,
                 void* memory, void* scratch) {
  if (backward) pack_block<E, T, true>(p, k, v, b, group, block, memory, scratch);
  else pack_block<E, T, false>(p, k, v, b, group, block, memory, scratch);
}

template <class E, bool BACKWARD>
static void numbers_of_keys(const AttentionProblem& p, int64_t b, void* memory) {
  const Packed<E, BACKWARD> to(p, memory);
  for (int64_t j = 0; j < to.blocks * to.KEYS; j++) {
    const bool real = j < p.t;
    to.order[j] = !real ? EVERYTHING : p.order ? p.order[b * p.t + j] : p.causal ? (int32_t)(p.k_offset + j) : 0;
    to.document[j] = !real ? NOBODY : p.asked ? p.asked[b * p.t + j] : 0;  // nobody's document: read by no query
  }
  for (int64_t j = 0; j < to.blocks * to.KEYS; j += STRIP) to.spans[j / STRIP] = span_of(to.order + j, to.document + j, STRIP);
}

template <class E>
static void pack_numbers(const AttentionProblem& p, bool backward, int64_t b, void* memory) {
  if (backward) numbers_of_keys<E, true>(p, b, memory);
  else numbers_of_keys<E, false>(p, b, memory);
}

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
