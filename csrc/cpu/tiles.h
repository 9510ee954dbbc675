// Products on AMX tiles with fp32 sums, for the output layer's loss and for weight gradients: pieces of work that
// ops_tiles.cpp hands to threads. All sizes are multiples of 32 unless a padded count is named beside the true one.
//
// C [m, n] (+)= A [m, k] B [k, n]: A lies in rows; B in panels of 32 columns, [n/32][k/2][32] words of two neighbours
// along k, so that a panel streams through the cache while 32 rows of A stay in it.
#pragma once
#include <stdint.h>

namespace megapre {

// One chunk of rows of the output layer's input against the vocabulary. `padded`: rows, with zeros behind the true ones.
struct HeadChunk {
  int64_t rows, padded, width, valid, stride;
  const void *x, *weight;               // bf16 [rows, width], rows `stride` apart; bf16 [vocabulary, width]
  const void* features;                 // x as B with k = width: [padded/32][width/2][32] words
  void* kept;                           // bf16, as many as [vocabulary, padded]: see tiles.cpp
  const int64_t* targets;               // [rows]
  // For the gradient alone.
  const void* places;                   // x, its rows times `factor`, as B with k = padded: [width/32][padded/2][32]
  // [padded]: what the kept are times in the gradient, and the target's own slope; the scale, and it times smoothing / V.
  const float *factor, *slope, *scale, *less;
  float* main_grad;                     // fp32 [vocabulary, width], added to
};

struct TileKernels {
  void (*begin)();
  void (*end)();
  // Panels [first, last) of x [rows, width] as B with k = width, a panel for 32 rows; scratch: 32 x width elements.
  void (*pack_features)(const void* x, int64_t stride, int64_t rows, int64_t width, void* words, int64_t first,
                        int64_t last, void* scratch);
  // Rows [32 first, 32 last) of x [rows, width] as B with k = padded.
  void (*pack_places)(const void* x, int64_t stride, int64_t rows, int64_t padded, int64_t width, void* words,
                      int64_t first, int64_t last);
  // The same rows of x turned, as A with k = padded: [width/32][padded/32] blocks of 32 x 32.
  void (*pack_turned)(const void* x, int64_t stride, int64_t rows, int64_t padded, int64_t width, void* blocks,
                      int64_t first, int64_t last);
  // A block of vocabulary rows [begin, end): exponentials of its logits, without those of targets, and statistics
  // [4, padded]: base, sum of exp(logit - base), target's logit, sum of logits if asked for; scratch: padded floats and
  // 8 KiB.
  void (*logits)(const HeadChunk& c, int64_t begin, int64_t end, bool levels, float* statistics, void* scratch);
  // Vocabulary rows [begin, end) of a block of `height` that begins at `first`: kept <- kept x grown[padded] - less.
  void (*slopes)(const HeadChunk& c, int64_t first, int64_t height, const float* grown, int64_t begin, int64_t end);
  // The same rows of main_grad += their gradient; and the weight as A turned, [width/32][height/32] blocks of 32 x 32;
  // scratch: 64 x padded elements.
  void (*gradient)(const HeadChunk& c, int64_t begin, int64_t end, int64_t first, int64_t height, void* turned,
                   void* scratch);
  // Feature rows [begin, end) of sum, [width/32][padded/32] blocks of 32 x 32, += turned weight x gradient, over
  // `depth` vocabulary rows, whose words are kept.
  void (*features_gradient)(const HeadChunk& c, int64_t depth, const void* turned, const void* words, float* sum,
                            int64_t begin, int64_t end);
  // Rows [begin, end) of dx, of sum.
  void (*store_features)(const HeadChunk& c, const float* sum, void* dx, int64_t stride, int64_t begin, int64_t end);
  // Rows [begin, end) of main_grad [outputs, width] += dy^T x; turned: dy, words: x as B with k = padded.
  void (*weight_gradient)(const void* turned, int64_t padded, const void* words, int64_t width, float* main_grad,
                          int64_t begin, int64_t end);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace amx { extern const TileKernels tiles; }
#endif

}  // namespace megapre
