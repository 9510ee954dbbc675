"""The one owner of the loss denominator.

The loss of a step is the sum over its target tokens divided by their number over the whole global batch,
whatever the microbatches and ranks. Every stage and microbatch gets the same scale, applied here and only here.
A loss of sentences is divided likewise by its labels, and added; so is that of telling replaced tokens, divided by all
tokens.
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
from megapre.parallel.comm import Axis
from megapre.parallel.tensor import Linear, LossTerms, head_loss, over_rows


def loss_parts(model: ModelConfig) -> tuple[str, ...]:
    """Names of the losses whose sum a model is trained on; ``detection`` counts ``model.detection_loss`` times."""
    if model.architecture == "replaced_token":
        return ("tokens", "detection")
    return ("tokens", "sentences") if model.sentence_classes else ("tokens",)


class Loss:
    """Output layer and its input -> the microbatch's part of the step's loss, times the loss scale.

    ``scale``, ``label_scale`` and ``token_scale`` are 0-d tensors: loss scale / target tokens, / labels, and / all
    tokens of the global batch. Label smoothing and the z-loss are parts of a token's loss, so they share the
    denominator. ``detection`` is ``model.detection_loss``.
    """

    def __init__(
        self,
        scale: Tensor,
        label_scale: Tensor,
        token_scale: Tensor,
        detection: float,
        terms: LossTerms,
        kernels: Kernels,
    ) -> None:
        self.scale, self.label_scale, self.token_scale, self.factor = scale, label_scale, token_scale, detection
        self.terms, self.kernels = terms, kernels

    def sentence(self, logits: Tensor, context: Context) -> Tensor:
        """Scaled sum of the cross-entropies of the samples' labels under ``logits`` [batch, classes]."""
        assert context.labels is not None and context.label_weights is not None
        losses = functional.cross_entropy(logits.to(self.scale.dtype), context.labels, reduction="none")
        loss = (losses * context.label_weights.to(self.scale.dtype)).sum() * self.label_scale
        context.parts["sentences"] = loss.detach()
        return loss

    def detection(self, logits: Tensor, replaced: Tensor, context: Context, axis: Axis) -> Tensor:
        """Scaled sum of the binary cross-entropies of ``replaced`` tokens, int64, under ``logits`` [rows, batch].

        Ranks of ``axis`` hold different rows. The samples that fill up a validation do not count. Told apart, without
        their factor: ``detection``, and the share of tokens that are replaced.
        """
        truth = replaced.to(self.scale.dtype)
        losses = functional.binary_cross_entropy_with_logits(logits.to(self.scale.dtype), truth, reduction="none")
        scale = (context.samples >= 0).to(self.scale.dtype) * self.token_scale
        loss, share = over_rows(torch.stack([(losses * scale).sum(), (truth * scale).sum()]), axis)
        context.parts["detection"], context.parts["replaced"] = loss.detach(), share.detach()
        return loss * self.factor

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
