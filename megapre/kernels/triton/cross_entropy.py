"""Cross-entropy over a vocabulary shard in Triton: row statistics, and the gradient in place of the logits.

With the exchange between ranks in the middle the logits are read twice and written once. Where the vocabulary is whole,
``whole_`` does both in one launch: read once and written once up to ``IN_REGISTERS`` columns, above that the second
read of a row follows the first at once and finds it in the L2 cache.

The gradient of lse - (1 - s) l_t - s/V sum_j l_j + z lse^2 is p_j (1 + 2 z lse) - s/V - (1 - s) [j = t], with
p_j = exp(l_j - lse), times the row's scale: the upstream gradient, the mask and the loss's denominator in one number.
A row of scale 0 gives zeros whatever its logits are, and is not read for them.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.triton import launch

IN_REGISTERS = 32768
BLOCK = 8192
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold(wide, inside, top, total, plain, SMOOTH: tl.constexpr):
    """Fold a block of a row into its largest logit, its sum of exponentials and its plain sum."""
    highest = tl.maximum(top, tl.max(wide, 0))
    # A row of -inf alone has no largest finite logit to subtract; its sum is 0, not NaN.
    base = tl.where(highest == -float("inf"), 0.0, highest)
    total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((wide - base) * LOG2E), 0)
    if SMOOTH:
        plain += tl.sum(tl.where(inside, wide, 0.0), 0)
    return highest, total, plain


@triton.jit
def _ours(targets, row, valid):
    """The row's target as int32, -1 where it is not one of our columns."""
    target = tl.load(targets + row)
    return tl.where((target >= 0) & (target < valid), target, -1).to(tl.int32)


@triton.jit
def _factors(lse, scale, valid, keep, uniform, twice_z):
    """Numbers of a row: factor of the probabilities, what each column loses, what the target loses, columns to read."""
    live = scale != 0.0
    factor = tl.where(live, (1.0 + twice_z * lse) * scale, 0.0)
    return factor, uniform * scale, keep * scale, tl.where(live, valid, 0)


@triton.jit
def _correct(base, target, picked, lse, factor, less, lost):
    """Write the target's column again, less its one: cheaper than a comparison in each column."""
    tl.debug_barrier()
    grad = tl.exp2((picked - lse) * LOG2E) * factor - less - lost
    tl.store(base + target, grad.to(base.dtype.element_ty), mask=target >= 0)


@triton.jit
def _statistics(logits, targets, out, rows, stride, valid, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    column = tl.arange(0, BLOCK)
    top, total, plain = -float("inf"), 0.0, 0.0
    for start in range(0, valid, BLOCK):
        inside = start + column < valid
        wide = tl.load(base + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        top, total, plain = _fold(wide, inside, top, total, plain, True)
    target = _ours(targets, row, valid)
    picked = tl.load(base + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(out + row, top)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, picked)
    tl.store(out + 3 * rows + row, plain)


@triton.jit
def _gradient(logits, targets, lses, scales, stride, columns, valid, keep, uniform, twice_z, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    base = logits + row * stride
    column = start + tl.arange(0, BLOCK)
    scale, lse, target = tl.load(scales + row), tl.load(lses + row), _ours(targets, row, valid)
    factor, less, lost, limit = _factors(lse, scale, valid, keep, uniform, twice_z)
    target = tl.where((target >= start) & (target < start + BLOCK) & (limit > 0), target, -1)
    picked = tl.load(base + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.debug_barrier()  # every warp has read the target's logit before one of them overwrites it
    wide = tl.load(base + column, mask=column < limit, other=-float("inf")).to(tl.float32)
    grad = tl.where(column < limit, tl.exp2((wide - lse) * LOG2E) * factor - less, 0.0)
    tl.store(base + column, grad.to(logits.dtype.element_ty), mask=column < columns)
    _correct(base, target, picked, lse, factor, less, lost)


@triton.jit
def _whole(
    logits, targets, scales, out, rows, stride, columns, valid, keep, uniform, twice_z,
    SMOOTH: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    column = tl.arange(0, BLOCK)
    top, total, plain = -float("inf"), 0.0, 0.0
    target, scale = _ours(targets, row, valid), tl.load(scales + row)
    picked = tl.load(base + target, mask=target >= 0, other=0.0).to(tl.float32)
    if ONCE:
        wide = tl.load(base + column, mask=column < valid, other=-float("inf")).to(tl.float32)
        top = tl.max(wide, 0)
        power = tl.exp2((wide - tl.where(top == -float("inf"), 0.0, top)) * LOG2E)
        total = tl.sum(power, 0)
        if SMOOTH:
            plain = tl.sum(tl.where(column < valid, wide, 0.0), 0)
    else:
        for start in range(0, valid, BLOCK):
            inside = start + column < valid
            wide = tl.load(base + start + column, mask=inside, other=-float("inf")).to(tl.float32)
            top, total, plain = _fold(wide, inside, top, total, plain, SMOOTH)
    lse = top + tl.log2(total) / LOG2E
    tl.store(out + row, lse)
    tl.store(out + rows + row, picked)
    tl.store(out + 2 * rows + row, plain)
    tl.debug_barrier()
    factor, less, lost, limit = _factors(lse, scale, valid, keep, uniform, twice_z)
    if ONCE:
        grad = tl.where(column < limit, power * (factor / total) - less, 0.0)
        tl.store(base + column, grad.to(logits.dtype.element_ty), mask=column < columns)
    else:
        for start in range(0, columns, BLOCK):
            wide = tl.load(base + start + column, mask=start + column < limit, other=-float("inf")).to(tl.float32)
            grad = tl.exp2((wide - lse) * LOG2E) * factor - less
            grad = tl.where(start + column < limit, grad, 0.0)
            tl.store(base + start + column, grad.to(logits.dtype.element_ty), mask=start + column < columns)
    _correct(base, tl.where(limit > 0, target, -1), picked, lse, factor, less, lost)


def statistics_triton(logits: Tensor, targets: Tensor, valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row statistics of logits [n, v] for local targets int64 [n]: max, sum of exp(l - max), target's logit, sum.

    fp32 [n] each, over the first ``valid`` columns; a target outside them is not ours and its logit is 0.
    """
    launch.check("cross-entropy", logits, targets)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows = logits.shape[0]
    out = logits.new_empty((4, rows), dtype=torch.float32)
    block = min(BLOCK, max(16, launch.power_of_two(valid)))
    if rows:
        with launch.on(logits):
            _statistics[(rows,)](
                logits, targets.contiguous(), out, rows, logits.stride(0), valid, BLOCK=block,
                num_warps=launch.warps(block, per_thread=32),
            )  # fmt: skip
    return out[0], out[1], out[2], out[3]


def gradient_triton_(
    logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, valid: int,
    *, smoothing: float = 0.0, vocab: int = 0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Replace logits [n, v] by the gradient above, pad columns by 0; lse and scale fp32 [n], vocab the global V."""
    launch.check("cross-entropy", logits, targets, lse, scale)
    if logits.stride(1) != 1:
        rows_first = logits.contiguous()
        gradient_triton_(rows_first, targets, lse, scale, valid, smoothing=smoothing, vocab=vocab, z_loss=z_loss)
        return logits.copy_(rows_first)
    rows, columns = logits.shape
    block = min(4096, max(16, launch.power_of_two(columns)))
    if rows and columns:
        with launch.on(logits):
            _gradient[(rows, triton.cdiv(columns, block))](
                logits, targets.contiguous(), lse.contiguous(), scale.contiguous(), logits.stride(0), columns, valid,
                1.0 - smoothing, smoothing / max(1, vocab), 2.0 * z_loss, BLOCK=block, num_warps=launch.warps(block),
            )  # fmt: skip
    return logits


def whole_triton_(
    logits: Tensor, targets: Tensor, scale: Tensor, valid: int, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace logits [n, v], whose vocabulary is whole, by their gradient; returns lse, target's logit and logit sum.

    fp32 [n] each; the sum over the ``valid`` columns is 0 without smoothing, which alone needs it.
    """
    launch.check("cross-entropy", logits, targets, scale)
    if logits.stride(1) != 1:
        raise ValueError(f"triton cross-entropy needs logits with columns side by side, not strides {logits.stride()}")
    rows, columns = logits.shape
    out = logits.new_empty((3, rows), dtype=torch.float32)
    once = columns <= IN_REGISTERS
    block = max(16, launch.power_of_two(columns)) if once else BLOCK
    if rows:
        with launch.on(logits):
            _whole[(rows,)](
                logits, targets.contiguous(), scale.contiguous(), out, rows, logits.stride(0), columns, valid,
                1.0 - smoothing, smoothing / max(1, valid), 2.0 * z_loss, SMOOTH=smoothing != 0.0, ONCE=once,
                BLOCK=block, num_warps=launch.warps(block, per_thread=32, most=32 if once else 8),
            )  # fmt: skip
    return out[0], out[1], out[2]
