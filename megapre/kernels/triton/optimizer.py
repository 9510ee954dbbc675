"""AdamW over flat shards and the sum of squares in Triton; formulas in ``megapre/kernels/optimizer.py``.

AdamW reads four fp32 numbers an element and writes three, 28 B, and the model's copy in the same pass. lr, step,
divisor and skip stay on the device: a first kernel of one program makes the six numbers that the others share, in fp64,
because 1 - beta2^t in fp32 is off by 6e-5 at the first step.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels import optimizer
from megapre.kernels.optimizer import Scalar
from megapre.kernels.triton import launch

BLOCK = 1024


@triton.jit
def _power(base, exponent):
    """base^exponent in fp64, exponent in [0, 2^31), by squaring."""
    value, factor = tl.full((), 1.0, tl.float64), tl.full((), base, tl.float64)
    for bit in tl.static_range(31):
        value = tl.where((exponent >> bit) & 1 == 1, value * factor, value)
        factor = factor * factor
    return value


@triton.jit
def _numbers(lr, step, divisor, skip, out, BETA1: tl.constexpr, BETA2: tl.constexpr, DECAY: tl.constexpr):
    rate, count = tl.load(lr).to(tl.float64), tl.load(step).to(tl.int32)
    one = tl.full((), 1.0, tl.float64)
    tl.store(out, (one / tl.load(divisor).to(tl.float64)).to(tl.float32))
    tl.store(out + 1, (one - rate * tl.full((), DECAY, tl.float64)).to(tl.float32))
    tl.store(out + 2, (rate / (one - _power(BETA1, count))).to(tl.float32))
    tl.store(out + 3, (one / tl.sqrt(one - _power(BETA2, count))).to(tl.float32))
    tl.store(out + 4, tl.load(skip).to(tl.float32))


@triton.jit
def _adamw(
    master, gradient, exp_avg, exp_avg_sq, model, numbers, n, beta1, rest1, beta2, rest2, eps,
    MODEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inverse, decay, rate, root, skip = (
        tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    )  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    master += start
    gradient += start
    exp_avg += start
    exp_avg_sq += start
    model += start
    at = tl.arange(0, BLOCK)
    # A skipped step masks every access: no element is read or written.
    inside = at < tl.where(skip == 0.0, tl.minimum(n - start, BLOCK), 0).to(tl.int32)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * inverse
    m = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + rest2 * g * g
    # A division guards against denormals with four more instructions: 1 / y is rsqrt(y)^2, and y is at least eps.
    turn = tl.rsqrt(tl.sqrt(v) * root + eps)
    w = decay * tl.load(master + at, mask=inside, other=0.0) - rate * (m * turn * turn)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(master + at, w, mask=inside)
    if MODEL:
        tl.store(model + at, w.to(model.dtype.element_ty), mask=inside)


@triton.jit
def _squares(flat, partial, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(start, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(flat + at, mask=at < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _sum(partial, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(partial + at, mask=at < n, other=0.0), 0))


def adamw_triton_(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor | None, *, lr: Scalar,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Scalar, divisor: Scalar = 1.0,
    skip: Scalar = 0.0,
) -> None:  # fmt: skip
    """``adamw_reference_`` for fp32 shards in two Triton kernels; nothing is read on the host.

    Raises ValueError for lengths that differ, and for shards that are not fp32 or have gaps.
    """
    optimizer.check(master, gradient, exp_avg, exp_avg_sq, model)
    states = (master, exp_avg, exp_avg_sq)
    dense = all(t.is_contiguous() for t in (*states, gradient, *([] if model is None else [model])))
    if any(t.dtype != torch.float32 for t in states) or not dense:
        kinds = [str(t.dtype).removeprefix("torch.") for t in states]
        raise ValueError(f"triton adamw needs contiguous fp32 shards, not {kinds}: set kernels.optimizer to auto")
    launch.check("adamw", gradient, *states, model)
    scalars = [_on_device(s, master.device) for s in (lr, step, divisor, skip)]
    numbers = master.new_empty(5)
    n = master.numel()
    if n:
        with launch.on(master):
            _numbers[(1,)](*scalars, numbers, BETA1=beta1, BETA2=beta2, DECAY=weight_decay, num_warps=1)
            _adamw[(triton.cdiv(n, BLOCK),)](
                master, gradient, exp_avg, exp_avg_sq, master if model is None else model, numbers, n, beta1,
                1.0 - beta1, beta2, 1.0 - beta2, eps, MODEL=model is not None, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip


def square_sum_triton(flat: Tensor) -> Tensor:
    """Sum of the squares of all elements, fp32 0-d, non-finite when an element is; the same bits in every run."""
    launch.check("square_sum", flat)
    flat = flat.contiguous()
    n, out = flat.numel(), flat.new_zeros((), dtype=torch.float32)
    programs = min(4 * launch.residents(flat), triton.cdiv(n, 4096))
    if n:
        partial = flat.new_empty(programs, dtype=torch.float32)
        with launch.on(flat):
            _squares[(programs,)](flat, partial, n, BLOCK=4096, num_warps=8)
            _sum[(1,)](partial, out, programs, BLOCK=max(16, launch.power_of_two(programs)), num_warps=4)
    return out


def _on_device(value: Scalar, device: torch.device) -> Tensor:
    """0-d tensor of a number without a copy from the host, which would wait."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return torch.full((), float(value), dtype=torch.float64, device=device)
