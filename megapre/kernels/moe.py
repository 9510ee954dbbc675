"""Ops of a mixture of experts: top-k, permutation of tokens to experts and back, products grouped by expert.

n tokens have k choices each, of E experts. N <= n k choices are kept; sorted by expert they are the rows of a matrix.
``source`` int64 [N] is the token of a row, ``rows`` int64 [n, k] the row of a choice, or N for one that is dropped.
Gradients gather and never scatter-add, so that they are deterministic on every device. ``sizes`` are host integers:
the rows of each expert are known there since their exchange between ranks needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ways:
    """How one version moves rows; the two ops and their gradients are made of these three."""

    gather: Callable[[Tensor, Tensor], Tensor]
    """(x [n, h], source) -> x[source]."""
    combine: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    """(y [N, h], weights [n, k] or None for 1, rows) -> sum over choices, in fp32 (fp64), in the type of ``y``."""
    spread: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(gradient of that sum, y, weights, source, rows) -> gradients of ``y`` and ``weights``."""


def top_k_reference(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: where the k largest of ``scores`` [..., E] are, largest first, equal ones by number."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def permute_reference(x: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """The token of each row: [n, h] to [N, h]. Gradient: a token's is the sum of its rows', in fp32 (fp64)."""
    return _Permute.apply(x, source, rows, REFERENCE)


def unpermute_reference(y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """sum_j weights[t, j] y[rows[t, j]]: [N, h] and [n, k] to [n, h], summed in fp32 (fp64), in the type of ``y``."""
    return _Unpermute.apply(y, weights, source, rows, REFERENCE)


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


def _combine(y: Tensor, weights: Tensor | None, rows: Tensor) -> Tensor:
    dtype, y = y.dtype, _with_zero_row(y)
    out = torch.zeros(rows.shape[0], y.shape[1], dtype=_wide(y[:0]).dtype, device=y.device)
    for j, choice in enumerate(rows.T):
        out += _wide(y[choice]) if weights is None else weights[:, j : j + 1] * y[choice]
    return out.to(dtype)


def _spread(dout: Tensor, y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(dout)
    of_row = weights.new_zeros(y.shape[0] + 1)
    of_row[rows] = weights
    dy = (of_row[:-1].unsqueeze(1) * wide[source]).to(y.dtype)
    y = _with_zero_row(y)
    dweights = torch.stack([(y[choice] * wide).sum(1) for choice in rows.T], dim=1)
    return dy, dweights.to(weights.dtype)


REFERENCE = Ways(lambda x, source: x[source], _combine, _spread)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, rows: Tensor, ways: Ways) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.ways = ways
        return ways.gather(x, source)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return ctx.ways.combine(dy, None, rows), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, source: Tensor, rows: Tensor, ways: Ways) -> Tensor:
        ctx.save_for_backward(y, weights, source, rows)
        ctx.ways = ways
        return ways.combine(y, weights, rows)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *ctx.ways.spread(dout, *ctx.saved_tensors), None, None, None


# --- C++ (csrc/cpu/moe.cpp): the CPU, fp32 or bf16 ------------------------------------------------------------------


def _combine_cpp(y: Tensor, weights: Tensor | None, rows: Tensor) -> Tensor:
    return torch.ops.megapre.moe_combine(y.contiguous(), weights, rows.contiguous())


def _spread_cpp(dout: Tensor, y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    dout, y, rows = dout.contiguous(), y.contiguous(), rows.contiguous()
    dy, dweights = torch.ops.megapre.moe_spread(dout, y, weights, rows)
    return dy, dweights.to(weights.dtype)


CPP = Ways(lambda x, source: x.index_select(0, source), _combine_cpp, _spread_cpp)
"""torch's own selection of rows is a copy at the memory's speed already."""


def top_k_cpp(scores: Tensor, k: int) -> Tensor:
    """``top_k_reference`` in C++: k passes over a row in place of a sort."""
    flat = scores.float().reshape(-1, scores.shape[-1]).contiguous()
    return torch.ops.megapre.moe_top_k(flat, k).view(*scores.shape[:-1], k)


def permute_cpp(x: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """``permute_reference`` with its gradient in C++."""
    return _Permute.apply(x, source, rows, CPP)


def unpermute_cpp(y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """``unpermute_reference`` in C++, a token's sum in registers."""
    return _Unpermute.apply(y, weights, source, rows, CPP)


def grouped_mm_cpp(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """``grouped_mm_reference`` in C++: blocks of all experts are one list of tasks."""
    return torch.ops.megapre.grouped_mm(x.contiguous(), weight, sizes)


def grouped_dw_cpp_(main: Tensor, dy: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    """``grouped_dw_reference_`` in C++: products are added to ``main`` as they are made, never rounded to bf16."""
    torch.ops.megapre.grouped_dw_(main, dy.contiguous(), x.contiguous(), sizes)
