"""Counter-based dropout, alone or with bias and residual, in Triton; formulas in ``megapre/kernels/dropout.py``.

The mask is that of ``megapre/random/philox.py`` bit for bit: Philox4x32-10 of (sample, position, feature >> 2, site)
under the key (seed, step), one word for each of four features. It is drawn again in the backward pass, never saved.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.triton import launch
from megapre.random import philox

BLOCK = 2048


@triton.jit
def _words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; all words uint32."""
    m0, m1 = tl.full(c0.shape, 0xD2511F53, tl.uint32), tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    w0, w1 = tl.full(c0.shape, 0x9E3779B9, tl.uint32), tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        h0, h1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, c2 * m1, h0 ^ c3 ^ k1, c0 * m0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def _kept(row, first, positions, samples, batch, seed, step, site, limit, BLOCK: tl.constexpr):
    """Whether each of BLOCK features from ``first``, a multiple of 4, of row position x batch + sample is kept."""
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    sample = tl.load(samples + row % batch)
    position = tl.load(positions + row // batch).to(tl.uint32)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    k0 = zero + ((sample >> 32).to(tl.uint32) ^ seed.to(tl.uint32))
    k1 = zero + step.to(tl.uint32)
    a, b, c, d = _words(zero + sample.to(tl.uint32), zero + position, group, zero + site.to(tl.uint32), k0, k1)
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return word >= limit.to(tl.uint32)


@triton.jit(do_not_specialize=["seed", "step", "site", "limit"])
def _forward(
    x, bias, residual, out, positions, samples, batch, width, seed, step, site, limit, gain,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        wide += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        kept = _kept(row, first, positions, samples, batch, seed, step, site, limit, BLOCK)
        wide = tl.where(kept, wide * gain, 0.0)
    if RESIDUAL:
        wide += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "step", "site", "limit"])
def _backward_bias(
    grad, out, partial, positions, samples, rows, batch, width, seed, step, site, limit, gain,
    DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows of a block of columns, with the bias's gradient over them."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, programs):
        at = tl.cast(row, tl.int64) * width + column
        wide = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            kept = _kept(row, first, positions, samples, batch, seed, step, site, limit, BLOCK)
            wide = tl.where(kept, wide * gain, 0.0)
        tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)
        total += wide
    tl.store(partial + program * width + column, total, mask=inside)


def forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, numbers: tuple[int, int, int], positions: Tensor,
    samples: Tensor, probability: float,
) -> Tensor:  # fmt: skip
    """residual + dropout(x + bias) of contiguous x [P, B, h]; ``numbers`` are seed, step and site."""
    launch.check("dropout", x, bias, residual, positions, samples)
    limit, width = philox.threshold(probability), x.shape[-1]
    out = torch.empty_like(x)
    block = min(BLOCK, max(16, launch.power_of_two(width)))
    if out.numel():
        with launch.on(x):
            _forward[(x.shape[0] * x.shape[1], triton.cdiv(width, block))](
                x, x if bias is None else bias, x if residual is None else residual, out, positions, samples,
                x.shape[1], width, *_key(numbers, limit), 1.0 / (1.0 - probability), BIAS=bias is not None,
                RESIDUAL=residual is not None, DROP=limit > 0, BLOCK=block, num_warps=launch.warps(block),
            )  # fmt: skip
    return out


def backward_bias(
    grad: Tensor, numbers: tuple[int, int, int], positions: Tensor, samples: Tensor, probability: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x, like contiguous grad [P, B, h], and of the bias, fp32 [h]."""
    limit, width = philox.threshold(probability), grad.shape[-1]
    rows, out = grad.shape[0] * grad.shape[1], torch.empty_like(grad)
    if not out.numel():
        return out, grad.new_zeros(width, dtype=torch.float32)
    block = min(BLOCK, max(16, launch.power_of_two(width)))
    tiles = triton.cdiv(width, block)
    programs = min(rows, max(1, triton.cdiv(2 * launch.residents(grad), tiles)))
    partial = grad.new_empty((1, programs, width), dtype=torch.float32)
    with launch.on(grad):
        _backward_bias[(tiles, programs)](
            grad, out, partial, positions, samples, rows, grad.shape[1], width, *_key(numbers, limit),
            1.0 / (1.0 - probability), DROP=limit > 0, BLOCK=block, num_warps=launch.warps(block),
        )  # fmt: skip
    return out, launch.column_sum(partial)[0]


def dropout_triton(
    x: Tensor, *, seed: int, step: int, site: int, positions: Tensor, samples: Tensor, probability: float
) -> Tensor:
    """Drop features of x [P, B, h] for positions int64 [P] and samples int64 [B] in one Triton kernel."""
    return _Dropout.apply(x, None, None, (seed, step, site), positions, samples, probability)


def bias_dropout_residual_triton(
    x: Tensor, bias: Tensor | None, residual: Tensor, *, seed: int, step: int, site: int, positions: Tensor,
    samples: Tensor, probability: float,
) -> Tensor:  # fmt: skip
    """residual + dropout(x + bias) for x, residual [P, B, h] and bias [h] or None in one Triton kernel."""
    return _Dropout.apply(x, bias, residual, (seed, step, site), positions, samples, probability)


def _key(numbers: tuple[int, int, int], limit: int) -> list[int]:
    seed, step, site = numbers
    return launch.signed([philox.mix(seed), step, site, limit])


class _Dropout(torch.autograd.Function):
    """Saves positions and samples alone."""

    @staticmethod
    def forward(ctx, x, bias, residual, numbers, positions, samples, probability):
        ctx.save_for_backward(positions, samples)
        ctx.numbers, ctx.probability = numbers, probability
        ctx.bias, ctx.residual = None if bias is None else bias.dtype, residual is not None
        residual = None if residual is None else residual.contiguous()
        return forward(x.contiguous(), bias, residual, numbers, positions, samples, probability)

    @staticmethod
    def backward(ctx, grad):
        place = (ctx.numbers, *ctx.saved_tensors, ctx.probability)
        if ctx.bias is None:
            dx, dbias = forward(grad.contiguous(), None, None, *place), None
        else:
            dx, dbias = backward_bias(grad.contiguous(), *place)
            dbias = dbias.to(ctx.bias)
        return dx, dbias, grad if ctx.residual else None, None, None, None, None
