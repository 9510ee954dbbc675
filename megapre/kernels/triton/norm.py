"""LayerNorm and RMSNorm in Triton, each with an optional residual added in the same read; formulas in ``norm.py``.

Traffic an element of 2 bytes: forward x read and y written, 4 B (8 B with the residual read and the sum written);
backward x and dy read and dx written, 6 B (8 B with the sum's gradient read). A row stays in registers up to ``WIDEST``
features. Wider ones are read a block of columns at a time and twice, where the second read finds the L2 cache, and a
second kernel makes the weight's gradient by columns: 10 B backward (12 B). The weight's gradient is summed in fp32 by
at most two programs for each multiprocessor (and block of columns), each over its own rows, then over the programs in a
fixed order: two runs give the same bits.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.triton import launch

WIDEST = 8192
"""Above it the sums of the weight's gradient no longer fit beside the row."""
COLUMNS = 4096
"""Columns at a time of wider rows."""


@triton.jit
def _forward(
    x, residual, weight, bias, y, h, mean, rstd, width, eps,
    LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        wide += tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
        narrow = wide.to(h.dtype.element_ty)
        tl.store(h + row * width + column, narrow, mask=inside)
        wide = narrow.to(tl.float32)
    if LAYER:
        centre = tl.sum(wide, 0) / width
        wide = tl.where(inside, wide - centre, 0.0)
        tl.store(mean + row, centre)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(rstd + row, scale)
    out = wide * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, dh, x, weight, mean, rstd, dx, partial, rows, width,
    LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for index in range(program, rows, programs):
        row = tl.cast(index, tl.int64)
        scale = tl.load(rstd + row)
        normed = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            normed = tl.where(inside, normed - tl.load(mean + row), 0.0)
        normed *= scale
        dweight += grad * normed
        if BIAS:
            dbias += grad
        grad *= gain
        along = tl.sum(grad * normed, 0) / width
        if LAYER:
            grad -= tl.sum(grad, 0) / width
        out = (grad - normed * along) * scale
        if RESIDUAL:
            out += tl.load(dh + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * width + column, out.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + program * width + column, dweight, mask=inside)
    if BIAS:
        tl.store(partial + (programs + program) * width + column, dbias, mask=inside)


@triton.jit
def _wide_forward(
    x, residual, weight, bias, y, h, mean, rstd, width, eps,
    LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row by blocks of columns; mean and squared deviations are merged as in Chan et al. (1983)."""
    row = tl.program_id(0).to(tl.int64)
    x += row * width
    centre, spread = 0.0, 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        wide = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            wide += tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
            narrow = wide.to(h.dtype.element_ty)
            tl.store(h + row * width + column, narrow, mask=inside)
            wide = narrow.to(tl.float32)
        if LAYER:
            count, before = tl.minimum(width - start, BLOCK).to(tl.float32), tl.cast(start, tl.float32)
            level = tl.sum(wide, 0) / count
            wide = tl.where(inside, wide - level, 0.0)
            step, share = level - centre, count / (before + count)
            centre += step * share
            spread += step * step * before * share
        spread += tl.sum(wide * wide, 0)
    scale = tl.rsqrt(spread / width + eps)
    tl.store(rstd + row, scale)
    if LAYER:
        tl.store(mean + row, centre)
    if RESIDUAL:
        tl.debug_barrier()  # the sum is read again
        x = h + row * width
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        wide = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            wide -= centre
        out = wide * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _wide_backward(
    dy, dh, x, weight, mean, rstd, dx, width, LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    """dx of one row by blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    skip = row * width
    scale, centre = tl.load(rstd + row), 0.0
    if LAYER:
        centre = tl.load(mean + row)
    along, level = 0.0, 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + skip + column, mask=inside, other=0.0).to(tl.float32) * gain
        normed = (tl.load(x + skip + column, mask=inside, other=0.0).to(tl.float32) - centre) * scale
        along += tl.sum(grad * normed, 0)
        if LAYER:
            level += tl.sum(grad, 0)
    along, level = along / width, level / width
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + skip + column, mask=inside, other=0.0).to(tl.float32) * gain
        normed = (tl.load(x + skip + column, mask=inside, other=0.0).to(tl.float32) - centre) * scale
        out = (grad - level - normed * along) * scale
        if RESIDUAL:
            out += tl.load(dh + skip + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + skip + column, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _wide_weight(
    dy, x, mean, rstd, partial, rows, width, LAYER: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of some rows for a block of columns: the weight's gradient, and the bias's."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dweight, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for index in range(program, rows, programs):
        skip = tl.cast(index, tl.int64) * width
        grad = tl.load(dy + skip + column, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(x + skip + column, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            normed -= tl.load(mean + index)
        dweight += grad * normed * tl.load(rstd + index)
        if BIAS:
            dbias += grad
    tl.store(partial + program * width + column, dweight, mask=inside)
    if BIAS:
        tl.store(partial + (programs + program) * width + column, dbias, mask=inside)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm of contiguous x [rows, width]: y, h = x + residual (x itself without one), mean and 1/std fp32 [rows].

    Raises ValueError for a type that the kernel does not take.
    """
    rows, width = x.shape
    launch.check("norm", x, residual, weight, bias)
    y, h = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if layer else rstd
    kernel, block = (_forward, _block(width)) if width <= WIDEST else (_wide_forward, COLUMNS)
    if rows:
        with launch.on(x):
            kernel[(rows,)](
                x, x if residual is None else residual, weight, weight if bias is None else bias, y, h, mean, rstd,
                width, eps, LAYER=layer, RESIDUAL=residual is not None, BIAS=bias is not None, BLOCK=block,
                num_warps=launch.warps(block, most=16),
            )  # fmt: skip
    return y, h, mean, rstd


def backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, layer: bool, bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of contiguous x [rows, width] (plus dh, where given) and, fp32 [1 or 2, width], of weight and bias."""
    rows, width = x.shape
    dx = torch.empty_like(x)
    programs = min(rows, launch.residents(x))
    partial = x.new_empty((2 if bias else 1, programs, width), dtype=torch.float32)
    if not rows:
        return dx, partial.sum(1)
    block = _block(width) if width <= WIDEST else COLUMNS
    # 8 elements to a thread leave registers for the sums of LayerNorm's bias, or for dh; 16 take fewer instructions.
    each = 16 if block == 4096 and not layer and dh is None else 8
    above = dy if dh is None else dh
    with launch.on(x):
        if width <= WIDEST:
            _backward[(programs,)](
                dy, above, x, weight, mean, rstd, dx, partial, rows, width, LAYER=layer, RESIDUAL=dh is not None,
                BIAS=bias, BLOCK=block, num_warps=launch.warps(block, each),
            )  # fmt: skip
        else:
            _wide_backward[(rows,)](
                dy, above, x, weight, mean, rstd, dx, width, LAYER=layer, RESIDUAL=dh is not None, BLOCK=block,
                num_warps=launch.warps(block),
            )  # fmt: skip
            _wide_weight[(triton.cdiv(width, block), programs)](
                dy, x, mean, rstd, partial, rows, width, LAYER=layer, BIAS=bias, BLOCK=block,
                num_warps=launch.warps(block),
            )  # fmt: skip
    return dx, launch.column_sum(partial)


def _block(width: int) -> int:
    return max(16, launch.power_of_two(width))


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [..., width] in Triton; CUDA, fp32, bf16 or fp16."""
    return _Norm.apply(x, weight, bias, eps, True)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., width] in Triton; CUDA, fp32, bf16 or fp16."""
    return _Norm.apply(x, weight, None, eps, False)


def add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(h), h = x + residual) of x [..., width] in one Triton kernel."""
    return _AddNorm.apply(x, residual, weight, bias, eps, True)


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h), h = x + residual) of x [..., width] in one Triton kernel."""
    return _AddNorm.apply(x, residual, weight, None, eps, False)


class _Norm(torch.autograd.Function):
    """Saves x and one or two numbers a row."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, layer):
        rows = launch.flat_rows(x)
        y, _, mean, rstd = forward(rows, None, weight.contiguous(), bias, eps, layer)
        ctx.save_for_backward(rows, weight, mean, rstd)
        ctx.layer, ctx.bias = layer, None if bias is None else bias.dtype
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, weight, mean, rstd = ctx.saved_tensors
        bias = ctx.bias is not None
        dx, sums = backward(launch.flat_rows(dy), None, rows, weight.contiguous(), mean, rstd, ctx.layer, bias)
        return dx.view(dy.shape), sums[0].to(weight.dtype), sums[1].to(ctx.bias) if bias else None, None, None


class _AddNorm(torch.autograd.Function):
    """Saves the sum, which is an output anyway, and one or two numbers a row."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, layer):
        y, h, mean, rstd = forward(
            launch.flat_rows(x), launch.flat_rows(residual), weight.contiguous(), bias, eps, layer
        )
        h = h.view(x.shape)
        ctx.save_for_backward(h, weight, mean, rstd)
        ctx.layer, ctx.bias = layer, None if bias is None else bias.dtype
        return y.view(x.shape), h

    @staticmethod
    def backward(ctx, dy, dh):
        h, weight, mean, rstd = ctx.saved_tensors
        bias = ctx.bias is not None
        rows = launch.flat_rows(h)
        dx, sums = backward(
            launch.flat_rows(dy), launch.flat_rows(dh), rows, weight.contiguous(), mean, rstd, ctx.layer, bias
        )
        dx = dx.view(h.shape)
        return dx, dx, sums[0].to(weight.dtype), sums[1].to(ctx.bias) if bias else None, None, None
