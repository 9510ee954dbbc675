"""The last layer: what is made of the final features."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megapre.models.block import Norm
from megapre.models.context import Context
from megapre.parallel.tensor import Linear


class Transform(nn.Module):
    """Dense layer, activation and norm before BERT's output layer (arXiv 1810.04805)."""

    def __init__(self, dense: Linear, activation: Callable[[Tensor], Tensor], norm: Norm) -> None:
        super().__init__()
        self.dense, self.activation, self.norm = dense, activation, norm

    def forward(self, x: Tensor) -> Tensor:
        """[rows, batch, hidden] to [rows, batch, embedding size]."""
        return self.norm(self.activation(self.dense(x)))


class Sentence(nn.Module):
    """Class of a sample, told by its first token (arXiv 1810.04805, 1909.11942)."""

    def __init__(self, pooler: Linear, classes: Linear) -> None:
        super().__init__()
        self.pooler, self.classes = pooler, classes

    def forward(self, x: Tensor) -> Tensor:
        """[rows, batch, hidden], the first row being the first token, to logits [batch, classes]."""
        return self.classes(self.pooler(x[0]).tanh())


class Head(nn.Module):
    """Layer L+1: what the job has of final norm, transform and sentence head, and the output layer.

    The loss when the context has one, else logits.
    """

    def __init__(
        self, norm: Norm | None, transform: Transform | None, output: Linear, sentence: Sentence | None, scale: float
    ) -> None:
        super().__init__()
        self.norm, self.transform, self.output, self.sentence = norm, transform, output, sentence
        self.scale = scale
        """Of what the output layer reads."""

    def read(self, x: Tensor) -> Tensor:
        """What the output layer reads, of the normed features."""
        y = x if self.transform is None else self.transform(x)
        return y if self.scale == 1 else y * self.scale

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, ...]:
        """[rows, batch, hidden] to a scalar, or to logits [seq, batch, local vocabulary]."""
        if self.norm is not None:
            x = self.norm(x)
        y = self.read(x)
        if ctx.loss is None:
            return (self.output(y),)
        loss = ctx.loss(self.output, y, ctx)
        # Of the ranks that share a sequence, the one with its first token speaks.
        if self.sentence is not None and ctx.leads:
            assert ctx.sentence_loss is not None
            loss = loss + ctx.sentence_loss(self.sentence(x), ctx)
        return (loss,)
