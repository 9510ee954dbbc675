"""Weight gradients of a layer: added at once, or kept for a W action of a zero-bubble schedule.

torch's own split of backward would run custom autograd functions twice; a queue of sums costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megapre.kernels.weight_gradient import weight_gradient_reference_

Addition = Callable[[], object]
"""Adds one gradient to its main gradient."""


class WeightQueue:
    """Where layers hand in their weight gradients. Main gradients are written nowhere else."""

    def __init__(self) -> None:
        self.multiply: Callable[..., object] = weight_gradient_reference_
        """Adds dy^T x to a main gradient: the version that the model's kernels say."""
        self._kept: list[Addition] | None = None

    def add(self, addition: Addition) -> None:
        """Run ``addition`` now, or keep it inside :meth:`kept`."""
        if self._kept is None:
            self.run([addition])
        else:
            self._kept.append(addition)

    @contextmanager
    def kept(self, keep: bool = True) -> Iterator[list[Addition]]:
        """Collect the additions of the block instead of running them, if ``keep``."""
        additions: list[Addition] = []
        self._kept = additions if keep else None
        try:
            yield additions
        finally:
            self._kept = None

    @staticmethod
    @torch.no_grad()
    def run(additions: list[Addition]) -> None:
        """Add every gradient to its main gradient."""
        for addition in additions:
            addition()
