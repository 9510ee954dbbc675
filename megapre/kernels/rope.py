"""Rotary positions (arXiv 2104.09864): half-split as in Llama, or interleaved as in the paper.

(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) with angle = position x theta^(-2i/dim).
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) in radians a position, fp64 [dim/2]. Raises ValueError when ``dim`` is odd."""
    if dim % 2:
        raise ValueError(f"RoPE needs an even head dimension, not {dim}: change model.hidden or model.heads")
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def tables(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``tables_of`` the plain frequencies. Raises ValueError when ``dim`` is odd."""
    return tables_of(positions, frequencies(dim, theta), dtype)


def tables_of(
    positions: Tensor, frequency: Tensor, dtype: torch.dtype, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [seq, batch, dim/2] of int64 ``positions`` [seq, batch] for a model of type ``dtype``.

    ``frequency`` is fp64 [dim/2], as the angles are: a bf16 position or frequency is already off by radians at
    position 1000. The tables, times ``factor``, are fp32, or fp64 when ``dtype`` is.
    """
    angles = positions.double().unsqueeze(-1) * frequency.to(positions.device)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return (angles.cos() * factor).to(kept), (angles.sin() * factor).to(kept)


def apply_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x [seq, batch, heads, dim] by tables [seq, batch, dim/2]; computed in the tables' type.

    Feature i turns with i + dim/2, or 2i with 2i + 1 when ``interleaved``. A context-parallel rank passes the tables
    of its own positions.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    wide = x.to(cos.dtype)
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


def rope_qk_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q [seq, batch, heads, dim] and k [seq, batch, kv_heads, dim] by the same tables.

    ``in_place`` lets a version turn q and k in their own memory, and in backward their gradients: the caller promises
    that nothing else reads the four (the reference makes copies all the same).
    """
    return apply_reference(q, cos, sin, interleaved), apply_reference(k, cos, sin, interleaved)


def apply_cpp(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """``apply_reference`` in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16. Saves the tables alone."""
    return _Rope.apply(cos, sin, interleaved, False, x)[0]


def rope_qk_cpp(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """``rope_qk_reference`` in C++, both in one call; CPU, fp32 or bf16.

    In place, q and k may be slices of one fused buffer (by indexing or ``narrow``: torch refuses to change the results
    of ``split``). A tensor that autograd has saved for something else is then reported by torch as modified in place,
    never used with the wrong values.
    """
    return _Rope.apply(cos, sin, interleaved, in_place, q, k)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos, sin, interleaved, in_place, *xs):  # type: ignore[no-untyped-def]
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.in_place = interleaved, in_place
        return _turn(list(xs), cos, sin, interleaved, False, in_place)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        turned = _turn(list(grads), *ctx.saved_tensors, ctx.interleaved, True, ctx.in_place)
        return None, None, None, None, *turned


def _turn(
    xs: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, in_place: bool
) -> tuple[Tensor, ...]:
    """The tensors turned, back when ``inverse``: in their own memory when ``in_place`` and their heads lie together."""
    xs = [x if _together(x) else x.contiguous() for x in xs]
    if not in_place:
        return tuple(torch.ops.megapre.rope(xs, cos, sin, interleaved, inverse))
    torch.ops.megapre.rope_(xs, cos, sin, interleaved, inverse)
    torch.autograd.graph.increment_version([x for x in xs if not x.is_inference()])
    return tuple(x.view(x.shape) for x in xs)


def _together(x: Tensor) -> bool:
    # Distances of 0 are expanded gradients: one memory for many elements.
    return x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) > 0 and x.stride(1) > 0
