"""Seeded bugs of the CUDA sources, run on the CPU by the SIMT machine, and of what calls them and the C++ kernels."""

from __future__ import annotations

from tests.museum.mutant import Mutant

SHORT = "tests/kernels/simt/test_cuda_on_cpu.py::test_short_list_in_every_order"
LONG = "tests/kernels/simt/test_cuda_on_cpu.py::test_long_list"
SANITIZER = "tests/kernels/simt/test_sanitizers.py::test_short_list"

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
        "cuda-attention-lax-wait",
        "csrc/cuda/attention_forward.cuh",
        "    ptx::copy_wait<0>();\n"
        "    __syncthreads();  // the keys have arrived, and nobody reads the values of the tile before",
        "    ptx::copy_wait<1>();\n"
        "    __syncthreads();  // the keys have arrived, and nobody reads the values of the tile before",
        f"{SHORT}[attention-causal-forward]",
        "attention lax wait",
    ),
    Mutant(
        "cuda-attention-no-rescaling",
        "csrc/cuda/attention_forward.cuh",
        "        for (int j = 0; j < D / 8; j++) sum[m][j][2 * h] *= factor, sum[m][j][2 * h + 1] *= factor;",
        "        for (int j = 0; j < D / 8; j++) sum[m][j][2 * h] *= 1.0f, sum[m][j][2 * h + 1] *= 1.0f;",
        f"{SHORT}[attention-causal-forward]",
        "attention no rescaling",
    ),
    Mutant(
        "cuda-attention-wrong-group",
        "csrc/cuda/attention_forward.cuh",
        "  const int group = head / (p.heads / p.groups), lane",
        "  const int group = head % p.groups, lane",
        f"{LONG}[attention-cross]",
        "attention wrong group",
    ),
    Mutant(
        "cuda-attention-edge-off-by-one",
        "csrc/cuda/attention.cuh",
        "  if constexpr (KIND == PLAIN) return key.limit <= query.limit;",
        "  if constexpr (KIND == PLAIN) return key.limit < query.limit;",
        f"{SHORT}[attention-causal-forward]",
        "attention edge off by one",
    ),
    Mutant(
        "cuda-attention-unsynchronised-stage",
        "csrc/cuda/attention_forward.cuh",
        "    __syncthreads();  // the values have arrived, and nobody reads these keys any more",
        "",
        f"{SHORT}[attention-document-reverse]",
        "attention unsynchronised stage",
    ),
    Mutant(
        "cuda-attention-document-boundary",
        "csrc/cuda/attention.cuh",
        "key.document == query.document &&",
        "key.document <= query.document &&",
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
        "csrc/cuda/attention_backward.cuh",
        "  inner = weight * (inner * factor - delta);",
        "  inner = weight * (inner * factor);",
        f"{SHORT}[attention-halves-forward]",
        "attention no lse in backward",
    ),
    Mutant(
        "cuda-attention-lse-in-base-e",
        "megapre/kernels/cuda_attention.py",
        "(lse.float() / math.log(2))",
        "(lse.float() / 1.0)",
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
        "csrc/cuda/attention_backward.cuh",
        "    for (int head = group * each; head < (group + 1) * each; head++) {",
        "    for (int head = group * each; head < group * each + 1; head++) {",
        f"{SHORT}[attention-halves-forward]",
        "attention heads of a group dropped",
    ),
    Mutant(
        "cuda-attention-padding-row-read",
        "csrc/cuda/attention.cuh",
        "    const bool real = c * 8 < width && (INSIDE || first + row + i * STEP < rows);",
        "    const bool real = c * 8 < width;",
        f"{SANITIZER}[asan]",
        "attention padding row read",
    ),
    Mutant(
        "cuda-attention-staged-tile-not-awaited",
        "csrc/cuda/attention_forward.cuh",
        "    __syncthreads();  // the keys have arrived, and nobody reads the values of the tile before",
        "",
        f"{SHORT}[attention-causal-forward]",
        "attention staged tile not awaited",
    ),
    Mutant(
        "cuda-attention-slopes-not-awaited",
        "csrc/cuda/attention_backward.cuh",
        "          __syncthreads();  // every warp's slopes are there",
        "",
        f"{SHORT}[attention-causal-forward]",
        "attention slopes not awaited",
    ),
    Mutant(
        "cuda-attention-mask-missing-in-the-tile-before-whole-ones",
        "csrc/cuda/attention_forward.cuh",
        "      whole = min(whole, max(first, 0) / KEYS);",
        "      whole = min(whole, max(first, 0) / KEYS + 1);",
        f"{SHORT}[attention-causal-forward]",
        "attention mask missing in the tile before whole ones",
    ),
    Mutant(
        "cuda-attention-bias-diagonal-short",
        "csrc/cuda/attention_backward.cuh",
        "i < min(SPAN, SPAN - apart); i++)",
        "i < min(SPAN, SPAN - apart) - 1; i++)",
        f"{LONG}[attention-learned]",
        "attention bias diagonal short",
    ),
    Mutant(
        "cuda-attention-splits-share-keys",
        "csrc/cuda/attention_backward.cuh",
        "  for (int key = blockIdx.x * KEYS; key < p.t; key += p.splits * KEYS) {",
        "  for (int key = 0; key < p.t; key += p.splits * KEYS) {",
        f"{LONG}[attention-whole]",
        "attention splits share keys",
    ),
    Mutant(
        "head-blocks-merged-without-their-maxima",
        "megapre/kernels/linear_cross_entropy.py",
        "    return top, (totals * torch.exp(maxima - base)).sum(0), targets.sum(0), levels.sum(0)",
        "    return top, totals.sum(0), targets.sum(0), levels.sum(0)",
        "tests/kernels/test_linear_cross_entropy.py::test_losses_and_gradients[cpp-(33, 32, 1088, 1050)-dtype1-plain]",
        "The head's blocks of columns merged as if they had one maximum",
    ),
)
