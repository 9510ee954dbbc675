"""Weight gradients of linear layers: computed at once, or kept for a W action of a zero-bubble schedule.

torch's own split of backward would run custom autograd functions twice; a queue of products costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor, Tensor]
"""(main gradient [out, in], dy [n, out], x [n, in]): main gradient += dy^T x."""


class WeightQueue:
    """Where linear layers hand in their products."""

    def __init__(self) -> None:
        self._kept: list[Product] | None = None

    def add(self, product: Product) -> None:
        """Run ``product`` now, or keep it inside :meth:`kept`."""
        if self._kept is None:
            self.run([product])
        else:
            self._kept.append(product)

    @contextmanager
    def kept(self, keep: bool = True) -> Iterator[list[Product]]:
        """Collect the products of the block instead of running them, if ``keep``."""
        products: list[Product] = []
        self._kept = products if keep else None
        try:
            yield products
        finally:
            self._kept = None

    @staticmethod
    @torch.no_grad()
    def run(products: list[Product]) -> None:
        """Add every product to its main gradient."""
        for main, dy, x in products:
            if main.dtype == dy.dtype:
                main.addmm_(dy.t(), x)
            else:
                main.add_(dy.t() @ x)
