// The output layer's loss and weight gradients on AMX tiles as torch.ops.megapre.*: checks, memory and threads; the
// arithmetic is in tiles.cpp. Work is cut by the shape alone and every sum has one owner, so results do not depend on
// the threads.
#include <ATen/ops/eq.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "ops.h"
#include "tiles.h"

namespace megapre {
namespace {

constexpr int64_t SIDE = 32, BLOCK = 512;  // vocabulary rows whose gradient is in the cache at a time

// Called where has_tiles() alone.
const TileKernels* chosen() {
#ifdef MEGAPRE_X86
  return &amx::tiles;
#else
  return nullptr;
#endif
}

int64_t round_up(int64_t n) { return (n + SIDE - 1) / SIDE * SIDE; }

bool is_bf16_rows(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && x.dim() == 2 && x.stride(1) == 1 && x.size(1) % SIDE == 0;
}

Tensor memory(const Tensor& like, int64_t bytes) { return at::empty({bytes}, like.options().dtype(at::kByte)); }

// Tasks [0, count) in ranges, with tiles configured and scratch of a thread's own.
template <class F>
void ranges(const Tensor& like, int64_t count, int64_t scratch, F f) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const Tensor own = memory(like, scratch);
    chosen()->begin();
    f(begin, end, own.mutable_data_ptr());
    chosen()->end();
  });
}

template <class F>
void parallel(const Tensor& like, int64_t count, int64_t scratch, F f) {
  ranges(like, count, scratch, [&](int64_t begin, int64_t end, void* own) {
    for (int64_t task = begin; task < end; task++) f(task, own);
  });
}

// x in the form that `pack` makes, with `padded` rows.
template <class F>
Tensor packed(const Tensor& x, int64_t padded, F pack) {
  const int64_t width = x.size(1);
  Tensor to = memory(x, padded * width * 2);
  at::parallel_for(0, padded / SIDE, grain(SIDE * width), [&](int64_t begin, int64_t end) {
    pack(x.const_data_ptr(), x.stride(0), x.size(0), padded, width, to.mutable_data_ptr(), begin, end);
  });
  return to;
}

HeadChunk chunk_of(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t valid, const Tensor& kept) {
  TORCH_CHECK_VALUE(has_tiles(), "this processor has no AMX tiles");
  TORCH_CHECK_VALUE(is_bf16_rows(x) && is_bf16_rows(weight) && weight.is_contiguous() && x.size(1) == weight.size(1) &&
                        weight.size(0) % SIDE == 0 && valid >= 0 && valid <= weight.size(0),
                    "head: x and weight must be bf16 of one width, which like the vocabulary divides by 32, got ",
                    x.sizes(), " and ", weight.sizes(), " with ", valid, " valid");
  TORCH_CHECK_VALUE(kept.is_contiguous() && kept.scalar_type() == at::kBFloat16 && kept.dim() == 2 &&
                        kept.size(0) == weight.size(0) && kept.size(1) == round_up(x.size(0)),
                    "head: logits must be bf16 [vocabulary, rows rounded up to 32], got ", kept.sizes());
  HeadChunk c = {};
  c.rows = x.size(0), c.padded = kept.size(1), c.width = x.size(1), c.valid = valid, c.stride = x.stride(0);
  c.x = x.const_data_ptr(), c.weight = weight.const_data_ptr(), c.targets = targets.const_data_ptr<int64_t>();
  return c;
}

Tensor head_logits(const Tensor& x, const Tensor& weight, const Tensor& targets_, int64_t valid, bool levels,
                   Tensor& kept) {
  const Tensor targets = as_longs(targets_, x.size(0), "targets");
  HeadChunk c = chunk_of(x, weight, targets, valid, kept);
  const int64_t blocks = (weight.size(0) + BLOCK - 1) / BLOCK;
  const Tensor features = memory(x, c.padded * c.width * 2);
  parallel(x, c.padded / SIDE, SIDE * c.width * 2, [&](int64_t panel, void* scratch) {
    chosen()->pack_features(x.const_data_ptr(), x.stride(0), c.rows, c.width, features.mutable_data_ptr(), panel,
                            panel + 1, scratch);
  });
  c.features = features.const_data_ptr(), c.kept = kept.mutable_data_ptr();
  Tensor statistics = at::empty({blocks, 4, c.padded}, x.options().dtype(at::kFloat));
  parallel(x, blocks, 4 * (2 * SIDE * SIDE + c.padded), [&](int64_t block, void* scratch) {
    chosen()->logits(c, block * BLOCK, std::min((block + 1) * BLOCK, weight.size(0)), levels,
                     statistics.mutable_data_ptr<float>() + block * 4 * c.padded, scratch);
  });
  return statistics.narrow(2, 0, c.rows);
}

// What the gradient needs of each row of x; `grown`: by what its kept exponentials are to be multiplied, for each block
// of the vocabulary, unless one factor does for all.
struct Factors {
  Tensor rows, grown;

  Factors(const HeadChunk& c, const Tensor& statistics_, const Tensor& lse_, const Tensor& scale_, double smoothing,
          int64_t vocab, double z_loss) {
    const Tensor statistics = statistics_.contiguous(), lse = as_floats(lse_, c.rows, "lse");
    const Tensor scale = as_floats(scale_, c.rows, "scale");
    const int64_t blocks = statistics.size(0), n = c.padded;
    const float* found = statistics.const_data_ptr<float>();
    rows = at::zeros({4, n}, lse.options());
    float *factor = rows.mutable_data_ptr<float>(), *slope = factor + n, *scales = slope + n, *less = scales + n;
    const double share = smoothing == 0 ? 0 : smoothing / (double)vocab;
    bool one = share == 0;
    for (int64_t block = 0; block < blocks; block++) {
      const float *base = found + block * 4 * c.rows, *sum = base + c.rows, *target = sum + c.rows;
      for (int64_t r = 0; r < c.rows; r++) {
        slope[r] += target[r];
        one = one && (base[r] == 0 || sum[r] == 0) && std::isfinite(sum[r]);
      }
    }
    if (!one) grown = at::zeros({blocks, n}, lse.options());
    for (int64_t r = 0; r < c.rows; r++) {
      const float l = lse.const_data_ptr<float>()[r], s = scale.const_data_ptr<float>()[r];
      const float whole = (1.0f + 2.0f * (float)z_loss * l) * s;
      const bool mine = s != 0 && (uint64_t)c.targets[r] < (uint64_t)c.valid;
      factor[r] = s == 0 ? 0 : one ? whole * std::exp(-l) : 1;
      slope[r] = mine ? whole * std::exp(slope[r] - l) - (1.0f - (float)smoothing) * s : 0;
      scales[r] = s, less[r] = (float)share * s;
      for (int64_t block = 0; block < blocks && !one; block++)
        grown.mutable_data_ptr<float>()[block * n + r] =
            s == 0 ? 0 : whole * std::exp(found[block * 4 * c.rows + r] - l);
    }
  }
};

void head_gradient_(const Tensor& x, const Tensor& weight, const Tensor& targets_, const Tensor& statistics,
                    const Tensor& lse, const Tensor& scale, int64_t valid, double smoothing, int64_t vocab,
                    double z_loss, Tensor& kept, Tensor& main_grad, Tensor& dx) {
  const Tensor targets = as_longs(targets_, x.size(0), "targets");
  HeadChunk c = chunk_of(x, weight, targets, valid, kept);
  const int64_t blocks = (weight.size(0) + BLOCK - 1) / BLOCK;
  TORCH_CHECK_VALUE(main_grad.is_contiguous() && main_grad.scalar_type() == at::kFloat &&
                        main_grad.sizes() == weight.sizes() && is_bf16_rows(dx) && dx.sizes() == x.sizes(),
                    "head: main_grad must be contiguous fp32 like the weight and dx like x, got ", main_grad.sizes(),
                    " and ", dx.sizes());
  TORCH_CHECK_VALUE(statistics.sizes() == at::IntArrayRef({blocks, 4, c.rows}) && statistics.scalar_type() == at::kFloat,
                    "head: statistics must be those of head_logits, got ", statistics.sizes());
  const Factors factors(c, statistics, lse, scale, smoothing, vocab, z_loss);
  c.factor = factors.rows.const_data_ptr<float>(), c.slope = c.factor + c.padded;
  c.scale = c.slope + c.padded, c.less = c.scale + c.padded;
  const float* grown = factors.grown.defined() ? factors.grown.const_data_ptr<float>() : nullptr;
  const Tensor factor = factors.rows.select(0, 0).narrow(0, 0, c.rows).unsqueeze(1);
  const Tensor scaled = at::where(at::eq(factor, 0), 0, at::mul(x, factor)).to(at::kBFloat16);  // an ignored row may hold anything
  const Tensor places = packed(scaled, c.padded, chosen()->pack_places);
  c.kept = kept.mutable_data_ptr(), c.places = places.const_data_ptr();
  c.main_grad = main_grad.mutable_data_ptr<float>();
  const Tensor turned = memory(x, BLOCK * c.width * 2);
  const Tensor sum = at::zeros({c.width, c.padded}, main_grad.options());
  for (int64_t first = 0; first < weight.size(0); first += BLOCK) {
    const int64_t height = std::min(BLOCK, weight.size(0) - first);
    ranges(x, height / SIDE, 4 * SIDE * c.padded, [&](int64_t begin, int64_t end, void* scratch) {
      begin = first + begin * SIDE, end = first + end * SIDE;
      if (grown) chosen()->slopes(c, first, height, grown + first / BLOCK * c.padded, begin, end);
      chosen()->gradient(c, begin, end, first, height, turned.mutable_data_ptr(), scratch);
    });
    const void* words = (const uint16_t*)c.kept + first * c.padded;
    parallel(x, c.width / SIDE, 0, [&](int64_t task, void*) {
      chosen()->features_gradient(c, height, turned.const_data_ptr(), words, sum.mutable_data_ptr<float>(), task * SIDE,
                                  (task + 1) * SIDE);
    });
  }
  at::parallel_for(0, c.padded / SIDE, 1, [&](int64_t begin, int64_t end) {
    chosen()->store_features(c, sum.const_data_ptr<float>(), dx.mutable_data_ptr(), dx.stride(0), begin * SIDE,
                             std::min(end * SIDE, c.rows));
  });
}

// main_grad += dy^T x, some rows at a time so that x stays in the cache.
void add_product_(Tensor& main_grad, const Tensor& dy, const Tensor& x) {
  TORCH_CHECK_VALUE(has_tiles(), "this processor has no AMX tiles");
  TORCH_CHECK_VALUE(is_bf16_rows(dy) && is_bf16_rows(x) && dy.size(0) == x.size(0) && main_grad.is_contiguous() &&
                        main_grad.scalar_type() == at::kFloat && main_grad.size(0) == dy.size(1) &&
                        main_grad.size(1) == x.size(1),
                    "add_product: bf16 dy [n, out] and x [n, in] and a contiguous fp32 sum [out, in] with multiples of "
                    "32 are needed, got ", dy.sizes(), ", ", x.sizes(), " and ", main_grad.sizes());
  const int64_t width = x.size(1), outputs = dy.size(1);
  const int64_t most = std::clamp<int64_t>((1 << 19) / std::max<int64_t>(width, 1) / SIDE * SIDE, 256, 2048);
  const int64_t slabs = std::max<int64_t>((x.size(0) + most - 1) / most, 1);  // each reads and writes the whole sum
  const int64_t height = std::max(round_up((x.size(0) + slabs - 1) / slabs), SIDE);
  for (int64_t first = 0; first < x.size(0); first += height) {
    const int64_t rows = std::min(height, x.size(0) - first), padded = round_up(rows);
    const Tensor turned = packed(dy.narrow(0, first, rows), padded, chosen()->pack_turned);
    const Tensor words = packed(x.narrow(0, first, rows), padded, chosen()->pack_places);
    ranges(x, outputs / SIDE, 0, [&](int64_t begin, int64_t end, void*) {
      chosen()->weight_gradient(turned.const_data_ptr(), padded, words.const_data_ptr(), width,
                                main_grad.mutable_data_ptr<float>(), begin * SIDE, end * SIDE);
    });
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megapre, m) {
  m.def("head_logits(Tensor x, Tensor weight, Tensor targets, int valid, bool levels, Tensor(a!) kept) -> Tensor");
  m.def(
      "head_gradient_(Tensor x, Tensor weight, Tensor targets, Tensor statistics, Tensor lse, Tensor scale, int valid, "
      "float smoothing, int vocab, float z_loss, Tensor(a!) kept, Tensor(b!) main_grad, Tensor(c!) dx) -> ()");
  m.def("add_product_(Tensor(a!) main_grad, Tensor dy, Tensor x) -> ()");
  m.def("has_tiles", &has_tiles);
}

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("head_logits", &head_logits);
  m.impl("head_gradient_", &head_gradient_);
  m.impl("add_product_", &add_product_);
}

}  // namespace megapre
