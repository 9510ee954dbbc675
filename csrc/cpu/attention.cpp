// Attention without a matrix of scores (arXiv 2205.14135, 2307.08691) on the CPU: blocks of keys x queries, scores
// recomputed in the backward pass, five products there. Formula and meaning of the arguments: megapre/kernels/attention.py.
// Compiled once per instruction set with -DMEGAPRE_VARIANT=portable|avx2|avx512|amx.
#include "attention.h"

#include "attention_engine.h"
#include "philox.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

constexpr int64_t STRIP = 32;  // keys that a mask is judged for at once
constexpr int32_t NOBODY = INT32_MIN, EVERYTHING = INT32_MAX;

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

// --- packed keys ----------------------------------------------------------------------------------------------------

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

// x [rows, wide] to its transpose as rows of A, [wide, rows]; `words` is scratch of the same size.
template <class E>
static void transpose_rows(const typename E::Cell* x, typename E::Cell* out, typename E::Cell* words, int64_t rows,
                           int64_t wide) {
  pair_rows(x, words, rows, wide);
  transpose((const uint32_t*)words, wide, (uint32_t*)out, rows / E::PACK, rows / E::PACK, wide);
}

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

// --- queries and what they see --------------------------------------------------------------------------------------

template <int64_t QUERIES>
struct Queries {
  int32_t limit[QUERIES], document[QUERIES];
  int64_t first, count, position;
  Span span;

  // Queries after the last one see what the last one sees; what comes of them is not stored.
  void set(const AttentionProblem& p, int64_t b, int64_t block) {
    first = block * QUERIES, count = least(QUERIES, p.s - first), position = p.q_offset + first;
    for (int64_t i = 0; i < QUERIES; i++) {
      const int64_t at = first + least(i, count - 1);
      limit[i] = p.limit ? p.limit[b * p.s + at] : p.causal ? (int32_t)(p.q_offset + at) : EVERYTHING - 1;
      document[i] = p.asking ? p.asking[b * p.s + at] : 0;
    }
    span = span_of(limit, document, QUERIES);
  }
};

enum Sight { NOTHING, SOME, WHOLE };

template <int64_t QUERIES>
static Sight sight(const AttentionProblem& p, const Queries<QUERIES>& q, const Span& k, int64_t key) {
  if (k.first > q.span.last || k.from > q.span.to || k.to < q.span.from) return NOTHING;
  const int64_t start = p.k_offset + key, stop = start + STRIP - 1, last = q.position + q.count - 1;
  if (p.window && (q.position - stop >= p.window || start - last >= p.window)) return NOTHING;
  const bool one = k.from == k.to && q.span.from == q.span.to && k.from == q.span.from;
  const bool near = !p.window || (last - start < p.window && stop - q.position < p.window);
  return one && near && k.last <= q.span.first ? WHOLE : SOME;
}

// Scores of a strip that the queries may not read become -infinity.
template <int64_t QUERIES>
static void hide(const AttentionProblem& p, const Queries<QUERIES>& q, const int32_t* order, const int32_t* document,
                 int64_t key, float* scores) {
  const Floats hidden = all(-__builtin_inff());
  const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints lane;
  memcpy(&lane, numbers, sizeof lane);
  for (int64_t c = 0; c < QUERIES; c += LANES) {
    Ints limit, asking;
    memcpy(&limit, q.limit + c, sizeof limit);
    memcpy(&asking, q.document + c, sizeof asking);
    for (int64_t j = 0; j < STRIP; j++) {
      Ints seen = (limit >= order[j]) & (asking == document[j]);
      if (p.window) {
        const Ints apart = lane + (int32_t)(q.position + c - p.k_offset - key - j);
        seen &= (apart < (int32_t)p.window) & (apart > (int32_t)-p.window);
      }
      float* at = scores + j * QUERIES + c;
      store(at, seen ? load(at) : hidden);
    }
  }
}

// The bias of a strip, in units of raw scores.
template <int64_t QUERIES>
static void add_bias(const float* bias, float over_scale, float* scores) {
  for (int64_t j = 0; j < STRIP; j++)
    for (int64_t c = 0; c < QUERIES; c += LANES) {
      float* at = scores + j * QUERIES + c;
      store(at, load(at) + load(bias - j + c) * over_scale);
    }
}

// Factors of dropout, 0 or gain, for one key at a time in rising order.
template <int64_t QUERIES>
struct Dropout {
  alignas(64) uint32_t word[4][QUERIES];
  uint32_t k0, k1, sample, site, threshold;
  int64_t group, position, k_offset;
  float gain;

  Dropout(const AttentionProblem& p, int64_t b, int64_t head) {
    const uint64_t number = (uint64_t)p.samples[b];
    k0 = p.key ^ (uint32_t)(number >> 32), k1 = p.step, sample = (uint32_t)number, site = (uint32_t)p.sites[head];
    threshold = p.threshold, gain = p.gain, k_offset = p.k_offset, group = -1;
  }
  void start(int64_t at) { position = at, group = -1; }
  const uint32_t* words(int64_t key) {
    const int64_t place = k_offset + key;
    if (place >> 2 != group) {
      group = place >> 2;
      for (int64_t i = 0; i < QUERIES; i++) {
        uint32_t c0 = sample, c1 = (uint32_t)(position + i), c2 = (uint32_t)group, c3 = site;
        rounds(c0, c1, c2, c3, k0, k1);
        word[0][i] = c0, word[1][i] = c1, word[2][i] = c2, word[3][i] = c3;
      }
    }
    return word[place & 3];
  }
  INLINE Floats factor(const uint32_t* at, uint32_t threshold, float gain) {
    Words w;
    memcpy(&w, at, sizeof w);
    return w >= threshold ? all(gain) : all(0);
  }
};

struct Memory {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* found = (T*)at;
    at += round_up(count * sizeof(T), 64);
    return found;
  }
};

// --- forward --------------------------------------------------------------------------------------------------------

template <class E>
static int64_t forward_bytes(const AttentionProblem& p) {
  constexpr int64_t Q = E::FORWARD_QUERIES, K = E::FORWARD_KEYS;
  const int64_t wide = round_up(p.width, 32);
  return 4 * (K * Q + 2 * Q * wide) + sizeof(typename E::Cell) * (K * Q + 2 * Q * wide) + 4096;
}

// Rows [count, width] of a transposed block, each times its factor.
template <class T, int64_t QUERIES>
static void store_rows(const float* x, float* rows, int64_t wide, const float* factor, T* out, int64_t stride,
                       int64_t count, int64_t width) {
  transpose((const uint32_t*)x, QUERIES, (uint32_t*)rows, wide, wide, QUERIES);
  for (int64_t i = 0; i < count; i++)
    sweep(width, [&](int64_t l, int64_t n) INLINED {
      write(out + i * stride + l, read(rows + i * wide + l, n) * factor[i], n);
    });
}

template <class E, class T>
static void forward(const AttentionProblem& p, Rows q, const void* packed, void* out, bool to_fp32, float* lse,
                    int64_t b, int64_t head, int64_t block, void* scratch) {
  typedef typename E::Cell Cell;
  constexpr int64_t Q = E::FORWARD_QUERIES, K = E::FORWARD_KEYS, VECTORS = 64 / LANES;
  static_assert(Q % 64 == 0 && K % STRIP == 0, "a pass takes 64 queries");
  const Packed<E, false> keys(p, (void*)packed);
  const int64_t wide = keys.wide;
  Memory memory = {(char*)scratch};
  float *scores = memory.take<float>(K * Q), *sums = memory.take<float>(Q * wide), *turned = memory.take<float>(Q * wide);
  Cell *weights = memory.take<Cell>(K * Q), *rows = memory.take<Cell>(Q * wide), *queries = memory.take<Cell>(Q * wide);
  Queries<Q> at;
  at.set(p, b, block);
  copy_rows(rows, wide, (const T*)q.at + b * q.batch + head * q.head + at.first * q.row, q.row, at.count, Q, p.width);
  transpose((const uint32_t*)rows, wide / E::PACK, (uint32_t*)queries, Q, Q, wide / E::PACK);
  memset(sums, 0, sizeof(float) * Q * wide);
  alignas(64) float top[Q], total[Q], shift[Q];
  for (int64_t i = 0; i < Q; i++) top[i] = -__builtin_inff(), total[i] = 0;
  const float slope = p.scale * E::BASE;
  const float* bias = p.bias ? p.bias + head * p.span + BIAS_MARGIN + p.t - 1 + at.first : nullptr;
  alignas(64) char space[sizeof(Dropout<Q>)];
  Dropout<Q>* dropout = nullptr;
  if (p.sites) {
    dropout = (Dropout<Q>*)space;
    *dropout = Dropout<Q>(p, b, head);
    dropout->start(at.position);
  }
  for (int64_t kb = 0; kb < keys.blocks; kb++) {
    Sight seen[K / STRIP];
    int64_t first = K, last = 0;
    for (int64_t j = 0; j < K; j += STRIP) {
      seen[j / STRIP] = sight(p, at, keys.spans[(kb * K + j) / STRIP], kb * K + j);
      if (seen[j / STRIP] != NOTHING) first = least(first, j), last = j + STRIP;
    }
    if (first >= last) continue;
    const int64_t n = last - first;
    E::template multiply<false>(scores, Q, keys.form(kb, 0) + first * wide, wide, queries, Q, n, Q, wide);
    for (int64_t j = first; j < last; j += STRIP) {
      float* strip = scores + (j - first) * Q;
      const int64_t key = kb * K + j;
      if (bias) add_bias<Q>(bias - key, 1.0f / p.scale, strip);
      if (seen[j / STRIP] != WHOLE) hide(p, at, keys.order + key, keys.document + key, key, strip);
    }
    bool rescale = false;
    for (int64_t c = 0; c < Q; c += 64) {  // the largest score of each query so far
      Floats most[VECTORS];
#pragma GCC unroll 16
      for (int u = 0; u < VECTORS; u++) most[u] = load(top + c + u * LANES);
      for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 16
        for (int u = 0; u < VECTORS; u++) most[u] = larger(load(scores + j * Q + c + u * LANES), most[u]);
      for (int u = 0; u < VECTORS; u++) {
        const Floats before = load(top + c + u * LANES);
        const Floats base = most[u] == all(-__builtin_inff()) ? all(0) : most[u] * slope;
        const Floats factor = E::power(before * slope - base);
        store(shift + c + u * LANES, base);
        store(top + c + u * LANES, most[u]);
        store(total + c + u * LANES, load(total + c + u * LANES) * factor);
        store(turned + c + u * LANES, factor);
      }
    }
    for (int64_t i = 0; i < Q; i++) rescale |= turned[i] != 1.0f;
    if (rescale)
      for (int64_t l = 0; l < wide; l++)
        for (int64_t c = 0; c < Q; c += LANES) store(sums + l * Q + c, load(sums + l * Q + c) * load(turned + c));
    for (int64_t c = 0; c < Q; c += LANES) {
      const Floats base = load(shift + c);
      Floats sum = all(0);
      if (!dropout) {
        for (int64_t j = 0; j < n; j += 2) {
          const Floats x = E::power(load(scores + j * Q + c) * slope - base);
          const Floats y = E::power(load(scores + (j + 1) * Q + c) * slope - base);
          sum += x + y;
          E::store_pair(weights + j * Q + c * E::PACK, Q, x, y);
        }
        store(total + c, load(total + c) + sum);
      }
    }
    if (dropout) {
      for (int64_t j = 0; j < n; j += 2)
        for (int64_t half = 0; half < 2; half++) {
          const uint32_t* word = dropout->words(kb * K + first + j + half);
          for (int64_t c = 0; c < Q; c += LANES) {
            float* from = scores + (j + half) * Q + c;
            const Floats x = E::power(load(from) * slope - load(shift + c));
            store(total + c, load(total + c) + x);
            store(from, x * dropout->factor(word + c, dropout->threshold, dropout->gain));
          }
          if (half)
            for (int64_t c = 0; c < Q; c += LANES)
              E::store_pair(weights + j * Q + c * E::PACK, Q, load(scores + j * Q + c), load(scores + (j + 1) * Q + c));
        }
    }
    E::template multiply<true>(sums, Q, keys.form(kb, 1) + first, K, weights, Q, wide, Q, n);
  }
  float* to_lse = lse + (b * p.heads + head) * p.s + at.first;
  for (int64_t i = 0; i < Q; i++) {
    shift[i] = total[i] == 0 ? 0 : 1.0f / total[i];
    if (i < at.count) to_lse[i] = total[i] == 0 ? -__builtin_inff() : top[i] * p.scale + __builtin_logf(total[i]);
  }
  const int64_t stride = p.batch * p.heads * p.width, start = (at.first * p.batch + b) * p.heads * p.width + head * p.width;
  if (to_fp32) store_rows<float, Q>(sums, turned, wide, shift, (float*)out + start, stride, at.count, p.width);
  else store_rows<T, Q>(sums, turned, wide, shift, (T*)out + start, stride, at.count, p.width);
}

// --- backward -------------------------------------------------------------------------------------------------------

template <class E>
static int64_t backward_bytes(const AttentionProblem& p) {
  constexpr int64_t Q = E::BACKWARD_QUERIES, K = E::BACKWARD_KEYS;
  const int64_t wide = round_up(p.width, 32), rows = round_up(p.s, Q);
  return sizeof(typename E::Cell) * (4 * rows * wide + Q * wide + 3 * K * Q) +
         4 * (rows * wide + 2 * rows + 2 * STRIP * Q + 2 * K * wide + Q * wide + Q) + sizeof(Queries<Q>) * (rows / Q) + 4096;
}

template <class E, class T>
struct Backward {
  typedef typename E::Cell Cell;
  static constexpr int64_t Q = E::BACKWARD_QUERIES, K = E::BACKWARD_KEYS;
  const AttentionProblem& p;
  const Packed<E, true> keys;
  int64_t wide, blocks, b, head;
  Cell *q_down, *q_along, *grad_down, *grad_along, *rows, *weights, *slopes, *slope_words;
  float *dq, *shift, *delta, *scores, *inner, *dk, *dv, *turned, *ones;
  Queries<Q>* queries;

  Backward(const AttentionProblem& p, const void* packed, int64_t b, int64_t head, void* scratch)
      : p(p), keys(p, (void*)packed), b(b), head(head) {
    Memory memory = {(char*)scratch};
    wide = keys.wide, blocks = (p.s + Q - 1) / Q;
    const int64_t size = blocks * Q * wide;
    q_down = memory.take<Cell>(size), q_along = memory.take<Cell>(size);
    grad_down = memory.take<Cell>(size), grad_along = memory.take<Cell>(size), rows = memory.take<Cell>(Q * wide);
    weights = memory.take<Cell>(K * Q), slopes = memory.take<Cell>(K * Q), slope_words = memory.take<Cell>(K * Q);
    dq = memory.take<float>(size), shift = memory.take<float>(blocks * Q), delta = memory.take<float>(blocks * Q);
    scores = memory.take<float>(STRIP * Q), inner = memory.take<float>(STRIP * Q);
    dk = memory.take<float>(K * wide), dv = memory.take<float>(K * wide);
    turned = memory.take<float>(Q * wide), ones = memory.take<float>(Q);
    queries = memory.take<Queries<Q>>(blocks);
  }

  // Queries and gradients of the head, once with features and once with queries along k.
  void load_rows(Rows q, Rows grad, const float* lse, const float* of_out) {
    memset(dq, 0, sizeof(float) * blocks * Q * wide);
    for (int64_t block = 0; block < blocks; block++) {
      Queries<Q>& at = queries[block];
      at.set(p, b, block);
      for (int which = 0; which < 2; which++) {
        const Rows& x = which ? grad : q;
        copy_rows(rows, wide, (const T*)x.at + b * x.batch + head * x.head + at.first * x.row, x.row, at.count, Q, p.width);
        Cell *down = (which ? grad_down : q_down) + block * Q * wide, *along = (which ? grad_along : q_along) + block * Q * wide;
        transpose((const uint32_t*)rows, wide / E::PACK, (uint32_t*)down, Q, Q, wide / E::PACK);
        pair_rows(rows, along, Q, wide);
      }
      for (int64_t i = 0; i < Q; i++) {
        const int64_t at_row = (b * p.heads + head) * p.s + at.first + i, to = block * Q + i;
        const bool reads = i < at.count && lse[at_row] > -__builtin_inff();
        shift[to] = reads ? lse[at_row] * E::BASE : __builtin_inff();  // weights of the others are 0
        delta[to] = reads ? of_out[at_row] : 0;
      }
    }
  }

  // Weights and gradients of scores of one strip, at row j of the block.
  void differentiate(const Queries<Q>& at, int64_t block, int64_t kb, int64_t j, Sight seen, Dropout<Q>* dropout, float* dbias) {
    const int64_t key = kb * K + j;
    E::template multiply<false>(scores, Q, keys.form(kb, 0) + j * wide, wide, q_down + block * Q * wide, Q, STRIP, Q, wide);
    E::template multiply<false>(inner, Q, keys.form(kb, 2) + j * wide, wide, grad_down + block * Q * wide, Q, STRIP, Q, wide);
    const int64_t diagonal = BIAS_MARGIN + p.t - 1 + at.first - key;
    if (p.bias) add_bias<Q>(p.bias + head * p.span + diagonal, 1.0f / p.scale, scores);
    if (seen != WHOLE) hide(p, at, keys.order + key, keys.document + key, key, scores);
    const float slope = p.scale * E::BASE;
    if (dropout) drop(*dropout, key, block);
    Cell *to_w = weights + j * Q, *to_s = slopes + j * Q, *words = slope_words + j * Q;
    for (int64_t c = 0; c < Q; c += LANES) {
      const Floats base = load(shift + block * Q + c), less = load(delta + block * Q + c);
      for (int64_t r = 0; r < STRIP; r += 2) {
        const float *s = scores + r * Q + c, *d = inner + r * Q + c;
        Floats x = load(s), y = load(s + Q);
        if (!dropout) {
          x = E::power(x * slope - base), y = E::power(y * slope - base);
          E::store_rows(to_w + r * Q + c, Q, x, y);
        }
        x = x * (load(d) - less), y = y * (load(d + Q) - less);
        E::store_rows(to_s + r * Q + c, Q, x, y);
        if (E::TWO_FORMS) E::store_pair(words + r * Q + c * E::PACK, Q, x, y);
        if (dbias) {
          float* to = dbias + diagonal - r + c;
          store(to, load(to) + x);
          store(to - 1, load(to - 1) + y);
        }
      }
    }
  }

  // With dropout: weights as they leave it, scores turned into weights, and the gradient that comes back through it.
  void drop(Dropout<Q>& dropout, int64_t key, int64_t block) {
    const float slope = p.scale * E::BASE;
    Cell* to_w = weights + key % K * Q;
    for (int64_t r = 0; r < STRIP; r += 2) {
      alignas(64) float kept[2][Q];
      for (int half = 0; half < 2; half++) {
        const uint32_t* word = dropout.words(key + r + half);
        for (int64_t c = 0; c < Q; c += LANES) {
          const Floats f = dropout.factor(word + c, dropout.threshold, dropout.gain);
          float *s = scores + (r + half) * Q + c, *d = inner + (r + half) * Q + c;
          const Floats x = E::power(load(s) * slope - load(shift + block * Q + c));
          store(s, x);
          store(d, load(d) * f);
          store(kept[half] + c, x * f);
        }
      }
      for (int64_t c = 0; c < Q; c += LANES) E::store_rows(to_w + r * Q + c, Q, load(kept[0] + c), load(kept[1] + c));
    }
  }

  void key_block(int64_t kb, float* dbias) {
    memset(dk, 0, sizeof(float) * K * wide);
    memset(dv, 0, sizeof(float) * K * wide);
    alignas(64) char space[sizeof(Dropout<Q>)];
    Dropout<Q>* dropout = nullptr;
    if (p.sites) {
      dropout = (Dropout<Q>*)space;
      *dropout = Dropout<Q>(p, b, head);
    }
    for (int64_t block = 0; block < blocks; block++) {
      const Queries<Q>& at = queries[block];
      if (dropout) dropout->start(at.position);
      Sight seen[K / STRIP];
      int64_t first = K, last = 0;
      for (int64_t j = 0; j < K; j += STRIP) {
        seen[j / STRIP] = sight(p, at, keys.spans[(kb * K + j) / STRIP], kb * K + j);
        if (seen[j / STRIP] != NOTHING) first = least(first, j), last = j + STRIP;
      }
      if (first >= last) continue;
      for (int64_t j = first; j < last; j += STRIP)
        differentiate(at, block, kb, j, seen[j / STRIP], dropout, dbias);
      const int64_t n = last - first;
      const Cell* words = E::TWO_FORMS ? slope_words : slopes;
      E::template multiply<true>(dv + first * wide, wide, weights + first * Q, Q, grad_along + block * Q * wide, wide, n, wide, Q);
      E::template multiply<true>(dk + first * wide, wide, slopes + first * Q, Q, q_along + block * Q * wide, wide, n, wide, Q);
      E::template multiply<true>(dq + block * Q * wide, Q, keys.form(kb, 1) + first, K, words + first * Q, Q, wide, Q, n);
    }
  }
};

template <class Out>
static void store_block(const float* x, int64_t wide, float factor, Out* out, int64_t stride, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; i++)
    sweep(width, [&](int64_t l, int64_t n) INLINED { write(out + i * stride + l, read(x + i * wide + l, n) * factor, n); });
}

template <class E, class T>
static void backward(const AttentionProblem& p, Rows q, Rows grad, const void* packed, const float* lse,
                     const float* delta, void* dq, bool to_fp32, void* dk, void* dv, int64_t stride, bool wide_keys,
                     float* dbias, int64_t b, int64_t head, void* scratch) {
  Backward<E, T> work(p, packed, b, head, scratch);
  constexpr int64_t Q = E::BACKWARD_QUERIES, K = E::BACKWARD_KEYS;
  work.load_rows(q, grad, lse, delta);
  for (int64_t kb = 0; kb < work.keys.blocks; kb++) {
    work.key_block(kb, dbias);
    const int64_t first = kb * K, count = least(K, p.t - first);
    for (int which = 0; which < 2; which++) {
      const float *from = which ? work.dv : work.dk, factor = which ? 1.0f : p.scale;
      void* to = which ? dv : dk;
      if (wide_keys) store_block(from, work.wide, factor, (float*)to + first * stride, stride, count, p.width);
      else store_block(from, work.wide, factor, (T*)to + first * stride, stride, count, p.width);
    }
  }
  for (int64_t i = 0; i < Q; i++) work.ones[i] = p.scale;
  const int64_t row = p.batch * p.heads * p.width;
  for (int64_t block = 0; block < work.blocks; block++) {
    const Queries<Q>& at = work.queries[block];
    const int64_t start = (at.first * p.batch + b) * p.heads * p.width + head * p.width;
    const float* from = work.dq + block * Q * work.wide;
    if (to_fp32) store_rows<float, Q>(from, work.turned, work.wide, work.ones, (float*)dq + start, row, at.count, p.width);
    else store_rows<T, Q>(from, work.turned, work.wide, work.ones, (T*)dq + start, row, at.count, p.width);
  }
}

// --- decoding -------------------------------------------------------------------------------------------------------

// Sums of 16 vectors, one a lane of the result; `sums` holds 16 x LANES.
INLINE void sum_each(const float* sums, float* out) {
#if defined(__AVX512F__)
  alignas(64) float turned[256];
  transpose((const uint32_t*)sums, 16, (uint32_t*)turned, 16, 16, 16);
  Floats total = load(turned);
  for (int i = 1; i < 16; i++) total += load(turned + 16 * i);
  store(out, total);
#else
  for (int i = 0; i < 16; i++) out[i] = sum(load(sums + i * LANES));
#endif
}

// Reads keys and values once, in place, for all query heads of a key head; bound by memory.
template <class T>
static void decode(const AttentionProblem& p, Rows q, Rows k, Rows v, int64_t b, int64_t group, int64_t begin,
                   int64_t end, float* partial, float* scratch) {
  const int64_t each = p.heads / p.groups, wide = round_up(p.width, LANES), count = end - begin;
  float *queries = scratch, *weights = queries + each * wide;
  for (int64_t h = 0; h < each; h++)
    copy_rows(queries + h * wide, wide, (const T*)q.at + b * q.batch + (group * each + h) * q.head, 0, 1, 1, p.width);
  const T *keys = (const T*)k.at + b * k.batch + group * k.head, *values = (const T*)v.at + b * v.batch + group * v.head;
  const int64_t padded = round_up(count, 16), whole = p.width / LANES * LANES;
  for (int64_t j = 0; j < count; j += 16)
    for (int64_t h = 0; h < each; h++) {
      alignas(64) float sums[16 * LANES];
      for (int64_t i = 0; i < 16; i++) {
        const T* row = keys + (begin + least(j + i, count - 1)) * k.row;
        Floats total = all(0);
        for (int64_t l = 0; l < whole; l += LANES) total += load(queries + h * wide + l) * load(row + l);
        if (whole < p.width) total += load(queries + h * wide + whole) * read(row + whole, p.width - whole);
        store(sums + i * LANES, total);
      }
      sum_each(sums, weights + h * padded + j);
    }
  const int32_t limit = p.limit ? p.limit[b] : p.causal ? (int32_t)p.q_offset : EVERYTHING;
  const int32_t document = p.asking ? p.asking[b] : 0;
  for (int64_t h = 0; h < each; h++) {
    float *w = weights + h * padded, *out = partial + h * (2 + p.width), top = -__builtin_inff(), total = 0;
    const float* bias = p.bias ? p.bias + (group * each + h) * p.span + BIAS_MARGIN + p.t - 1 : nullptr;
    for (int64_t j = 0; j < count; j++) {
      const int64_t key = begin + j, apart = p.q_offset - p.k_offset - key;
      const int32_t order = p.order ? p.order[b * p.t + key] : p.causal ? (int32_t)(p.k_offset + key) : 0;
      const bool seen = order <= limit && (!p.asked || p.asked[b * p.t + key] == document) &&
                        (!p.window || (apart < p.window && -apart < p.window));
      w[j] = seen ? w[j] * p.scale + (bias ? bias[-key] : 0.0f) : -__builtin_inff();
      top = w[j] > top || w[j] != w[j] ? w[j] : top;
    }
    const float base = top == -__builtin_inff() ? 0.0f : top;
    Floats sums = all(0);
    sweep(count, [&](int64_t j, int64_t n) INLINED {
      const Floats x = exponential(read(w + j, n, -__builtin_inff()) - base);
      write(w + j, x, n);
      sums += x;
    });
    total = sum(sums);
    out[0] = top, out[1] = total;
    for (int64_t l = 0; l < p.width; l += LANES) {
      const int64_t n = least(LANES, p.width - l);
      Floats x = all(0), y = all(0);
      int64_t j = 0;
      for (; j + 2 <= count; j += 2) {
        x += w[j] * read(values + (begin + j) * v.row + l, n);
        y += w[j + 1] * read(values + (begin + j + 1) * v.row + l, n);
      }
      if (j < count) x += w[j] * read(values + (begin + j) * v.row + l, n);
      write(out + 2 + l, x + y, n);
    }
  }
}

// --- table ----------------------------------------------------------------------------------------------------------

template <class E>
static int64_t packed_bytes(const AttentionProblem& p, bool backward) {
  return backward ? Packed<E, true>::bytes(p) : Packed<E, false>::bytes(p);
}
template <class E, bool BACKWARD>
static int64_t key_blocks(const AttentionProblem& p) {
  return (p.t + Packed<E, BACKWARD>::KEYS - 1) / Packed<E, BACKWARD>::KEYS;
}
template <class E>
static int64_t key_blocks_of(const AttentionProblem& p, bool backward) {
  return backward ? key_blocks<E, true>(p) : key_blocks<E, false>(p);
}
template <class E>
static int64_t query_blocks(const AttentionProblem& p) {
  return (p.s + E::FORWARD_QUERIES - 1) / E::FORWARD_QUERIES;
}

template <class E, class T>
constexpr AttentionKernels table() {
  return {packed_bytes<E>, key_blocks_of<E>, pack<E, T>, pack_numbers<E>, query_blocks<E>, forward_bytes<E>, forward<E, T>,
          backward_bytes<E>, backward<E, T>, decode<T>, E::begin, E::end};
}

#if defined(__AMX_TILE__)
const AttentionKernels attention[2] = {table<Plain, float>(), table<Tiles, bf16>()};
#else
const AttentionKernels attention[2] = {table<Plain, float>(), table<Plain, bf16>()};
#endif

}  // namespace MEGAPRE_VARIANT
}  // namespace megapre
