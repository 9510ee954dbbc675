"""Encoder and decoder in one pipeline (arXiv 1706.03762; T5, arXiv 1910.10683; BART, arXiv 1910.13461).

Layers hand on two tensors, the source's and the target's activations. The first layer embeds both, so that only the
first and the last stage hold the vocabulary; the target's waits beside the encoder's blocks. Behind these the source's
is the encoder's output, which every decoder block reads by cross-attention and hands on as it is.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapre.config.schema import ModelConfig
from megapre.kernels.attention import AttentionDropout
from megapre.kernels.mask import Mask
from megapre.kernels.registry import Kernels
from megapre.models.block import Block, Dropout, Norm
from megapre.models.context import ATTENTION, CROSS, WEIGHTS, Context, site
from megapre.models.embedding import EmbeddingLayer
from megapre.models.heads import Head
from megapre.models.spec import kv_copies
from megapre.parallel.comm import Axis
from megapre.parallel.context import Core
from megapre.parallel.tensor import Linear


def source_of(ctx: Context) -> Context:
    """The context of the source."""
    assert ctx.encoder is not None, "the objective makes no source"
    return ctx.encoder


class PairEmbedding(nn.Module):
    """Layer 0: embeddings of source and target from one table, each with its own positions and dropout."""

    def __init__(self, source: EmbeddingLayer, target: EmbeddingLayer) -> None:
        super().__init__()
        self.source, self.target = source, target

    def forward(self, ctx: Context) -> tuple[Tensor, ...]:
        """Token ids of the context to [source rows, batch, hidden] and [rows, batch, hidden]."""
        return *self.source(source_of(ctx)), *self.target(ctx)


class EncoderBlock(nn.Module):
    """Layers 1..E: a block with full attention over the source; the last has the encoder's final norm, if pre-norm."""

    def __init__(self, block: Block, norm: Norm | None) -> None:
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, ctx: Context, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """[source rows, batch, hidden] to the same; ``y``, the target's, passes."""
        (x,) = self.block(source_of(ctx), x)
        return x if self.norm is None else self.norm(x), y


class CrossAttention(nn.Module):
    """Attention of the target over the encoder's output: q of the one, k and v of the other, without positions.

    Inputs [seq or seq/t, batch, hidden] and [source or source/t, batch, hidden], output as the first.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        q: Linear,
        kv: Linear,
        output: Linear,
        axis: Axis,
        core: Core,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.q, self.kv, self.output, self.core, self.layer = q, kv, output, core, layer
        self.dropout, self.head_dim, self.recompute = model.attention_dropout, model.head_dim, recompute
        self.scale = model.attention_scale or None
        self.heads = model.heads // axis.size
        self.kv_heads = model.n_kv_heads * kv_copies(model, axis.size) // axis.size
        self.first_head = axis.rank * self.heads

    def forward(self, ctx: Context, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend; the bias of the result is left to the residual sum."""
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        k, v = self.kv(memory).unflatten(-1, (-1, self.head_dim)).split([self.kv_heads, self.kv_heads], dim=2)
        core = partial(self.core, mask=self._mask(ctx), dropout=self._dropout(ctx), scale=self.scale)
        if self.recompute and ctx.training:  # dropout is counter-based: there is no generator state to restore
            y = checkpoint(core, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            y = core(q, k, v)
        return self.output.product(y.flatten(2))

    def _mask(self, ctx: Context) -> Mask:
        """All of the source, or the document of the same number where the source is made of several."""
        asked = source_of(ctx).segments
        if asked is None:
            return Mask()
        asking = ctx.segments
        return Mask(documents=(asked.new_zeros(ctx.tokens.shape) if asking is None else asking, asked))

    def _dropout(self, ctx: Context) -> AttentionDropout | None:
        if not (ctx.training and self.dropout):
            return None
        sites = [site(CROSS + self.layer, WEIGHTS, self.first_head + head) for head in range(self.heads)]
        return AttentionDropout(ctx.seed, ctx.step, sites, ctx.samples, self.dropout)


class DecoderBlock(nn.Module):
    """Layers E+1..E+L: causal attention, cross-attention and MLP, each reading a norm and adding to the residual."""

    def __init__(
        self, model: ModelConfig, layer: int, block: Block, norm: Norm, cross: CrossAttention, kernels: Kernels
    ) -> None:
        super().__init__()
        self.block, self.cross_norm, self.cross = block, norm, cross
        self.cross_dropout = Dropout(model.dropout, site(CROSS + layer, ATTENTION), kernels)

    def forward(self, ctx: Context, memory: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The encoder's output passes; the target's [rows, batch, hidden] to the same."""
        y = self.body(ctx, memory, y, *self.block.norms)
        self.block.record(ctx, y)
        return memory, y

    def body(self, ctx: Context, memory: Tensor, y: Tensor, first: Norm, last: Norm) -> Tensor:
        """The layer's work."""
        block = self.block
        h, y = block.attention_dropout.join_and_norm(ctx, self.cross_norm, y, *block.attention(ctx, first(y)))
        h, y = self.cross_dropout.join_and_norm(ctx, last, y, *self.cross(ctx, h, memory))
        return block.mlp_dropout.join(ctx, y, *block.mlp(ctx, h))


class PostNormDecoderBlock(DecoderBlock):
    """The sum of a sub-layer and the residual stream is normed (arXiv 1706.03762, BART)."""

    def body(self, ctx: Context, memory: Tensor, y: Tensor, first: Norm, last: Norm) -> Tensor:
        """The layer's work."""
        block = self.block
        y = block.attention_dropout.join_and_norm(ctx, first, y, *block.attention(ctx, y))[0]
        y = self.cross_dropout.join_and_norm(ctx, self.cross_norm, y, *self.cross(ctx, y, memory))[0]
        return block.mlp_dropout.join_and_norm(ctx, last, y, *block.mlp(ctx, y))[0]


DECODER_BLOCKS = {"pre": DecoderBlock, "post": PostNormDecoderBlock}
"""By ``model.norm_placement``."""


class DecoderHead(Head):
    """Layer E+L+1: final norm and output layer over the target."""

    def forward(self, ctx: Context, memory: Tensor, y: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """[rows, batch, hidden] to a scalar, or to logits [seq, batch, local vocabulary]."""
        return super().forward(ctx, y)
