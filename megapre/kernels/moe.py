"""Ops of a mixture of experts: top-k, permutation of tokens to experts and back, products grouped by expert.

n tokens have k choices each, of E experts. N <= n k choices are kept; sorted by expert they are the rows of a matrix.
``source`` int64 [N] is the token of a row, ``rows`` int64 [n, k] the row of a choice, or N for one that is dropped.
Gradients gather and never scatter-add, so that they are deterministic on every device. ``sizes`` are host integers:
the rows of each expert are known there since their exchange between ranks needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor


def top_k_reference(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: where the k largest of ``scores`` [..., E] are, largest first, equal ones by number."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def permute_reference(x: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """The token of each row: [n, h] to [N, h]. Gradient: a token's is the sum of its rows', in fp32 (fp64)."""
    return _Permute.apply(x, source, rows)


def unpermute_reference(y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """sum_j weights[t, j] y[rows[t, j]]: [N, h] and [n, k] to [n, h], summed in fp32 (fp64), in the type of ``y``."""
    return _Unpermute.apply(y, weights, source, rows)


def grouped_mm_reference(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """x_e weight_e^T for each expert's rows: [N, in] and [experts, out, in] (any strides) to [N, out]. No autograd."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for matrix, (first, last) in zip(weight, _bounds(sizes)):
        torch.mm(x[first:last], matrix.t(), out=out[first:last])
    return out


def grouped_dw_reference_(main: Tensor, dy: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    """main_e += dy_e^T x_e for each expert's rows: ``main`` [experts, out, in], dy [N, out], x [N, in]."""
    for gradient, (first, last) in zip(main, _bounds(sizes)):
        if main.dtype == dy.dtype:
            gradient.addmm_(dy[first:last].t(), x[first:last])
        else:
            gradient.add_(dy[first:last].t() @ x[first:last])


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(sizes, initial=0)))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _with_zero_row(y: Tensor) -> Tensor:
    """``y`` and the row that dropped choices read."""
    return torch.cat((y, y.new_zeros(1, y.shape[1])))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x[source]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        dy = _with_zero_row(dy)
        dx = _wide(dy[rows[:, 0]])
        for choice in rows.T[1:]:
            dx = dx + _wide(dy[choice])
        return dx.to(dy.dtype), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, source, rows)
        y = _with_zero_row(y)
        out = torch.zeros(rows.shape[0], y.shape[1], dtype=_wide(y[:0]).dtype, device=y.device)
        for choice, weight in zip(rows.T, weights.T):
            out += weight.unsqueeze(1) * y[choice]
        return out.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, weights, source, rows = ctx.saved_tensors
        wide = _wide(dout)
        of_row = weights.new_zeros(y.shape[0] + 1)
        of_row[rows] = weights
        dy = (of_row[:-1].unsqueeze(1) * wide[source]).to(y.dtype)
        y = _with_zero_row(y)
        dweights = torch.stack([(y[choice] * wide).sum(1) for choice in rows.T], dim=1)
        return dy, dweights.to(weights.dtype), None, None
