"""The one owner of the loss denominator.

The loss of a step is the sum over its target tokens divided by their number over the whole global batch,
whatever the microbatches and ranks. Every stage and microbatch gets the same scale, applied here and only here.
A loss of sentences is divided likewise by its labels, and added.
Auxiliary losses are sums over sequences, divided by the number of sequences in the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megapre.config.schema import ModelConfig
from megapre.kernels.registry import Kernels
from megapre.models.context import Context
from megapre.parallel.tensor import Linear, LossTerms, head_loss


def loss_parts(model: ModelConfig) -> tuple[str, ...]:
    """Names of the losses whose sum a model is trained on."""
    return ("tokens", "sentences") if model.sentence_classes else ("tokens",)


class Loss:
    """Output layer and its input -> the microbatch's part of the step's loss, times the loss scale.

    ``scale`` and ``label_scale`` are 0-d tensors: loss scale / target tokens, and / labels, of the global batch. Label
    smoothing and the z-loss are parts of a token's loss, so they share the denominator.
    """

    def __init__(self, scale: Tensor, label_scale: Tensor, terms: LossTerms, kernels: Kernels) -> None:
        self.scale, self.label_scale, self.terms, self.kernels = scale, label_scale, terms, kernels

    def sentence(self, logits: Tensor, context: Context) -> Tensor:
        """Scaled sum of the cross-entropies of the samples' labels under ``logits`` [batch, classes]."""
        assert context.labels is not None and context.label_weights is not None
        losses = functional.cross_entropy(logits.to(self.scale.dtype), context.labels, reduction="none")
        loss = (losses * context.label_weights.to(self.scale.dtype)).sum() * self.label_scale
        context.parts["sentences"] = loss.detach()
        return loss

    def __call__(self, output: Linear, x: Tensor, context: Context) -> Tensor:
        """Scaled sum of the losses of the tokens whose normed features are ``x`` [seq or seq/t, batch, hidden]."""
        scale = context.weights.to(self.scale.dtype) * self.scale
        loss = head_loss(output, x, context.targets, scale, self.terms, self.kernels)
        context.parts["tokens"] = loss.detach()
        return loss


class Auxiliary:
    """Adds the gradient of an auxiliary loss to a backward pass that does not start from it.

    ``scale`` is a 0-d tensor: loss scale / sequences of the global batch.
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, x: Tensor, loss: Tensor) -> Tensor:
        """``x`` itself; when its backward comes, ``loss`` (a sum over sequences, 0-d) begins its own."""
        return _Attach.apply(x, loss, self.scale)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dx, ctx.scale.to(ctx.dtype), None
