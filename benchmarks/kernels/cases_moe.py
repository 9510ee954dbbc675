"""The ops of experts that ``run.py`` and ``gpu.py`` time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.setting import BF16, EXACT, Case, Setting, differentiable, zero
from megapre.kernels import registry


def _experts(on: Setting, experts: int, rows: int, outs: int = 1024, ins: int = 512, dtype: torch.dtype = BF16) -> Case:
    """y = x W^T of each expert, dx, and main += dW; eager: a loop of torch's products, dW rounded before the sum."""
    sizes, main = [rows] * experts, torch.zeros(experts, outs, ins, device=on.device)
    x, dy = on.draw(experts * rows, ins, dtype=dtype), on.draw(experts * rows, outs, seed=1, dtype=dtype)
    weight = on.draw(experts, outs, ins, seed=2, dtype=dtype)

    def run(ops: registry.Kernels, x: Tensor, dy: Tensor, weight: Tensor, main: Tensor) -> list[Tensor]:
        y = ops.grouped_mm(x, weight, sizes)
        dx = ops.grouped_mm(dy, weight.transpose(1, 2), sizes)
        ops.grouped_dw_(main, dy, x, sizes)
        return [y, dx, main]

    def loop(x: Tensor, dy: Tensor, weight: Tensor, main: Tensor) -> list[Tensor]:
        pieces = [(a, b, w) for a, b, w in zip(x.split(sizes), dy.split(sizes), weight)]
        y, dx = torch.cat([a @ w.t() for a, _, w in pieces]), torch.cat([b @ w for _, b, w in pieces])
        return [y, dx, main.add_(torch.stack([b.t() @ a for a, b, _ in pieces]))]

    arms = {arm: partial(run, kernels, x, dy, weight, main) for arm, kernels in on.kernels.items()}
    peers = {"eager": loop, "compile": torch.compile(loop, dynamic=False)}
    arms |= {arm: partial(function, x, dy, weight, main) for arm, function in peers.items()}
    wide = [t.double() for t in (x, dy, weight)]
    kind = "bf16" if dtype == BF16 else "fp32"
    return Case(
        f"{experts} experts x {rows} rows, W [{outs}, {ins}] {kind}", arms,
        lambda: run(EXACT, *wide, main.new_zeros(main.shape, dtype=torch.float64)), restore=lambda: zero(main),
    )  # fmt: skip


def experts_many(on: Setting) -> Case:
    return _experts(on, 64, 16, 512, 512)


def experts_some(on: Setting) -> Case:
    return _experts(on, 16, 64)


def experts_few(on: Setting) -> Case:
    return _experts(on, 8, 256)


def _routes(on: Setting, tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = on.draw(tokens, experts, dtype=torch.float32)
    ids = scores.topk(k).indices.flatten()
    order = torch.sort(ids, stable=True).indices
    return scores, order // k, torch.argsort(order).view(tokens, k)


def permute_unpermute(on: Setting) -> Case:
    """Rows to their experts and back with weights, both ways; eager: index_select and a sum over choices."""
    tokens, width, k = 2048, 1024, 2
    _, source, rows = _routes(on, tokens, 16, k)

    def eager(x: Tensor, weights: Tensor) -> Tensor:
        y = x.index_select(0, source)
        found = y.index_select(0, rows.flatten()).view(tokens, k, width)
        return (weights.unsqueeze(2) * found).sum(1).to(x.dtype)

    return differentiable(
        on, "permute_unpermute", f"[{tokens}, {width}] bf16, {k} choices",
        [on.draw(tokens, width), on.draw(tokens, k, seed=1, dtype=torch.float32)],
        lambda kernels, x, w: kernels.unpermute(kernels.permute(x, source, rows), w, source, rows), eager,
    )  # fmt: skip


def top_k(on: Setting) -> Case:
    """Eager: torch.topk, which leaves the order of equal scores open."""
    scores = _routes(on, 4096, 128, 8)[0]
    compiled = torch.compile(lambda x: torch.topk(x, 8).indices, dynamic=False)
    arms: dict[str, Callable] = {arm: lambda k=kernels: [k.top_k(scores, 8)] for arm, kernels in on.kernels.items()}
    arms |= {"eager": lambda: [torch.topk(scores, 8).indices], "compile": lambda: [compiled(scores)]}
    return Case("8 of [4096, 128] fp32", arms, lambda: [EXACT.top_k(scores.double(), 8).double()])
