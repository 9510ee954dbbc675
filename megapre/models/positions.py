"""How attention knows where tokens are: parts that turn q and k, and biases by distance; chosen once for a job."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megapre.config.schema import ModelConfig
from megapre.kernels import mask, rope
from megapre.kernels.mask import Mask
from megapre.kernels.registry import Kernels
from megapre.models.context import Context
from megapre.parallel.tensor import sink

Turn = Callable[[Context, Tensor, Tensor], tuple[Tensor, Tensor]]
"""What happens to q [seq, batch, heads, d] and k [seq, batch, kv heads, d] before they meet."""


class Rotary:
    """RoPE by the tables of the context."""

    def __init__(self, model: ModelConfig, kernels: Kernels) -> None:
        self.rope_qk, self.interleaved = kernels.rope_qk, model.rope_interleaved

    def __call__(self, ctx: Context, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Turn both by their positions."""
        assert ctx.rope is not None
        return self.rope_qk(q, k, *ctx.rope, self.interleaved)


class HeadNorm(nn.Module):
    """Norms of every head's q and k (QK-norm, arXiv 2010.04245), as Qwen3 has them."""

    def __init__(self, q: nn.Module, k: nn.Module) -> None:
        super().__init__()
        self.q, self.k = q, k

    def forward(self, ctx: Context, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise the last dimension of both."""
        return self.q(q), self.k(k)


Bias = Callable[[Mask, int, int], Tensor]
"""Mask, queries s and keys t -> what is added to the scores by distance, fp32 (fp64) [this rank's heads, s + t - 1]."""


class Alibi:
    """Scores fall with the distance, by a slope of each of this rank's heads (arXiv 2108.12409)."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def __call__(self, of: Mask, s: int, t: int) -> Tensor:
        """The bias of a call."""
        return mask.alibi(self.slopes, of, s, t)


class Relative(nn.Module):
    """A learned bias of every bucket of distances and head (T5): ``table`` [buckets, this rank's heads]."""

    def __init__(self, model: ModelConfig, table: nn.Parameter) -> None:
        super().__init__()
        self.table, self.farthest = table, model.relative_distance
        self.two_sided = model.architecture != "decoder"

    def forward(self, of: Mask, s: int, t: int) -> Tensor:
        """The bias of a call."""
        return mask.relative(sink(self.table), of, s, t, two_sided=self.two_sided, farthest=self.farthest)


def rope_tables(model: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [seq, batch, head size / 2] of int64 ``positions`` [seq, batch]."""
    return rope.tables_of(positions, FREQUENCIES[model.rope_scaling](model), dtype, _attention_factor(model))


def _plain(model: ModelConfig) -> Tensor:
    return rope.frequencies(model.head_dim, model.rope_theta)


def _linear(model: ModelConfig) -> Tensor:
    """Positions divided by the factor (arXiv 2306.15595)."""
    return _plain(model) / model.rope_factor


def _ntk(model: ModelConfig) -> Tensor:
    """A base that divides the slowest frequency by the factor and leaves the fastest: theta x factor^(d / (d - 2))."""
    d = model.head_dim
    return rope.frequencies(d, model.rope_theta * model.rope_factor ** (d / (d - 2)))


def _yarn(model: ModelConfig) -> Tensor:
    """NTK by parts (arXiv 2309.00071): a ramp over the pairs of features, whose ends are rounded outwards.

    The pair that makes r turns over the original length is number d ln(original / (2 pi r)) / (2 ln theta).
    """
    d, plain = model.head_dim, _plain(model)

    def pair(turns: float) -> float:
        return d * math.log(model.rope_original / (2 * math.pi * turns)) / (2 * math.log(model.rope_theta))

    first = max(math.floor(pair(model.n_rope_high)), 0)
    last = min(math.ceil(pair(model.rope_low)), d - 1)
    place = torch.arange(d // 2, dtype=torch.float64) - first
    scaled = (place / max(last - first, 1e-3)).clamp(0, 1)
    return plain * (1 - scaled) + plain / model.rope_factor * scaled


def _llama3(model: ModelConfig) -> Tensor:
    """Llama 3.1 (arXiv 2407.21783): kept above ``rope_high`` turns, divided below ``rope_low``, linear between."""
    plain = _plain(model)
    turns = model.rope_original * plain / (2 * math.pi)
    kept = ((turns - model.rope_low) / (model.n_rope_high - model.rope_low)).clamp(0, 1)
    return plain * kept + plain / model.rope_factor * (1 - kept)


FREQUENCIES: dict[str, Callable[[ModelConfig], Tensor]] = {
    "none": _plain,
    "linear": _linear,
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
}
"""``model.rope_scaling`` -> radians a position of every pair of features, fp64 [head size / 2]."""


def _attention_factor(model: ModelConfig) -> float:
    if model.rope_scaling != "yarn":
        return 1.0
    return model.rope_attention or 0.1 * math.log(max(model.rope_factor, 1.0)) + 1.0
