"""Seconds of one operation: matrix products, attention, byte-bound work, collectives.

A product of [M, K] and [K, N] runs at share x K / (K + half_k) x (share of tile slots in use) x alignment of the best
product the device is known to reach, and never faster than its operands cross memory. Attention runs at the published
speed of its kernel. Rings follow 2 (n - 1) / n x bytes / bandwidth + latency.
"""

from __future__ import annotations

import math
from functools import lru_cache

from megapre.planner.constants import Constants
from megapre.planner.job import Job
from megapre.planner.network import Network
from megapre.planner.work import Linear

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.93), (128, 64, 0.78), (64, 64, 0.55))
"""Output tiles of cuBLAS-like kernels with their speed on a full device."""
ALIGNMENTS = ((8, 0.60), (16, 0.86), (32, 0.93), (64, 0.97))
"""A contiguous dimension that is no multiple of this many elements keeps this share of tensor-core speed."""
READ_BANDWIDTH = 0.8
"""Share of memory bandwidth that a product's operands reach."""


@lru_cache(maxsize=100_000)
def tile_share(rows: int, columns: int, slots: int) -> float:
    """Best share of tile slots, over whole waves, that an output [rows, columns] keeps busy."""
    best = 0.0
    for height, width, speed in TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        waves = math.ceil(tiles / slots)
        best = max(best, speed * rows * columns / (waves * slots * height * width))
    return best


@lru_cache(maxsize=100_000)
def alignment(*dimensions: int) -> float:
    """Product of the shares that each contiguous dimension keeps."""
    kept = 1.0
    for dimension in dimensions:
        kept *= next((share for unit, share in ALIGNMENTS if dimension % unit), 1.0)
    return kept


class Speed:
    """Times of operations of one job on its device."""

    def __init__(self, job: Job, constants: Constants) -> None:
        self.job, self.constants, self.device = job, constants.on(job.device), job.device
        constants = self.constants
        generation = self.device.generation
        self.fp8 = job.stack.dtype == "fp8" and "fp8" in self.device.best
        self.gemm = constants.by_generation("gemm", generation)
        self.half_k = constants.by_generation("half_k", generation)
        self.memory = self.device.bandwidth * constants.by_generation("memory", generation)
        self.launch = constants.by_generation("launch", generation)
        self.flash = constants.by_generation("flash", generation)
        self.base = "bf16" if job.stack.dtype == "fp8" else job.stack.dtype
        self.network = Network(job, constants)

    def product(
        self, rows: float, columns: float, inner: float, *, fp8: bool | None = None, groups: int = 1, out: float = 0.0
    ) -> float:
        """Seconds of ``groups`` products [rows, inner] x [inner, columns], one after the other.

        ``out``: bytes moved per element of the result, where they are not those of an activation.
        """
        fp8 = self.fp8 if fp8 is None else fp8
        m, n, k = (max(1, round(size)) for size in (rows, columns, inner))
        best = self.device.best["fp8"] * self.constants.gemm_fp8 if fp8 else self.device.best[self.base] * self.gemm
        half = self.half_k * (2 if fp8 else 1)
        shape = tile_share(m, n, self.device.multiprocessors) ** self.constants.wave
        rate = best * shape * k / (k + half) * alignment(n, k)
        width = 1 if fp8 else self.job.stack.width
        moved = groups * (width * (m * k + k * n) + (out or self.job.stack.width) * m * n)
        return max(2.0 * m * n * k * groups / rate, moved / (self.device.bandwidth * READ_BANDWIDTH))

    def linear(self, layer: Linear) -> tuple[float, float, float]:
        """Forward, gradient of the input, gradient of the weight with its addition to the step's sum."""
        rows, inputs, outputs, groups = layer.rows, layer.inputs, layer.outputs, layer.groups
        stack, layout = self.job.stack, self.job.layout
        added = 2.0 * min(4.0, stack.gradient_bytes) if layout.zero < 3 and layout.microbatches > 1 else 0.0
        weight = self.product(outputs, inputs, rows, groups=groups, out=0.0 if stack.separate_sum else added)
        if stack.separate_sum and added:
            weight += groups * inputs * outputs * (stack.width + added) / (self.device.bandwidth * READ_BANDWIDTH)
        return (
            self.product(rows, outputs, inputs, groups=groups),
            self.product(rows, inputs, outputs, groups=groups),
            weight,
        )

    def attention(self, tokens: float) -> tuple[float, float]:
        """Forward and backward of one block's core attention for this rank's ``tokens``."""
        shape, layout = self.job.shape, self.job.layout
        flops = 4.0 * tokens * shape.sequence * shape.q_width / layout.tensor
        kind = self.job.stack.attention
        if kind != "unfused":
            known = self.device.attention.get(kind) or self.device.attention[max(self.device.attention)]
            length = shape.sequence / layout.context
            share = known.share * self.flash * length / (length + known.half_length)
            share *= known.narrow if shape.head_dim < 96 else 1.0 if shape.head_dim <= 128 else 0.8
            forward = flops * shape.keys / shape.sequence / (self.device.peak[self.base] * share)
            return forward, 2.5 * forward
        # Scores written out, read and written by scale, mask, softmax and dropout; bytes per score are those of
        # Megatron's fused softmax.
        inner = shape.head_dim
        aligned = 1.0 if inner % 8 == 0 else self.constants.misaligned
        rate = self.device.best[self.base] * self.gemm * inner / (inner + 64.0) * aligned
        scores = tokens * shape.sequence * shape.heads / layout.tensor
        bandwidth = self.device.bandwidth * self.constants.softmax
        if self.job.stack.fusion == "compiled":
            bandwidth /= self.constants.compiled
        return flops / rate + 13.0 * scores / bandwidth, 2.0 * flops / rate + 18.0 * scores / bandwidth

    def byte_bound(self, tokens: float, moe: bool) -> tuple[float, float]:
        """Forward and backward of one block's norms, residuals, activation, positions, permutation and casts."""
        shape, layout = self.job.shape, self.job.layout
        whole = 22.0 * shape.hidden / (layout.tensor if layout.sequence else 1)
        per_width = 6.0 if shape.gated else 4.0
        width = shape.experts_per_token * shape.expert_ffn + shape.shared_ffn if moe else shape.ffn
        sharded = per_width * width + 12.0 * shape.hidden
        if moe:  # routing, permutation and its inverse
            sharded += 2.0 * self.constants.permute * shape.hidden * shape.experts_per_token
        moved = tokens * (whole + sharded / layout.tensor) * self.job.stack.width / 2
        if self.fp8:  # casts of activations, and of weights (and their transposes) once a step
            moved += tokens * 4.0 * (2 * shape.hidden + (shape.q_width + width) / layout.tensor)
            weights = shape.attention_weights() / layout.tensor
            split = layout.expert * layout.expert_tensor if moe else layout.tensor
            moved += 2.0 * (weights + shape.mlp_weights(moe) / split) / layout.microbatches
        moved *= {"eager": self.constants.eager, "compiled": self.constants.compiled}.get(self.job.stack.fusion, 1.0)
        forward = moved / self.memory
        return forward, (1.8 if self.fp8 else 1.6) * forward

    def optimizer(self, elements: float, gathered: float) -> float:
        """Update of ``elements``, and a pass over ``gathered`` fp32 gradients."""
        return (36.0 * elements + 4.0 * gathered) / (self.device.bandwidth * 0.75)
