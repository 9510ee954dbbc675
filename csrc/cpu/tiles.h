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
  void* logits;                         // bf16, as many as [vocabulary, padded], in an order of the kernels' own
  const int64_t* targets;               // [rows]
  // For the gradient alone.
  const void* places;                   // x as B with k = padded: [width/32][padded/2][32] words
  // [padded]: log2(e) lse (infinity where the scale is 0), the scale, it times (1 + 2 z lse) and times smoothing / V.
  const float *lse, *scale, *factor, *less;
  float smoothing;
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
  // Vocabulary rows [begin, end): logits, and their statistics [4, padded]: max, sum of exp, target's logit, sum;
  // scratch: 64 x width elements and 8 KiB.
  void (*logits)(const HeadChunk& c, int64_t begin, int64_t end, float* statistics, void* scratch);
  // Vocabulary rows [begin, end) of a block that begins at `first`: their gradient, added to main_grad by its product
  // with x; the gradient as B with k = the block's rows, [padded/32][block/2][32] words, and the weight as A turned,
  // [width/32][block/32] blocks of 32 x 32; scratch: 64 x padded elements and 1,216 bytes.
  void (*gradient)(const HeadChunk& c, int64_t begin, int64_t end, int64_t first, int64_t block, void* words,
                   void* turned, void* scratch);
  // Feature rows [begin, end) of sum, [width/32][padded/32] blocks of 32 x 32, += turned weight x gradient, over
  // `block` vocabulary rows.
  void (*features_gradient)(const HeadChunk& c, int64_t block, const void* turned, const void* words, float* sum,
                            int64_t begin, int64_t end);
  // x [rows, width] of sum.
  void (*store_turned)(const float* sum, int64_t padded, int64_t rows, int64_t width, void* x, int64_t stride);
  // Rows [begin, end) of main_grad [outputs, width] += dy^T x; turned: dy, words: x as B with k = padded.
  void (*weight_gradient)(const void* turned, int64_t padded, const void* words, int64_t width, float* main_grad,
                          int64_t begin, int64_t end);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace amx { extern const TileKernels tiles; }
#endif

}  // namespace megapre
