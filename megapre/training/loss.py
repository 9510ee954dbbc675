"""The one owner of the loss denominator.

The loss of a step is the sum over its target tokens divided by their number over the whole global batch,
whatever the microbatches and ranks. Every stage and microbatch gets the same scale, applied here and only here.
"""

from __future__ import annotations

from torch import Tensor

from megapre.kernels.registry import Kernels
from megapre.models.context import Context
from megapre.parallel.tensor import Linear, LossTerms, head_loss


class Loss:
    """Output layer and its input -> the microbatch's part of the step's loss, times the loss scale.

    ``scale`` is a 0-d tensor: loss scale / target tokens of the global batch. Label smoothing and the z-loss are parts
    of a token's loss, so they share the denominator.
    """

    def __init__(self, scale: Tensor, terms: LossTerms, kernels: Kernels) -> None:
        self.scale, self.terms, self.kernels = scale, terms, kernels

    def __call__(self, output: Linear, x: Tensor, context: Context) -> Tensor:
        """Scaled sum of the losses of the tokens whose normed features are ``x`` [seq or seq/t, batch, hidden]."""
        scale = context.weights.to(self.scale.dtype) * self.scale
        return head_loss(output, x, context.targets, scale, self.terms, self.kernels)
