"""The gradient of a linear layer's weight, added where gradients live: main_grad += dy^T x, summed over rows."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_gradient_reference_(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x to ``main_grad`` [out, in] (fp32; fp64 for fp64); dy [n, out] and x [n, in] of one type."""
    if main_grad.dtype == dy.dtype:
        main_grad.addmm_(dy.t(), x)
    else:
        main_grad.add_(dy.t() @ x)


def weight_gradient_cpp_(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """``weight_gradient_reference_`` on the CPU in C++; fp32 or bf16.

    On AMX one pass that adds as it multiplies (``csrc/cpu/tiles.cpp``). Elsewhere torch's product and a C++ sum: a
    narrow product of a transposed matrix runs at half speed, so the smaller of the two is turned first, and the sum
    turns the product back where that was x.
    """
    if main_grad.dtype == dy.dtype or not main_grad.is_contiguous():
        weight_gradient_reference_(main_grad, dy, x)
    elif _suits_tiles(dy, x):
        torch.ops.megapre.add_product_(main_grad, dy, x)
    elif dy.shape[1] <= x.shape[1]:
        torch.ops.megapre.accumulate_(main_grad, dy.t().contiguous() @ x)
    else:
        torch.ops.megapre.accumulate_(main_grad, (x.t().contiguous() @ dy).t())


def _suits_tiles(dy: Tensor, x: Tensor) -> bool:
    """Whether the tiles of AMX can take the call: bf16, widths that divide by 32, features side by side."""
    fits = dy.dtype == x.dtype == torch.bfloat16 and dy.shape[1] % 32 == 0 and x.shape[1] % 32 == 0
    return fits and dy.stride(1) == x.stride(1) == 1 and torch.ops.megapre.has_tiles()
