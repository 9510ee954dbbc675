// Attention without a matrix of scores (arXiv 2205.14135, 2307.08691) on the CPU: blocks of keys x queries, scores
// recomputed in the backward pass, five products there. Formula and meaning of the arguments: megapre/kernels/attention.py.
// Compiled once per instruction set with -DMEGAPRE_VARIANT=portable|avx2|avx512|amx.
#include "attention.h"

#include "attention_decode.h"
#include "attention_keys.h"
#include "attention_sight.h"

namespace megapre {
namespace MEGAPRE_VARIANT {

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
        pair_rows(rows, wide, along, Q, wide);
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
