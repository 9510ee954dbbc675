"""Permutation and grouped products against formulas that look at one row at a time, at odd sizes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megapre.kernels import moe

SEED = random.SystemRandom().randrange(10**6)


def routed(tokens: int, experts: int, k: int, drop: float) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """``source``, ``rows`` and the kept choices (token, choice) in the order of their rows."""
    draw = random.Random(SEED)
    kept = []
    for token in range(tokens):
        for choice, expert in enumerate(draw.sample(range(experts), k)):
            if draw.random() >= drop:
                kept.append((expert, token, choice))
    kept.sort()
    rows = torch.full((tokens, k), len(kept))
    for row, (_, token, choice) in enumerate(kept):
        rows[token, choice] = row
    return torch.tensor([token for _, token, _ in kept], dtype=torch.int64), rows, [(t, c) for _, t, c in kept]


def test_top_k_is_largest_first_and_breaks_ties_by_number() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.5, 0.2], [0.3, 0.3, 0.3, 0.3], [0.0, 0.1, 0.2, 0.9]])
    assert moe.top_k_reference(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2], [3, 2, 1]]


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "drop"), [(13, 5, 2, 0.0), (7, 3, 3, 0.4), (1, 9, 1, 0.0), (4, 4, 2, 1.1)]
)
def test_permute_and_unpermute(tokens: int, experts: int, k: int, drop: float) -> None:
    generator = torch.Generator().manual_seed(SEED)
    source, rows, kept = routed(tokens, experts, k, drop)
    x = torch.randn(tokens, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(tokens, k, dtype=torch.float64, generator=generator, requires_grad=True)
    y = moe.permute_reference(x, source, rows)
    out = moe.unpermute_reference(y.square(), weights, source, rows)
    mask = torch.zeros(tokens, k, dtype=torch.float64)
    for token, choice in kept:
        mask[token, choice] = 1
    expected = (mask * weights).sum(1, keepdim=True) * x.square()
    torch.testing.assert_close(out, expected, msg=f"{SEED=}")
    grade = torch.randn(tokens, 11, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad(out, (x, weights), grade)
    for a, b in zip(found, torch.autograd.grad(expected, (x, weights), grade)):
        torch.testing.assert_close(a, b, msg=f"{SEED=}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_over_choices_are_wide(dtype: torch.dtype) -> None:
    """The k parts of a token are added in fp32, then rounded once."""
    x = torch.full((1, 1), 1.0, dtype=dtype)
    rows = torch.arange(5).view(1, 5)
    source = torch.zeros(5, dtype=torch.int64)
    parts = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=dtype)
    out = moe.unpermute_reference(parts, torch.ones(1, 5), source, rows)
    assert out.dtype == dtype and float(out) == 260.0
    x.requires_grad_()
    moe.permute_reference(x, source, rows).backward(parts)
    assert x.grad is not None and float(x.grad) == 260.0


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0], [7]])
def test_grouped_products(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    rows, experts = sum(sizes), len(sizes)
    x, dy = torch.randn(rows, 5, generator=generator), torch.randn(rows, 9, generator=generator)
    weight = torch.randn(experts, 9, 5, generator=generator)
    owner = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    y = moe.grouped_mm_reference(x, weight, sizes)
    dx = moe.grouped_mm_reference(dy, weight.transpose(1, 2), sizes)
    start = torch.randn(experts, 9, 5, generator=generator)
    main = start.clone()
    moe.grouped_dw_reference_(main, dy, x, sizes)
    for row, expert in enumerate(owner):
        torch.testing.assert_close(y[row], weight[expert] @ x[row])
        torch.testing.assert_close(dx[row], weight[expert].T @ dy[row])
        start[expert] += torch.outer(dy[row], x[row])
    torch.testing.assert_close(main, start)
    half = torch.zeros(experts, 9, 5)
    moe.grouped_dw_reference_(half, dy.bfloat16(), x.bfloat16(), sizes)
    assert half.dtype == torch.float32
