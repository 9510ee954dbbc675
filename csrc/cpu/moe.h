// The kernels of a mixture of experts, one table per instruction set; blocks and threads are cut in ops_moe.cpp.
#pragma once
#include <stdint.h>

namespace megapre {

// A matrix in rows `ld` elements apart; turned: what is meant is its transpose.
struct Operand {
  const void* at;
  int64_t ld;
  bool turned;
};

// C [m, n] = A [m, k] B [k, n], in the type of A and B; or C += A B with C in fp32, when `add`.
struct Product {
  Operand a, b;
  int64_t m, n, k;
  void* c;
  int64_t ldc;
  bool add;
};

constexpr int64_t PRODUCT_ROWS = 512, PRODUCT_COLUMNS = 256, PRODUCT_DEPTH = 512;

struct MoEKernels {
  int64_t product_bytes;  // scratch of a block
  // The block of C whose first element is (row, column).
  void (*product)(const Product& p, int64_t row, int64_t column, void* scratch);
  void (*begin)();
  void (*end)();
  // Rows, or tokens, [begin, end). rows [tokens, choices]: where the result of a choice is, or `kept` for none.
  // out = sum of the rows of a token's choices, each times its weight; weights null: 1.
  void (*combine)(const void* y, const float* weights, const int64_t* rows, void* out, int64_t kept, int64_t choices,
                  int64_t width, int64_t begin, int64_t end);
  // Its backward pass: the gradient of each row, and of each weight.
  void (*spread)(const void* grad, const void* y, const float* weights, const int64_t* rows, void* grad_y,
                 float* grad_weights, int64_t kept, int64_t choices, int64_t width, int64_t begin, int64_t end);
};

namespace portable { extern const MoEKernels moe[2]; }
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace avx2 { extern const MoEKernels moe[2]; }
namespace avx512 { extern const MoEKernels moe[2]; }
namespace amx { extern const MoEKernels moe[2]; }
#endif

}  // namespace megapre
