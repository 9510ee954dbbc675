"""Two-stream attention (XLNet, arXiv 1906.08237): tokens are predicted in a random order, not from left to right.

The content stream of a position knows its token and reads what stands no later than it in the order; the query stream
knows only that position, reads the content of what stands before it, and predicts the token. Both have the same
weights. Layers hand on both.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from megapre.config.schema import ModelConfig
from megapre.kernels.attention import AttentionDropout
from megapre.kernels.mask import Mask
from megapre.kernels.registry import Kernels
from megapre.models.attention import Attention
from megapre.models.block import Block, Dropout, Norm
from megapre.models.context import ATTENTION, CROSS, EMBEDDING, MLP, WEIGHTS, Context, site
from megapre.models.embedding import EmbeddingLayer
from megapre.models.heads import Head
from megapre.parallel.tensor import Linear, sink


class TwoStreamEmbedding(nn.Module):
    """Layer 0: the content starts from the tokens, the query from one learned vector ``query`` [1, width].

    Positions, where they are embedded, are added to both.
    """

    def __init__(self, model: ModelConfig, content: EmbeddingLayer, query: nn.Parameter, kernels: Kernels) -> None:
        super().__init__()
        self.content, self.query = content, query
        self.dropout = Dropout(model.dropout, site(0, EMBEDDING, 1), kernels)

    def forward(self, ctx: Context) -> tuple[Tensor, ...]:
        """Token ids of the context to content and query, [rows, batch, hidden] each."""
        (h,) = self.content(ctx)
        # A copy: what a layer hands on must not be the memory of its weights, which ZeRO-3 frees.
        g = sink(self.query).expand(h.shape[0], h.shape[1], -1).clone()
        for part in self.content.added:
            g = g + part(ctx)
        if self.content.norm is not None:
            g = self.content.norm(g)
        g = self.dropout(ctx, g)
        return h, g if self.content.project is None else self.content.project(g)


class TwoStreamAttention(Attention):
    """Attention of both streams over the content; ``q`` is the part of ``qkv`` that makes queries, on its own."""

    def __init__(self, q: Linear, *parts: Any) -> None:
        super().__init__(*parts)
        self.q = q

    def streams(self, ctx: Context, h: Tensor, g: Tensor) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """What content and query have read, as two results of `Attention`."""
        assert ctx.ranks is not None, "the objective makes no order"
        fused = self.qkv(h).unflatten(-1, (-1, self.head_dim))
        q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        asking, keys = self.q(g).unflatten(-1, (-1, self.head_dim)), k
        for turn in self.turns:
            asking = turn(ctx, asking, keys)[0]
            q, k = turn(ctx, q, k)
        distances = None if self.relative is None else self.relative.keys(Mask(), q.shape[0], k.shape[0])
        content = self._read(ctx, q, k, v, distances, strict=False)
        return content, self._read(ctx, asking, k, v, distances, strict=True)

    def _read(
        self, ctx: Context, q: Tensor, k: Tensor, v: Tensor, distances: Tensor | None, *, strict: bool
    ) -> tuple[Tensor, Tensor | None]:
        documents = None if ctx.segments is None else (ctx.segments, ctx.segments)
        order = None if ctx.ranks is None else (ctx.ranks, ctx.ranks)
        mask = Mask(causal=True, strict=strict, window=self.window, documents=documents, order=order)
        return self.read(ctx, q, k, v, distances, mask, self._drops(ctx, strict))

    def _drops(self, ctx: Context, query: bool) -> AttentionDropout | None:
        if not (ctx.training and self.dropout):
            return None
        layer = self.layer + (CROSS if query else 0)
        sites = [site(layer, WEIGHTS, self.first_head + head) for head in range(self.heads)]
        return AttentionDropout(ctx.seed, ctx.step, sites, ctx.samples, self.dropout)


class TwoStreamBlock(nn.Module):
    """Layers 1..L: one block, whose attention reads the content of the order, applied to both streams."""

    def __init__(self, model: ModelConfig, layer: int, block: Block, kernels: Kernels) -> None:
        super().__init__()
        self.block, self.post = block, model.norm_placement == "post"
        self.attention_dropout = Dropout(model.dropout, site(CROSS + layer, ATTENTION), kernels)
        self.mlp_dropout = Dropout(model.dropout, site(CROSS + layer, MLP), kernels)

    def forward(self, ctx: Context, h: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """Content and query, [rows, batch, hidden] each, to the same."""
        block, (first, _) = self.block, self.block.norms
        assert isinstance(block.attention, TwoStreamAttention)
        read = block.attention.streams(ctx, *((h, g) if self.post else (first(h), first(g))))
        h = self._finish(ctx, h, read[0], block.attention_dropout, block.mlp_dropout)
        g = self._finish(ctx, g, read[1], self.attention_dropout, self.mlp_dropout)
        block.record(ctx, h)
        return h, g

    def _finish(
        self, ctx: Context, x: Tensor, read: tuple[Tensor, Tensor | None], attention: Dropout, mlp: Dropout
    ) -> Tensor:
        """The rest of the block after its attention, of one stream."""
        block, norms = self.block, self.block.norms
        first, second = cast(Norm, norms[0]), cast(Norm, norms[1])
        if self.post:
            x = attention.join_and_norm(ctx, first, x, *read)[0]
            return mlp.join_and_norm(ctx, second, x, *block.mlp(ctx, x))[0]
        y, x = attention.join_and_norm(ctx, second, x, *read)
        return mlp.join(ctx, x, *block.mlp(ctx, y))


class TwoStreamHead(Head):
    """Layer L+1: the query stream predicts the token of its own position."""

    def forward(self, ctx: Context, h: Tensor, g: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """[rows, batch, hidden] of the query to a scalar, or to logits [seq, batch, local vocabulary]."""
        return super().forward(ctx, g)
