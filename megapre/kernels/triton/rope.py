"""Rotary positions in Triton: queries and keys in one launch; formulas and tables in ``megapre/kernels/rope.py``.

One program turns all query and key heads of a token, so that the cosines are read once. An element of 2 bytes is read
and written once, 4 B, in any strides whose last is 1: a view into a fused projection needs no copy. The offset of a
context-parallel rank is in the tables.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.triton import launch

WARPS = 1


@triton.jit
def _read(at, inside, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _write(at, value, inside, EVEN: tl.constexpr):
    if EVEN:
        tl.store(at, value.to(at.dtype.element_ty))
    else:
        tl.store(at, value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    x, out, x_head, out_head, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one token, STEP at a time; cos and sin [1, PAIRS]."""
    EVEN: tl.constexpr = HALF == PAIRS and HEADS % STEP == 0
    for first in tl.static_range(0, HEADS, STEP):
        head = first + tl.arange(0, STEP)[:, None]
        if INTERLEAVED:
            feature = tl.arange(0, 2 * PAIRS)[None, :]
            inside = (head < HEADS) & (feature < 2 * HALF)
            both = _read(x + (head * x_head + feature), inside, EVEN)
            a, b = tl.split(tl.reshape(both, [STEP, PAIRS, 2]))
            a, b = a.to(tl.float32), b.to(tl.float32)
            c = (a * cos - b * sin).to(out.dtype.element_ty)
            d = (b * cos + a * sin).to(out.dtype.element_ty)
            _write(out + (head * out_head + feature), tl.interleave(c, d), inside, EVEN)
        else:
            pair = tl.arange(0, PAIRS)[None, :]
            inside = (head < HEADS) & (pair < HALF)
            at = x + (head * x_head + pair)
            a = _read(at, inside, EVEN).to(tl.float32)
            b = _read(at + HALF, inside, EVEN).to(tl.float32)
            at = out + (head * out_head + pair)
            _write(at, a * cos - b * sin, inside, EVEN)
            _write(at + HALF, b * cos + a * sin, inside, EVEN)


@triton.jit
def _rope(
    q, k, q_out, k_out, cos, sin,
    q_seq, q_batch, q_head, k_seq, k_batch, k_head, qo_seq, qo_batch, qo_head, ko_seq, ko_batch, ko_head,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    KEYS: tl.constexpr, STEP: tl.constexpr, K_STEP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)[None, :]
    table = (s * tl.num_programs(1) + b) * HALF
    c = _read(cos + table + pair, pair < HALF, HALF == PAIRS)
    d = _read(sin + table + pair, pair < HALF, HALF == PAIRS)
    if INVERSE:
        d = -d
    q += s * q_seq + b * q_batch
    q_out += s * qo_seq + b * qo_batch
    _turn(q, q_out, q_head, qo_head, c, d, HEADS, HALF, INTERLEAVED, STEP, PAIRS)
    if KEYS:
        k += s * k_seq + b * k_batch
        k_out += s * ko_seq + b * ko_batch
        _turn(k, k_out, k_head, ko_head, c, d, K_HEADS, HALF, INTERLEAVED, K_STEP, PAIRS)


def _step(heads: int, pairs: int) -> int:
    """Heads at a time: a multiple of 8 pairs to a thread, as few lanes past the last head as there can be."""
    least = max(1, 32 * WARPS * 8 // pairs)
    step = launch.power_of_two(max(1, heads))
    while step > least and heads % step:
        step //= 2
    return min(step, 4 * least)


def turn(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool, inverse: bool, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """Rotate q [seq, batch, heads, dim] and k, forwards or back, into new contiguous tensors or into themselves."""
    launch.check("rope", q, k, cos, sin)
    q, keys = _dense(q), q if k is None else _dense(k)
    q_out, k_out = (q, keys) if in_place else (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, keys))
    seq, batch, heads, dim = q.shape
    pairs = max(8, launch.power_of_two(dim // 2))
    steps = [_step(t.shape[2], pairs) for t in (q, keys)]
    if q.numel():
        with launch.on(q):
            _rope[(seq, batch)](
                q, keys, q_out, k_out, cos.contiguous(), sin.contiguous(),
                *q.stride()[:3], *keys.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
                HEADS=heads, K_HEADS=keys.shape[2], HALF=dim // 2, INVERSE=inverse, INTERLEAVED=interleaved,
                KEYS=k is not None, STEP=steps[0], K_STEP=steps[1], PAIRS=pairs, num_warps=WARPS,
            )  # fmt: skip
    return q_out, None if k is None else k_out


def apply_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x [seq, batch, heads, dim] by tables fp32 [seq, batch, dim/2]; CUDA, fp32, bf16 or fp16."""
    return _Rope.apply(x, None, cos, sin, interleaved, False)[0]


def rope_qk_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q [seq, batch, heads, dim] and k [seq, batch, kv_heads, dim] in one launch.

    ``in_place``: in their own memory, and backward in that of their gradients; the caller promises that nothing else
    reads the four. The traffic is the same either way, the memory is not.
    """
    return _Rope.apply(q, k, cos, sin, interleaved, in_place)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Rope(torch.autograd.Function):
    """Saves the tables alone; the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved, in_place):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.in_place = interleaved, in_place
        q_out, k_out = turn(q, k, cos, sin, interleaved=interleaved, inverse=False, in_place=in_place)
        # An alias of the input, not the input: the promise above stands in for autograd's version counter.
        return q_out.detach(), None if k_out is None else k_out.detach()

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        turned = turn(dq, dk, cos, sin, interleaved=ctx.interleaved, inverse=True, in_place=ctx.in_place)
        return *turned, None, None, None, None
