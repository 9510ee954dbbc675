"""That the interpreter's changes are at work: each of these passes, or gives garbage, as triton ships it."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.triton.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")


@triton.jit
def _add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)


@triton.jit
def _narrow(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n).to(tl.bfloat16), mask=at < n)


@triton.jit
def _copy(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def _to_one(x, out):
    tl.store(out, tl.load(x + tl.program_id(0)))


@triton.jit
def _shift(x):
    tl.store(x + tl.program_id(0), tl.load(x + tl.program_id(0) + 1))


@triton.jit
def _same(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


@triton.jit
def _total(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


def test_bf16_is_computed_by_value_and_rounded_to_nearest():
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y, out = torch.full_like(x, 1.0), torch.empty_like(x)
    _add[(2,)](x, y, out, 64, BLOCK=32)
    assert torch.equal(out, x + y)
    wide = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 3.4e38, float("inf"), float("nan"), 1e-40])
    out = torch.empty(7, dtype=torch.bfloat16)
    _narrow[(1,)](wide, out, 7, BLOCK=8)
    assert torch.equal(out[:5], wide.bfloat16()[:5]) and out[5].isnan() and out[6] == wide[6].bfloat16()


def test_what_is_outside_is_refused():
    memory = torch.zeros(64)
    for x, out in ((memory[:10], torch.zeros(11)), (torch.zeros(11), memory[:10])):
        with pytest.raises(InterpreterError, match=r"IndexError.*out of bounds: 1 of 11 lanes"):
            _copy[(1,)](x, out, 11, BLOCK=16)
    with pytest.raises(InterpreterError, match="out of bounds: 4 of 12 lanes"):
        _copy[(1,)](memory.view(8, 8)[:2, :4], torch.zeros(12), 12, BLOCK=16)  # the gap between two rows


def test_races_are_refused():
    with pytest.raises(InterpreterError, match=r"race: store of program \(1, 0, 0\)"):
        _to_one[(2,)](torch.zeros(2), torch.zeros(1))
    with pytest.raises(InterpreterError, match=r"race: store of program \(1, 0, 0\)"):
        _shift[(2,)](torch.zeros(3))
    with pytest.raises(InterpreterError, match="writes an address twice"):
        _same[(1,)](torch.zeros(8), BLOCK=8)


def test_a_sum_of_bf16_is_refused():
    with pytest.raises(InterpreterError, match="reduction of bf16: widen it first"):
        _total[(1,)](torch.zeros(8, dtype=torch.bfloat16), torch.zeros(1), BLOCK=8)
