// The attention kernels, one table per instruction set; blocks and threads are cut in ops_attention.cpp.
#pragma once
#include <stdint.h>

namespace megapre {

// Elements of x[row, batch, head, feature]; features lie together, the strides are in elements.
struct Rows {
  const void* at;
  int64_t row, batch, head;
};

// What one call asks. A key j is read by a query i when order[j] <= limit[i], their documents are equal and their
// positions (q_offset + i, k_offset + j) are less than `window` apart.
struct AttentionProblem {
  int64_t s, t, batch, heads, groups, width;
  float scale;
  bool causal;
  int64_t window, q_offset, k_offset;
  const int32_t *limit, *order;      // [batch, s], [batch, t]; null: positions, or everything without `causal`
  const int32_t *asking, *asked;     // documents [batch, s], [batch, t]; null: one
  const float* bias;                 // [heads, span], by query - key: entry margin + t - 1 + i - j; null: none
  int64_t span;
  const int64_t *sites, *samples;    // of dropout; sites null: none
  uint32_t key, step, threshold;
  float gain;
};

// Entries before and after a bias, so that whole blocks can be read and added to.
constexpr int64_t BIAS_MARGIN = 512;
constexpr int64_t PACK_BYTES = 2 * 128 * 256 * 4;  // scratch of `pack`

struct AttentionKernels {
  // Keys are packed once for each (sample, key head), in blocks; both sizes are for one of them.
  int64_t (*packed_bytes)(const AttentionProblem& p, bool backward);
  int64_t (*key_blocks)(const AttentionProblem& p, bool backward);
  void (*pack)(const AttentionProblem& p, Rows k, Rows v, bool backward, int64_t b, int64_t group, int64_t block,
               void* packed, void* scratch);
  void (*pack_numbers)(const AttentionProblem& p, bool backward, int64_t b, void* packed);
  int64_t (*query_blocks)(const AttentionProblem& p);
  int64_t (*forward_bytes)(const AttentionProblem& p);
  // Query block `block` of one head. out: type of q, or fp32 when `wide`. lse [batch, heads, s].
  void (*forward)(const AttentionProblem& p, Rows q, const void* packed, void* out, bool wide, float* lse, int64_t b,
                  int64_t head, int64_t block, void* scratch);
  int64_t (*backward_bytes)(const AttentionProblem& p);
  // One query head: dq [s, batch, heads, width], and its share of dk and dv at dk, dv with rows `stride` apart, all
  // in the type of q, or fp32 when `wide` (`wide_keys`). dbias [span] is added to.
  void (*backward)(const AttentionProblem& p, Rows q, Rows grad, const void* packed, const float* lse,
                   const float* delta, void* dq, bool wide, void* dk, void* dv, int64_t stride, bool wide_keys,
                   float* dbias, int64_t b, int64_t head, void* scratch);
  // One query a head over a range of keys [begin, end): weights relative to their largest score, for all query heads
  // of a key head. partial [heads of the group, 2 + width]: largest score, sum, weighted values.
  void (*decode)(const AttentionProblem& p, Rows q, Rows k, Rows v, int64_t b, int64_t group, int64_t begin,
                 int64_t end, float* partial, float* scores);
  void (*begin)();
  void (*end)();
};

namespace portable { extern const AttentionKernels attention[2]; }
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace avx2 { extern const AttentionKernels attention[2]; }
namespace avx512 { extern const AttentionKernels attention[2]; }
namespace amx { extern const AttentionKernels attention[2]; }
#endif

}  // namespace megapre
