"""Layer 0: tokens, and what is added to them, as features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megapre.config.schema import ModelConfig
from megapre.kernels.registry import Kernels
from megapre.models.block import Dropout, Norm
from megapre.models.context import EMBEDDING, Context, site
from megapre.parallel.tensor import Embedding, Linear, sink

Added = Callable[[Context], Tensor]
"""Features [rows, batch, width] that are added to those of the tokens."""


class Positions(nn.Module):
    """Learned positions (GPT-2, BERT): ``weight`` [sequence, width]."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ctx: Context) -> Tensor:
        """Rows of the table at this rank's positions."""
        return nn.functional.embedding(ctx.positions[ctx.shard], sink(self.weight))


class TokenTypes(nn.Module):
    """Segments of text (BERT): ``weight`` [types, width]. Without types in the data all tokens are of type 0."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ctx: Context) -> Tensor:
        """Rows of the table at this rank's types."""
        types = torch.zeros_like(ctx.tokens) if ctx.token_types is None else ctx.token_types
        return nn.functional.embedding(types[ctx.shard], sink(self.weight))


class Sinusoids(nn.Module):
    """Fixed positions (arXiv 1706.03762): sine and cosine of position / 10000^(2i/width) at features 2i and 2i + 1."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, ctx: Context) -> Tensor:
        """Angles in fp64, then rounded once: a bf16 position would be off by radians."""
        return sinusoids(ctx.positions[ctx.shard], self.width).to(self.dtype)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """fp64 [..., width] of int64 ``positions`` [...]."""
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * 10000.0 ** (-pairs / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width]


class EmbeddingLayer(nn.Module):
    """Tokens plus ``added``, normed, dropped out, and brought from the embeddings' width to the model's.

    ``stream`` tells the dropout of several such layers of a model apart.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokens: Embedding,
        added: Sequence[nn.Module],
        norm: Norm | None,
        project: Linear | None,
        kernels: Kernels,
        stream: int = 0,
    ) -> None:
        super().__init__()
        self.tokens, self.added, self.norm, self.project = tokens, nn.ModuleList(added), norm, project
        self.scale = model.embedding_scale
        self.dropout = Dropout(model.dropout, site(0, EMBEDDING, stream), kernels)

    def forward(self, ctx: Context) -> tuple[Tensor, ...]:
        """Token ids of the context to [rows, batch, hidden]."""
        x = self.tokens(ctx.tokens)
        if self.scale != 1:
            x = x * self.scale
        for part in self.added:
            x = x + part(ctx)
        if self.norm is not None:
            x = self.norm(x)
        x = self.dropout(ctx, x)
        return (x if self.project is None else self.project(x),)
