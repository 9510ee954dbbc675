"""What every version of the ops for experts is held to: formulas in fp64 that look at one choice at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.tolerances import TOLERANCE, error

ROUTES = [(13, 5, 2, 0.0), (7, 3, 3, 0.4), (1, 9, 1, 0.0), (4, 4, 2, 1.1), (33, 2, 1, 0.0), (1, 6, 6, 0.2)]
"""Tokens, experts, choices and the share of them that is dropped: nobody dropped, all of them, one token."""
SIZES = [[3, 0, 5, 1], [0, 0], [7], [0, 70, 0], [1, 1, 1, 1], [33, 64, 31]]
"""Rows of each expert: none, one expert that has all, one row each, around a tile's edge."""
WIDTHS = [(9, 5), (32, 64), (70, 33)]
"""Features out and in."""


def routed(tokens: int, experts: int, k: int, drop: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``source``, ``rows`` and, fp64 [tokens, k], which choices are kept."""
    draw = random.Random(seed)
    kept = []
    for token in range(tokens):
        for choice, expert in enumerate(draw.sample(range(experts), k)):
            if draw.random() >= drop:
                kept.append((expert, token, choice))
    kept.sort()
    rows, there = torch.full((tokens, k), len(kept)), torch.zeros(tokens, k, dtype=torch.float64)
    for row, (_, token, choice) in enumerate(kept):
        rows[token, choice], there[token, choice] = row, 1
    return torch.tensor([token for _, token, _ in kept], dtype=torch.int64), rows, there


@dataclass
class Version:
    """The ops of one version."""

    top_k: Callable
    permute: Callable
    unpermute: Callable
    grouped_mm: Callable
    grouped_dw_: Callable


def check_top_k(version: Version, device: str, seed: int) -> None:
    """Largest first, equal ones by number, NaN before all, -0 equal to 0; infinities and every k."""
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor(
        [[0.1, 0.5, 0.5, 0.2, -0.3], [0.3] * 5, [0.0, -0.0, 0.0, -inf, -inf], [-1.0, nan, inf, 2.0, nan],
         [-3e-39, -1e-39, 1e-39, -2.0, -1.5], [-inf] * 5], device=device
    )  # fmt: skip
    expected = [[1, 2, 3, 0, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 4, 2, 3, 0], [2, 1, 0, 4, 3], [0, 1, 2, 3, 4]]
    for k in range(1, 6):
        found = version.top_k(scores, k)
        assert found.dtype == torch.int64 and found.tolist() == [row[:k] for row in expected]
    generator = torch.Generator().manual_seed(seed)
    for shape, k in (((2, 3, 67), 8), ((5, 8), 8), ((1, 1), 1), ((0, 4), 2)):
        # A few values only, so that ties are everywhere.
        many = torch.randint(-4, 5, shape, generator=generator).float()
        ranked = [sorted(range(shape[-1]), key=lambda i: (-row[i], i))[:k] for row in many.view(-1, shape[-1]).tolist()]
        found = version.top_k(many.to(device), k)
        assert found.shape == (*shape[:-1], k) and found.flatten(0, -2).tolist() == ranked, f"{seed=}"


def check_ways(
    version: Version, case: tuple[int, int, int, float], width: int, dtype: torch.dtype, device: str, seed: int
) -> None:
    """permute and unpermute, with the gradients of tokens, rows and weights."""
    tokens, experts, k, drop = case
    source, rows, there = routed(tokens, experts, k, drop, seed)
    generator = torch.Generator().manual_seed(seed)
    narrow = dtype if dtype == torch.float64 else torch.float32
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    y = torch.randn(len(source), width, generator=generator).to(dtype)
    weights = torch.rand(tokens, k, generator=generator).to(narrow)
    up_x, up_y = torch.randn(len(source), width, generator=generator), torch.randn(tokens, width, generator=generator)
    up_x, up_y = up_x.to(dtype), up_y.to(dtype)
    x_, y_, weights_ = (t.detach().to(device).requires_grad_() for t in (x, y, weights))
    places = source.to(device), rows.to(device)
    moved = version.permute(x_, *places)
    assert torch.equal(moved.cpu(), x[source]) and moved.dtype == dtype
    moved.backward(up_x.to(device))
    merged = version.unpermute(y_, weights_, *places)
    merged.backward(up_y.to(device))
    dx, out, dy, dw = (_Sum(*shape) for shape in (x.shape, x.shape, y.shape, rows.shape))
    for token in range(tokens):
        for choice in range(k):
            row = int(rows[token, choice])
            if there[token, choice]:
                dx.add(token, up_x[row])
                out.add(token, weights[token, choice].double() * y[row].double())
                dy.add(row, weights[token, choice].double() * up_y[token].double())
                for a, b in zip(up_y[token], y[row]):
                    dw.add((token, choice), a.double() * b.double())
    assert merged.dtype == dtype and x_.grad.dtype == dtype and weights_.grad.dtype == narrow
    found = (x_.grad, dx, dtype), (merged, out, dtype), (y_.grad, dy, dtype), (weights_.grad, dw, narrow)
    for result, exact, precision in found:  # the weights' gradient is never rounded to the type of y
        # Of a single element even one rounding may cost more than a norm of many ever shows.
        limit = max(TOLERANCE[precision], torch.finfo(precision).eps / 2)
        assert exact.error(result) <= limit, f"{seed=}"


class _Sum:
    """Sums in fp64, and those of the sizes of their terms, to which an error is relative."""

    def __init__(self, *shape: int) -> None:
        self.value, self.size = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def add(self, place: int | tuple[int, int], term: Tensor) -> None:
        self.value[place] += term.double()
        self.size[place] += term.double().abs()

    def error(self, found: Tensor) -> float:
        return float((found.detach().cpu().double() - self.value).norm() / self.size.norm().clamp_min(1e-30))


def check_products(
    version: Version, sizes: list[int], outs: int, ins: int, dtype: torch.dtype, device: str, seed: int,
    narrow_sum: bool = False,
) -> None:  # fmt: skip
    """x W^T, dy W and main += dy^T x of every expert. ``narrow_sum``: the product is rounded before it is added."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows = len(sizes), sum(sizes)
    x, dy = (torch.randn(rows, width, generator=generator).to(dtype) for width in (ins, outs))
    weight = torch.randn(experts, outs, ins, generator=generator).to(dtype)
    # One row more than the weights have: another parameter's gradient lies there.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    memory = torch.randn(experts * outs + 1, ins, generator=generator).to(wide).to(device)
    before, main = memory.clone().cpu(), memory[:-1].unflatten(0, (experts, outs))
    found = version.grouped_mm(x.to(device), weight.to(device), sizes)
    back = version.grouped_mm(dy.to(device), weight.to(device).transpose(1, 2), sizes)
    version.grouped_dw_(main, dy.to(device), x.to(device), sizes)
    y, dx = torch.zeros(rows, outs, dtype=torch.float64), torch.zeros(rows, ins, dtype=torch.float64)
    owner = torch.tensor([expert for expert, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)
    total = before.double()
    for expert in range(experts):
        mine = owner == expert
        y[mine] = x[mine].double() @ weight[expert].double().T
        dx[mine] = dy[mine].double() @ weight[expert].double()
        total[expert * outs : (expert + 1) * outs] += dy[mine].double().T @ x[mine].double()
    assert found.dtype == back.dtype == dtype
    assert error(found.cpu(), y) <= TOLERANCE[dtype] and error(back.cpu(), dx) <= TOLERANCE[dtype], f"{seed=}"
    assert error(memory.cpu(), total) <= TOLERANCE[dtype if narrow_sum else wide], f"{seed=}"
    untouched = [e * outs + i for e, size in enumerate(sizes) if not size for i in range(outs)] + [experts * outs]
    assert torch.equal(memory.cpu()[untouched], before[untouched])
