"""What all launchers share: block sizes by width, the number of resident programs, column sums, checks of input.

Nothing here is tuned at run time: a block is the power of two that holds a row, and its warps follow from it. This
package is imported only where triton is (``megapre/kernels/registry.py``).
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITHOUT_DEVICE = 3
"""Programs of a persistent grid in the interpreter: few, so that each of them takes several rows."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def warps(block: int, per_thread: int = 16, most: int = 32) -> int:
    """Warps for a program over ``block`` elements, ``per_thread`` of them to a thread."""
    return max(1, min(most, block // (32 * per_thread)))


def residents(x: Tensor) -> int:
    """Programs of a persistent grid over the device of x: two for each multiprocessor."""
    if x.device.type != "cuda":
        return WITHOUT_DEVICE
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of x the current one: triton launches there whatever its arguments say."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def check(op: str, x: Tensor, *rest: Tensor | None) -> None:
    """Raise ValueError, with the op's name, where x is of a type or the rest on a device that no kernel here takes."""
    if x.dtype not in DTYPES:
        kind = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"triton {op} takes fp32, bf16 and fp16, not {kind}: take another version in [kernels]")
    for other in rest:
        if other is not None and other.device != x.device:
            raise ValueError(f"triton {op} has tensors on {x.device} and {other.device}: put them on one device")


def flat_rows(x: Tensor) -> Tensor:
    """x [..., width] as contiguous [rows, width]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


@triton.jit
def _column_sum(partial, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    which = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    base = partial + which * rows * width + column[None, :]
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(base + row[:, None] * width, mask=(row[:, None] < rows) & inside[None, :], other=0.0)
    tl.store(out + which * width + column, tl.sum(total, 0), mask=inside)


def column_sum(partial: Tensor) -> Tensor:
    """Sum fp32 [sums, rows, width] over its rows to [sums, width], in a fixed order."""
    sums, rows, width = partial.shape
    out = partial.new_empty((sums, width))
    columns = 64
    with on(partial):
        _column_sum[(triton.cdiv(width, columns), sums)](
            partial, out, rows, width, ROWS=32, COLUMNS=columns, num_warps=4
        )
    return out


def hopper() -> bool:
    """Whether kernels are compiled for sm_90 or later; not in the interpreter, which has no target."""
    try:
        return bool(triton.runtime.driver.active.get_current_target().arch >= 90)
    except RuntimeError:
        return False


def signed(words: Sequence[int]) -> list[int]:
    """32-bit words as signed numbers: for those >= 2^31 triton would compile a kernel with 64-bit arguments."""
    return [(word & 0xFFFFFFFF) - ((word & 0x80000000) << 1) for word in words]
