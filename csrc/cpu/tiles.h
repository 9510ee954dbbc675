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
  int64_t rows, padded, width, valid;
  const void* weight;                   // bf16 [vocabulary, width]
  const void* features;                 // x as B with k = width: [padded/32][width/2][32] words
  void* logits;                         // bf16 [vocabulary, padded]
  const int64_t* targets;               // [rows]
  // For the gradient alone.
  const void* places;                   // x as B with k = padded: [width/32][padded/2][32] words
  const float *lse, *scale;             // [padded], 0 behind the true ones
  float smoothing, share, z_loss;       // share: smoothing over the size of the vocabulary
  float* main_grad;                     // fp32 [vocabulary, width], added to
};

struct TileKernels {
  void (*begin)();
  void (*end)();
  // Panels [first, last) of x [rows, width] as B with k = width, a panel for 32 rows; scratch: 32 x width elements.
  void (*pack_features)(const void* x, int64_t stride, int64_t rows, int64_t width, void* words, int64_t first,
                        int64_t last, void* scratch);
  // Row pairs [first, last) of x [rows, width] as B with k = padded.
  void (*pack_places)(const void* x, int64_t stride, int64_t rows, int64_t padded, int64_t width, void* words,
                      int64_t first, int64_t last);
  // Vocabulary rows [begin, end): logits, and their statistics [4, padded]: max, sum of exp, target's logit, sum;
  // scratch: 33 x padded floats.
  void (*logits)(const HeadChunk& c, int64_t begin, int64_t end, float* statistics, float* scratch);
  // 32 vocabulary rows from `row` on: their gradient, added to main_grad by its product with x; the gradient as B with
  // k = the block's rows and the weight as A turned, at `place` of `block` rows; scratch: 32 x (padded + width).
  void (*gradient)(const HeadChunk& c, int64_t row, int64_t place, int64_t block, void* words, void* turned,
                   void* scratch);
  // Feature rows [begin, end) of sum [width, padded] += turned weight x gradient, over `block` vocabulary rows.
  void (*features_gradient)(const HeadChunk& c, int64_t block, const void* turned, const void* words, float* sum,
                            int64_t begin, int64_t end);
  // x [rows, width] of sum [width, padded].
  void (*store_turned)(const float* sum, int64_t padded, int64_t rows, int64_t width, void* x, int64_t stride);
  // Rows [begin, begin + 32) of main_grad [outputs, width] += dy^T x, over `rows` rows of dy (`stride` apart; words: x
  // as B with k = padded); scratch: 32 x 2 padded elements.
  void (*weight_gradient)(const void* dy, int64_t stride, int64_t rows, int64_t padded, const void* words,
                          int64_t width, float* main_grad, int64_t begin, void* scratch);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace amx { extern const TileKernels tiles; }
#endif

}  // namespace megapre
