"""Global norm of the gradients: every logical element counted once, wherever it is held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megapre.kernels.registry import Kernels
from megapre.parallel.buckets import Buffers
from megapre.parallel.placement import TensorSpec


class GradientNorm:
    """Euclidean norm over all ranks' complete gradients.

    A rank adds the slice of each bucket that ZeRO would give it, and of those only tensors for which it is
    the primary holder among tensor ranks and stages; one sum over the world completes the norm. ``counts`` leaves
    tensors out.
    """

    def __init__(
        self, buffers: Buffers, kernels: Kernels, counts: Callable[[TensorSpec], bool] = lambda spec: True
    ) -> None:
        self.square_sum = kernels.square_sum
        self.world = buffers.grid.world
        self.pieces: list[Tensor] = []
        self.names: list[str] = []
        """Logical tensor of each piece."""
        for bucket, gradients in zip(buffers.layout.buckets, buffers.gradients.shards):
            (start, end), origin = buffers.share(bucket), buffers.shard(bucket)[0]
            for slot in bucket.slots:
                a, b = max(start, slot.start), min(end, slot.end)
                if slot.primary and a < b and counts(slot.spec):
                    self.pieces.append(gradients[a - origin : b - origin])
                    self.names.append(slot.spec.name)
        self.zero = torch.zeros((), dtype=buffers.wide, device=buffers.device)
        self.parts = self.zero.new_zeros(0)
        """Sum of squares of each piece at the last call."""

    def __call__(self) -> Tensor:
        """The norm, a 0-d tensor equal on every rank; non-finite when any gradient is."""
        squares = self.zero.clone()
        if self.pieces:
            self.parts = torch.stack([self.square_sum(piece) for piece in self.pieces])
            squares = self.parts.sum()
        self.world.all_reduce(squares).wait()
        return squares.sqrt()
