"""The one owner of the loss denominator.

The loss of a step is the sum over its target tokens divided by their number over the whole global batch,
whatever the microbatches and ranks. Every stage and microbatch gets the same scale, applied here and only here.
"""

from __future__ import annotations

from torch import Tensor

from megapre.kernels.registry import Kernels
from megapre.models.context import Context
from megapre.parallel.comm import Axis
from megapre.parallel.tensor import cross_entropy


class Loss:
    """Logits -> the microbatch's part of the step's loss, times the loss scale.

    ``scale`` is a 0-d tensor: loss scale / target tokens of the global batch.
    """

    def __init__(self, scale: Tensor, vocab_size: int, tensor: Axis, kernels: Kernels) -> None:
        self.scale, self.vocab_size, self.tensor, self.kernels = scale, vocab_size, tensor, kernels

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        """Scaled sum of the cross-entropies of ``logits`` [seq, batch, local vocabulary]."""
        total = cross_entropy(logits, context.targets, context.weights, self.vocab_size, self.tensor, self.kernels)
        return total * self.scale
