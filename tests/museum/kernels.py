"""Seeded bugs of the CUDA sources, run on the CPU by the SIMT machine, and of the Triton kernels, interpreted."""

from __future__ import annotations

from tests.museum.mutant import Mutant

SHORT = "tests/kernels/simt/test_cuda_on_cpu.py::test_short_list_in_every_order"
LONG = "tests/kernels/simt/test_cuda_on_cpu.py::test_long_list"
SANITIZER = "tests/kernels/simt/test_sanitizers.py::test_short_list"
TRITON = "tests/kernels/triton/test_values_"

KERNELS = (
    Mutant(
        "cuda-missing-barrier",
        "csrc/cuda/common.cuh",
        "  __syncthreads();",
        "",
        (f"{SHORT}[layer-16-forward]", f"{SHORT}[loss-forward]"),
        "missing barrier",
    ),
    Mutant(
        "cuda-off-by-one-bound",
        "csrc/cuda/swiglu.cu",
        "    forward(const T* __restrict__ gate_up, T* __restrict__ out, int width) {\n"
        "  const int i = (blockIdx.y * THREADS + threadIdx.x) * N;\n"
        "  if (i >= width) return;",
        "    forward(const T* __restrict__ gate_up, T* __restrict__ out, int width) {\n"
        "  const int i = (blockIdx.y * THREADS + threadIdx.x) * N;\n"
        "  if (i > width) return;",
        f"{SANITIZER}[asan]",
        "off by one bound",
    ),
    Mutant(
        "cuda-wrong-mask-edge",
        "csrc/cuda/cross_entropy.cu",
        "  if (whole + (int)threadIdx.x < loss.valid) {",
        "  if (whole + (int)threadIdx.x <= loss.valid) {",
        f"{SHORT}[loss-forward]",
        "wrong mask edge",
    ),
    Mutant(
        "cuda-wrong-rng-offset",
        "csrc/cuda/dropout.cu",
        "    const uint4 c = make_uint4((uint32_t)sample, (uint32_t)positions[row / B],"
        " (uint32_t)group, site);",
        "    const uint4 c = make_uint4((uint32_t)sample, (uint32_t)positions[row / B],"
        " (uint32_t)group + 1, site);",
        (f"{SHORT}[keep-mask-forward]", f"{SHORT}[keep-mask-4-forward]"),
        "wrong rng offset",
    ),
    Mutant(
        "cuda-missing-tail",
        "csrc/cuda/optimizer.cu",
        "  run<M, 1>(a, whole, a.count - whole);",
        "  if (!wide) run<M, 1>(a, whole, a.count - whole);",
        f"{SHORT}[adamw-forward]",
        "missing tail",
    ),
    Mutant(
        "cuda-wrong-reduction-width",
        "csrc/cuda/common.cuh",
        "  for (int distance = 16; distance; distance >>= 1) x = f(x, __shfl_xor_sync(ALL, x,"
        " distance));",
        "  for (int distance = 8; distance; distance >>= 1) x = f(x, __shfl_xor_sync(ALL, x,"
        " distance));",
        (f"{SHORT}[rms-8-forward]", f"{SHORT}[square-sum-forward]"),
        "wrong reduction width",
    ),
    Mutant(
        "cuda-unsynchronised-reuse",
        "csrc/cuda/norm.cuh",
        "  for (int row = blockIdx.x; row < rows; row += gridDim.x, turn ^= BACKWARD_THREADS /"
        " 32) {",
        "  for (int row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 0) {",
        (f"{SHORT}[layer-16-forward]", f"{SANITIZER}[tsan]"),
        "unsynchronised reuse",
    ),
    Mutant(
        "cuda-missing-scale",
        "csrc/cuda/cross_entropy.cu",
        "      : on_p(scale * (1.0f + 2.0f * loss.z_loss * lse)), constant(scale * loss.share),"
        " on_target(scale * (1.0f - loss.smoothing)) {}",
        "      : on_p(scale * (1.0f + 2.0f * loss.z_loss * lse)), constant(loss.share),"
        " on_target(scale * (1.0f - loss.smoothing)) {}",
        (f"{SHORT}[loss-odd-forward]", f"{LONG}[loss-8-5-float32-True]"),
        "missing scale",
    ),
    Mutant(
        "cuda-wait-for-one-copy-less",
        "csrc/cuda/cross_entropy.cu",
        "  ptx::copy_wait<0>();",
        "  ptx::copy_wait<1>();",
        f"{SHORT}[loss-shared-forward]",
        "wait for one copy less",
    ),
    Mutant(
        "cuda-target-before-its-row",
        "csrc/cuda/cross_entropy.cu",
        "  clear<T, N>(row, loss.valid, loss.columns);\n"
        "  __syncthreads();  // every column is written; one of them again",
        "  clear<T, N>(row, loss.valid, loss.columns);",
        (f"{SHORT}[loss-forward]", f"{SANITIZER}[tsan]"),
        "target before its row",
    ),
    Mutant(
        "cuda-blocks-share-a-partial-row",
        "csrc/cuda/norm.cuh",
        "    float* to = partial + blockIdx.x * (int64_t)width + i;",
        "    float* to = partial + i;",
        (f"{SHORT}[rms-8-forward]", f"{SANITIZER}[tsan]"),
        "blocks share a partial row",
    ),
    Mutant(
        "cuda-inverse-not-inverted",
        "csrc/cuda/rope.cu",
        "               k_out_stride, (int)tokens, (int)q_heads, (int)k_heads, (int)dim, inverse"
        " ? -1.0f : 1.0f,",
        "               k_out_stride, (int)tokens, (int)q_heads, (int)k_heads, (int)dim, 1.0f,",
        (f"{SHORT}[rope-half-forward]", f"{SHORT}[rope-pairs-forward]"),
        "inverse not inverted",
    ),
    Mutant(
        "cuda-ignored-row-computed",
        "csrc/cuda/cross_entropy.cu",
        "  if (scale == 0.0f) return clear<T, N>(row, 0, loss.columns);",
        "",
        (f"{SHORT}[loss-forward]", f"{SHORT}[loss-odd-forward]"),
        "ignored row computed",
    ),
    Mutant(
        "cuda-sum-not-rescaled",
        "csrc/cuda/cross_entropy.cu",
        "    sum *= exponential(top - shift);",
        "",
        f"{LONG}[loss-too-long]",
        "sum not rescaled",
    ),
    Mutant(
        "cuda-shared-array-too-short",
        "csrc/cuda/norm.cu",
        "  SHARED(float, shared, COLUMNS * GROUPS);",
        "  SHARED(float, shared, COLUMNS * GROUPS - 1);",
        f"{SANITIZER}[asan]",
        "shared array too short",
    ),
    Mutant(
        "cuda-residual-statistics-of-x",
        "csrc/cuda/norm.cuh",
        "        kept[j] = pack(a, T());\n"
        "        store(h + row + i, kept[j]);",
        "        store(h + row + i, pack(a, T()));",
        f"{SHORT}[add-rms-forward]",
        "residual statistics of x",
    ),
    Mutant(
        "triton-adamw-bias-correction",
        "megapre/kernels/triton/optimizer.py",
        "    tl.store(out + 3, (one / tl.sqrt(one - _power(BETA2, count))).to(tl.float32))",
        "    tl.store(out + 3, (one / tl.sqrt(one - _power(BETA2, count + 1))).to(tl.float32))",
        f"{TRITON}optimizer.py",
        "The step is counted from 0",
    ),
    Mutant(
        "triton-adamw-skip-leaves-model",
        "megapre/kernels/triton/optimizer.py",
        "        tl.store(model + at, w.to(model.dtype.element_ty), mask=inside)",
        "        tl.store(model + at, w.to(model.dtype.element_ty), mask=at < n - start)",
        f"{TRITON}optimizer.py",
        "A skipped step writes the model's copy",
    ),
    Mutant(
        "triton-cross-entropy-ignored-rows",
        "megapre/kernels/triton/cross_entropy.py",
        "    return factor, uniform * scale, keep * scale, tl.where(live, valid, 0)",
        "    return factor, uniform * scale, keep * scale, valid",
        f"{TRITON}cross_entropy.py",
        "0 x NaN in an ignored row",
    ),
    Mutant(
        "triton-cross-entropy-no-rescaling",
        "megapre/kernels/triton/cross_entropy.py",
        "    total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((wide - base) *"
        " LOG2E), 0)",
        "    total = total + tl.sum(tl.exp2((wide - base) * LOG2E), 0)",
        f"{TRITON}cross_entropy.py",
        "The running sum keeps the exponent of an older maximum",
    ),
    Mutant(
        "triton-cross-entropy-pad-columns",
        "megapre/kernels/triton/cross_entropy.py",
        "    grad = tl.where(column < limit, tl.exp2((wide - lse) * LOG2E) * factor - less, 0.0)",
        "    grad = tl.exp2((wide - lse) * LOG2E) * factor - less",
        f"{TRITON}cross_entropy.py",
        "Pad columns get the smoothing's share",
    ),
    Mutant(
        "triton-dropout-lane-order",
        "megapre/kernels/triton/dropout.py",
        "    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))",
        "    word = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))",
        f"{TRITON}dropout.py",
        "The four words of a counter in another order",
    ),
    Mutant(
        "triton-dropout-upper-sample-bits",
        "megapre/kernels/triton/dropout.py",
        "    k0 = zero + ((sample >> 32).to(tl.uint32) ^ seed.to(tl.uint32))",
        "    k0 = zero + ((sample >> 63).to(tl.uint32) ^ seed.to(tl.uint32))",
        f"{TRITON}dropout.py",
        "Samples 2^32 apart share a mask",
    ),
    Mutant(
        "triton-geglu-slope",
        "megapre/kernels/triton/activation.py",
        "        rise *= 2.0 * ROOT + (6.0 * ROOT * CUBIC) * x * x",
        "        rise *= 2.0 * ROOT + (2.0 * ROOT * CUBIC) * x * x",
        f"{TRITON}activation.py",
        "The cube's derivative without its 3",
    ),
    Mutant(
        "triton-norm-bound-off-by-one",
        "megapre/kernels/triton/norm.py",
        "    row = tl.program_id(0).to(tl.int64)\n"
        "    column = tl.arange(0, BLOCK)\n"
        "    inside = column < width",
        "    row = tl.program_id(0).to(tl.int64)\n"
        "    column = tl.arange(0, BLOCK)\n"
        "    inside = column <= width",
        f"{TRITON}norm.py",
        "A row reads and writes one element of the next",
    ),
    Mutant(
        "triton-norm-padding-in-variance",
        "megapre/kernels/triton/norm.py",
        "        wide = tl.where(inside, wide - centre, 0.0)",
        "        wide = wide - centre",
        f"{TRITON}norm.py",
        "Lanes past the row add the mean's square to the variance",
    ),
    Mutant(
        "triton-norm-partial-sums-race",
        "megapre/kernels/triton/norm.py",
        "    tl.store(partial + program * width + column, dweight, mask=inside)",
        "    tl.store(partial + column, dweight, mask=inside)",
        f"{TRITON}norm.py",
        "All programs write the first row of partial sums",
    ),
    Mutant(
        "triton-rope-interleaved-sign",
        "megapre/kernels/triton/rope.py",
        "            d = (b * cos + a * sin).to(out.dtype.element_ty)",
        "            d = (b * cos - a * sin).to(out.dtype.element_ty)",
        f"{TRITON}rope.py",
        "A reflection instead of a rotation",
    ),
    Mutant(
        "triton-rope-padded-half",
        "megapre/kernels/triton/rope.py",
        "            b = _read(at + HALF, inside, EVEN).to(tl.float32)",
        "            b = _read(at + PAIRS, inside, EVEN).to(tl.float32)",
        f"{TRITON}rope.py",
        "The second half begins at the padded width",
    ),
    Mutant(
        "triton-experts-tie-by-the-last",
        "megapre/kernels/triton/moe.py",
        "        found = tl.min(tl.where(keys == top[:, None], expert[None, :], EXPERTS), 1)",
        "        found = tl.max(tl.where(keys == top[:, None], expert[None, :], 0), 1)",
        f"{TRITON}moe.py",
        "Of equal scores the last expert is taken",
    ),
    Mutant(
        "triton-experts-dropped-choice-read",
        "megapre/kernels/triton/moe.py",
        "mask=inside & (row < kept), other=0.0).to(tl.float32)",
        "mask=inside & (row <= kept), other=0.0).to(tl.float32)",
        f"{TRITON}moe.py",
        "A dropped choice reads the row after the last",
    ),
    Mutant(
        "triton-experts-tile-runs-into-the-next",
        "megapre/kernels/triton/moe.py",
        "    tl.store(y + at, total.to(y.dtype.element_ty), mask=(row[:, None] < last) & (column[None, :] < outs))",
        "    tl.store(y + at, total.to(y.dtype.element_ty), mask=(row[:, None] <= last) & (column[None, :] < outs))",
        f"{TRITON}moe.py",
        "An expert writes the first row of the next",
    ),
    Mutant(
        "triton-experts-gradient-overwritten",
        "megapre/kernels/triton/moe.py",
        "    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)",
        "    tl.store(at, total, mask=inside)",
        f"{TRITON}moe.py",
        "The gradient of earlier microbatches is lost",
    ),
    Mutant(
        "triton-experts-rows-of-the-neighbour",
        "megapre/kernels/triton/moe.py",
        "        mine = row < last",
        "        mine = row < tl.load(bounds + tl.num_programs(2))",
        f"{TRITON}moe.py",
        "The last tile of an expert's rows takes in the next expert's",
    ),
    Mutant(
        "triton-experts-weight-gradient-narrow",
        "megapre/kernels/triton/moe.py",
        "        tl.store(dy + row * width + column, (up * weight).to(dy.dtype.element_ty), mask=inside)",
        "        tl.store(dy + row * width + column, up.to(dy.dtype.element_ty), mask=inside)",
        f"{TRITON}moe.py",
        "A row's gradient without its weight",
    ),
    Mutant(
        "cuda-attention-lax-wait",
        "csrc/cuda/attention.cuh",
        "    }\n"
        "    ptx::copy_commit();\n"
        "    ptx::copy_wait<1>();\n"
        "    __syncthreads();  // every thread's part of this tile has arrived",
        "    }\n"
        "    ptx::copy_commit();\n"
        "    ptx::copy_wait<2>();\n"
        "    __syncthreads();  // every thread's part of this tile has arrived",
        f"{SHORT}[attention-causal-forward]",
        "attention lax wait",
    ),
    Mutant(
        "cuda-attention-no-rescaling",
        "csrc/cuda/attention.cuh",
        "      for (int j = 0; j < D / 8; j++) sum[j][2 * h] *= factor, sum[j][2 * h + 1] *= factor;",
        "      for (int j = 0; j < D / 8; j++) sum[j][2 * h] *= 1.0f, sum[j][2 * h + 1] *= 1.0f;",
        f"{SHORT}[attention-causal-forward]",
        "attention no rescaling",
    ),
    Mutant(
        "cuda-attention-wrong-group",
        "csrc/cuda/attention.cuh",
        "  const int group = head / (p.heads / p.groups), tiles = (p.t + ROWS - 1) / ROWS;",
        "  const int group = head % p.groups, tiles = (p.t + ROWS - 1) / ROWS;",
        f"{LONG}[attention-cross]",
        "attention wrong group",
    ),
    Mutant(
        "cuda-attention-edge-off-by-one",
        "csrc/cuda/attention.cuh",
        "  if constexpr (!EXTRA) return !p.causal || apart >= 0;",
        "  if constexpr (!EXTRA) return !p.causal || apart > 0;",
        f"{SHORT}[attention-causal-forward]",
        "attention edge off by one",
    ),
    Mutant(
        "cuda-attention-unsynchronised-stage",
        "csrc/cuda/attention.cuh",
        "    __syncthreads();  // before the tile is overwritten",
        "",
        f"{SHORT}[attention-document-reverse]",
        "attention unsynchronised stage",
    ),
    Mutant(
        "cuda-attention-document-boundary",
        "csrc/cuda/attention.cuh",
        "  return p.order[other] <= p.limit[at] && p.asked[other] == p.asking[at] &&",
        "  return p.order[other] <= p.limit[at] && p.asked[other] <= p.asking[at] &&",
        f"{SHORT}[attention-document-forward]",
        "attention document boundary",
    ),
    Mutant(
        "cuda-attention-rng-coordinates",
        "csrc/cuda/attention.cuh",
        "  const uint4 w = philox(make_uint4((uint32_t)sample, (uint32_t)(p.q_offset + query), place >> 2, site),",
        "  const uint4 w = philox(make_uint4((uint32_t)sample, place >> 2, (uint32_t)(p.q_offset + query), site),",
        f"{SHORT}[attention-dropout-forward]",
        "attention rng coordinates",
    ),
    Mutant(
        "cuda-attention-no-lse-in-backward",
        "csrc/cuda/attention.cuh",
        "  inner = weight * (inner * factor - delta);",
        "  inner = weight * (inner * factor);",
        f"{SHORT}[attention-halves-forward]",
        "attention no lse in backward",
    ),
    Mutant(
        "cuda-attention-lse-in-base-e",
        "csrc/cuda/attention.cuh",
        "  lse = reads ? lse * LOG2E : INFINITY;",
        "  lse = reads ? lse : INFINITY;",
        f"{SHORT}[attention-halves-forward]",
        "attention lse in base e",
    ),
    Mutant(
        "cuda-attention-window-one-wider",
        "csrc/cuda/attention.cuh",
        "         (!p.window || (apart < p.window && apart > -p.window));",
        "         (!p.window || (apart <= p.window && apart > -p.window));",
        f"{SHORT}[attention-dropout-forward]",
        "attention window one wider",
    ),
    Mutant(
        "cuda-attention-heads-of-a-group-dropped",
        "csrc/cuda/attention.cuh",
        "  const int each = p.heads / p.groups, tiles = (p.s + COUNT - 1) / COUNT, steps = each * tiles;",
        "  const int each = p.heads / p.groups, tiles = (p.s + COUNT - 1) / COUNT, steps = tiles;",
        f"{SHORT}[attention-halves-forward]",
        "attention heads of a group dropped",
    ),
    Mutant(
        "cuda-attention-padding-row-read",
        "csrc/cuda/attention.cuh",
        "    const bool real = first + r < rows && c * 8 < width;",
        "    const bool real = c * 8 < width;",
        f"{SANITIZER}[asan]",
        "attention padding row read",
    ),
    Mutant(
        "cuda-attention-staged-tile-not-awaited",
        "csrc/cuda/attention.cuh",
        "    __syncthreads();  // every thread's part of this tile has arrived",
        "",
        f"{SHORT}[attention-causal-forward]",
        "attention staged tile not awaited",
    ),
)
