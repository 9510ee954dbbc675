"""Top-k, permutation and grouped products: every version that runs on this CPU, at odd sizes."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from megapre.kernels import moe
from megapre.random import native
from tests.kernels.moe_cases import ROUTES, SIZES, WIDTHS, Version, check_products, check_top_k, check_ways

SEED = random.SystemRandom().randrange(10**6)
OPS = ("top_k", "permute", "unpermute", "grouped_mm", "grouped_dw")
NAMES = ("reference",) if native.load() else ("cpp", "reference")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
PAIRS = [(name, dtype) for name in NAMES for dtype in ((FP64, FP32, BF16) if name == "reference" else (FP32, BF16))]
BOTH = pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=lambda x: str(x).removeprefix("torch."))


def version(name: str) -> Version:
    return Version(*(getattr(moe, f"{op}_{name}{'_' if op == 'grouped_dw' else ''}") for op in OPS))


@pytest.mark.parametrize("name", NAMES)
def test_top_k(name: str) -> None:
    check_top_k(version(name), "cpu", SEED)


@BOTH
@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_permute_and_unpermute(case: tuple[int, int, int, float], name: str, dtype: torch.dtype) -> None:
    for width in (1, 11, 64):
        check_ways(version(name), case, width, dtype, "cpu", SEED)


@BOTH
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_products(sizes: list[int], name: str, dtype: torch.dtype) -> None:
    for outs, ins in WIDTHS:
        check_products(version(name), sizes, outs, ins, dtype, "cpu", SEED, name == "reference" and dtype == BF16)


@pytest.mark.skipif("cpp" not in NAMES, reason=native.load() or "-")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_products_larger_than_a_block(dtype: torch.dtype) -> None:
    """Rows, columns and depth each a little more than a block of the C++ version, in all three products."""
    check_products(version("cpp"), [515, 2], 259, 521, dtype, "cpu", SEED)
    check_products(version("cpp"), [40, 530], 520, 288, dtype, "cpu", SEED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_sums_over_choices_are_wide(name: str, dtype: torch.dtype) -> None:
    """The k parts of a token are added in fp32, then rounded once."""
    ops, x = version(name), torch.full((1, 1), 1.0, dtype=dtype)
    rows = torch.arange(5).view(1, 5)
    source = torch.zeros(5, dtype=torch.int64)
    parts = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=dtype)
    out = ops.unpermute(parts, torch.ones(1, 5), source, rows)
    assert out.dtype == dtype and float(out) == 260.0
    x.requires_grad_()
    ops.permute(x, source, rows).backward(parts)
    assert x.grad is not None and float(x.grad) == 260.0


@pytest.mark.skipif("cpp" not in NAMES, reason=native.load() or "-")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    generator, found = torch.Generator().manual_seed(SEED), []
    x, weight = torch.randn(600, 96, generator=generator).bfloat16(), torch.randn(3, 300, 96, generator=generator)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = moe.grouped_mm_cpp(x, weight.bfloat16(), [570, 0, 30])
            main = weight.clone()
            moe.grouped_dw_cpp_(main, y, x, [570, 0, 30])
            found.append((y, main))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found)), f"{SEED=}"


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(variant: str) -> None:
    """In a process of its own: the set is chosen when the library loads. One that is not here falls back."""
    names = "cpp and (permute or grouped or wide) or larger"
    command = [sys.executable, "-m", "pytest", __file__, "-k", names, "-x"]
    environment = {**os.environ, "MEGAPRE_CPU": variant}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
