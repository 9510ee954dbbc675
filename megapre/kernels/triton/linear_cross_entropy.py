"""The output layer and its cross-entropy by chunks, local parts in Triton, products by torch (cuBLAS).

The contract is that of ``megapre/kernels/linear_cross_entropy.py``. On a rank that holds the whole vocabulary a chunk's
statistics and gradient are one launch. A chunk has ``GPU_ROWS`` rows: W is read twice and dW read and written once a
chunk (``benchmarks/kernels/traffic.py``).
"""

from __future__ import annotations

from torch import Tensor

from megapre.kernels import linear_cross_entropy as whole
from megapre.kernels.linear_cross_entropy import Exchange, alone
from megapre.kernels.triton.cross_entropy import gradient_triton_, statistics_triton, whole_triton_


def linear_ce_triton(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, valid: int, *, main_grad: Tensor | None,
    exchange: Exchange = alone, **options: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Row losses [n] and the gradient of x [n, h]; that of the weight is added to ``main_grad`` fp32 [v, h]."""
    parts = (statistics_triton, gradient_triton_)
    return whole.chunked(
        *parts, x, weight, targets, scale, valid, main_grad, exchange, options, whole_=whole_triton_
    )
