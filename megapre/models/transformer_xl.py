"""Relative positions of Transformer-XL (arXiv 1901.02860) and relative segments of XLNet (arXiv 1906.08237)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapre.config.schema import ModelConfig
from megapre.kernels.mask import Mask
from megapre.models.context import Context
from megapre.parallel.tensor import sink

Segments = tuple[nn.Parameter, nn.Parameter, nn.Parameter]
"""Bias of the query, vectors of the same and of another segment: [this rank's heads, head_dim] each."""


class TransformerXL(nn.Module):
    """What the scores of a block know of distances and segments.

    The score of query i and key j is scale x ((q_i + u) k_j + (q_i + v) W R_(i-j) + (q_i + w) e_ij): R the sinusoids of
    the distance, the same for all blocks, W this block's matrix, u, v, w biases of each head, and e one of two vectors
    of each head, for keys of the same segment of text and of another.
    """

    def __init__(
        self, content: nn.Parameter, position: nn.Parameter, project: nn.Parameter, segments: Segments | None,
        sinusoids: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.content, self.position, self.project = content, position, project
        self.segments = None if segments is None else nn.ParameterList(segments)
        self.sinusoids = sinusoids
        """[2 n - 1, hidden], of the distances n - 1 down to 1 - n, for sequences of up to n tokens."""

    def keys(self, of: Mask, s: int, t: int) -> Tensor:
        """Keys by distance [s + t - 1, heads here, head_dim] of s queries and t keys, in the order of a bias."""
        first = len(self.sinusoids) // 2 - (s - 1) - (of.q_offset - of.k_offset)
        assert 0 <= first <= len(self.sinusoids) - (s + t - 1), "longer than model.sequence"
        found = F.linear(self.sinusoids[first : first + s + t - 1], sink(self.project))
        return found.unflatten(-1, self.content.shape)

    def forward(self, ctx: Context, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[object, ...]:
        """What ``kernels.relative_attention`` takes, of q [s, batch, heads, head_dim], k and v."""
        asking, other, types = q + sink(self.position), None, None
        if self.segments is not None and ctx.token_types is not None:
            bias, same, another = (sink(part) for part in self.segments)
            other, types = ((q + bias) * (another - same)).sum(-1), (ctx.token_types, ctx.token_types)
        return q + sink(self.content), k, v, asking, keys, other, types


def sinusoids_of_distances(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """sin(f d), then cos(f d), for d from ``model.sequence`` - 1 down, none beyond ``model.relative_clamp``.

    f = 10000^(-2 i / hidden), i < hidden / 2: [2 sequence - 1, hidden], angles in fp64.
    """
    far = model.sequence - 1
    distance = torch.arange(far, -far - 1, -1, dtype=torch.float64, device=device)
    if model.relative_clamp:
        distance = distance.clamp(-model.relative_clamp, model.relative_clamp)
    pairs = torch.arange(0, model.hidden, 2, dtype=torch.float64, device=device)
    angles = distance.unsqueeze(1) * 10000.0 ** (-pairs / model.hidden)
    return torch.cat((angles.sin(), angles.cos()), 1).to(dtype)
