"""Generator and discriminator in one pipeline (ELECTRA, arXiv 2003.10555).

The generator, a small encoder with a masked-LM head, fills in the hidden tokens; the discriminator, the encoder that is
wanted, says of every token whether it is another one than in the text. Both read the same embeddings. The layer
between them ends the one and begins the other: it makes the generator's loss and hands on features of the text with its
samples. No gradient passes from the discriminator to the generator but through the embeddings that they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from megapre.models.block import Block, Norm
from megapre.models.context import SAMPLE, Context, site
from megapre.models.embedding import EmbeddingLayer
from megapre.models.heads import Head
from megapre.parallel.comm import Axis
from megapre.parallel.sampling import sample
from megapre.parallel.tensor import Linear
from megapre.random.philox import uniform


class Replacement(nn.Module):
    """Layer G+1 behind G blocks: the generator's head, and the discriminator's embedding of what it has written."""

    def __init__(self, head: Head, embedding: EmbeddingLayer, vocab_size: int) -> None:
        super().__init__()
        self.head, self.embedding, self.vocab_size = head, embedding, vocab_size

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, ...]:
        """[rows, batch, generator's hidden] to [rows, batch, hidden] and int64 [rows, batch, 1], 1 where replaced.

        A sample that happens to be the token of the text replaces nothing.
        """
        written = torch.where(ctx.weights > 0, self.fill(ctx, x), ctx.targets)
        replaced = (written != ctx.targets).long()[ctx.shard].unsqueeze(-1)
        return *self.embedding(replace(ctx, tokens=written)), replaced

    def loss(self, ctx: Context, x: Tensor) -> tuple[Tensor, ...]:
        """The generator's loss, if one is wanted."""
        return () if ctx.loss is None else self.head(ctx, x)

    def fill(self, ctx: Context, x: Tensor) -> Tensor:
        """Tokens that the generator writes, int64 [seq, batch]: a function of the sample, under any layout."""
        return self.draw(x, self.numbers(ctx))

    def numbers(self, ctx: Context) -> Tensor:
        """The random number of every place, in [0, 1)."""
        return uniform(ctx.seed, site(0, SAMPLE), ctx.places, ctx.samples)

    @torch.no_grad()
    def draw(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens from the generator's softmax, by numbers in [0, 1) [seq, batch]."""
        if self.head.norm is not None:
            x = self.head.norm(x)
        return sample(self.head.output, self.head.read(x), uniforms, self.vocab_size)


class DetectorBlock(nn.Module):
    """A block of the discriminator; what tells the replaced tokens passes."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, ctx: Context, x: Tensor, replaced: Tensor) -> tuple[Tensor, ...]:
        """[rows, batch, hidden] to the same."""
        return *self.block(ctx, x), replaced


class Detector(nn.Module):
    """The last layer: one logit of every token, by a dense layer and its activation; ``axis`` holds other rows."""

    def __init__(
        self,
        norm: Norm | None,
        dense: Linear,
        activation: Callable[[Tensor], Tensor],
        detect: Linear,
        axis: Axis,
    ) -> None:
        super().__init__()
        self.norm, self.dense, self.activation, self.detect, self.axis = norm, dense, activation, detect, axis

    def forward(self, ctx: Context, x: Tensor, replaced: Tensor) -> tuple[Tensor, ...]:
        """[rows, batch, hidden] to a scalar, or to logits [rows, batch]."""
        if self.norm is not None:
            x = self.norm(x)
        logits = self.detect(self.activation(self.dense(x))).squeeze(-1)
        if ctx.detection_loss is None:
            return (logits,)
        return (ctx.detection_loss(logits, replaced.squeeze(-1), ctx, self.axis),)
