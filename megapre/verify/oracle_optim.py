"""The optimizers as their papers write them, on whole tensors in fp64: what ``oracle.train`` updates with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megapre.config.schema import OptimizerConfig

Weights = Mapping[str, Tensor]
Update = Callable[[float], None]
"""Moves all weights by their ``grad`` at a learning rate."""


def make(o: OptimizerConfig, weights: Weights, decayed: Mapping[str, bool]) -> Update:
    """The update of ``optimizer.kind``; tensors that are not ``decayed`` have no weight decay."""
    decay = {name: o.weight_decay if decayed[name] else 0.0 for name in weights}
    return {"adamw": _adamw, "lion": _lion, "muon": _muon, "adafactor": _adafactor}[o.kind](o, weights, decay)


def _adamw(o: OptimizerConfig, weights: Weights, decay: Mapping[str, float]) -> Update:
    groups = [{"params": [w], "weight_decay": decay[name]} for name, w in weights.items()]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)

    def update(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    return update


def _lion(o: OptimizerConfig, weights: Weights, decay: Mapping[str, float]) -> Update:
    """Algorithm 2 of arXiv 2302.06675."""
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def update(lr: float) -> None:
        for name, w in weights.items():
            g, m = _gradient(w), momenta[name]
            direction = torch.sign(o.beta1 * m + (1 - o.beta1) * g)
            w -= lr * (direction + decay[name] * w)
            momenta[name] = o.beta2 * m + (1 - o.beta2) * g

    return update


def _muon(o: OptimizerConfig, weights: Weights, decay: Mapping[str, float]) -> Update:
    """Muon for matrices of blocks, with the update's size of arXiv 2502.16982; AdamW for all else."""
    outside = {"embedding", "head", "router"}
    matrices = {
        name: w
        for name, w in weights.items()
        if w.dim() == 2 and name.endswith(".weight") and not outside & set(name.split("."))
    }
    others = _adamw(o, {name: w for name, w in weights.items() if name not in matrices}, decay)
    momenta = {name: torch.zeros_like(w) for name, w in matrices.items()}

    @torch.no_grad()
    def update(lr: float) -> None:
        others(lr)
        for name, w in matrices.items():
            g = _gradient(w)
            momenta[name] = m = o.momentum * momenta[name] + (1 - o.momentum) * g
            x = (1 - o.momentum) * g + o.momentum * m
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            w *= 1 - lr * decay[name]
            w -= lr * 0.2 * math.sqrt(max(w.shape)) * x

    return update


def _adafactor(o: OptimizerConfig, weights: Weights, decay: Mapping[str, float]) -> Update:
    """Algorithms 4 and 5 of arXiv 1804.04235, with decoupled decay."""
    moments: dict[str, tuple[Tensor, Tensor] | Tensor] = {}
    steps = 0

    @torch.no_grad()
    def update(lr: float) -> None:
        nonlocal steps
        steps += 1
        beta = 1 - steps**-0.8
        for name, w in weights.items():
            g = _gradient(w)
            squares = g.square() + 1e-30
            if w.dim() == 2:
                rows, columns = moments.get(name, (0.0, 0.0))
                rows = beta * rows + (1 - beta) * squares.mean(1)
                columns = beta * columns + (1 - beta) * squares.mean(0)
                moments[name] = rows, columns
                v = torch.outer(rows, columns) / rows.mean()
            else:
                moments[name] = v = beta * moments.get(name, 0.0) + (1 - beta) * squares
            u = g / v.sqrt()
            u = u / max(1.0, float(u.square().mean().sqrt()))
            size = max(1e-3, float(w.square().mean().sqrt()))
            w *= 1 - lr * decay[name]
            w -= lr * size * u

    return update


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
