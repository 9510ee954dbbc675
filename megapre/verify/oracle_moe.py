"""The oracle's mixture of experts: every expert on every token, masked; choices by repeated argmax, one by one.

Written from the papers and from the definitions in docs/numerics.md, not from the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.config.schema import ModelConfig
from megapre.verify.oracle_block import Weights, mlp


@dataclass
class Ledger:
    """What the routers of the model did in one step."""

    biases: Weights
    """Bias of each expert's score, by block."""
    auxiliary: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sum over sequences and routers of the weighted auxiliary losses."""
    loads: Weights = field(default_factory=dict)
    """By block: choices of each expert."""
    choices: dict[str, list[Tensor]] = field(default_factory=dict)
    """By block: int64 [seq, batch, k] of each microbatch. Of a generator, as ``written``: its text [seq, batch]."""
    balance: float = 0.0
    """Sum over sequences and routers of the load-balance loss, unweighted."""
    z: float = 0.0
    """Likewise of the z-loss."""


def initial_biases(model: ModelConfig) -> Weights:
    """Zeros for every block that balances by biases."""
    layers = [n for n in range(1, model.layers + 1) if model.has_experts(n)] if model.router_bias else []
    return {f"blocks.{n - 1}.mlp": torch.zeros(model.experts, dtype=torch.float64) for n in layers}


def move_biases(ledger: Ledger, rate: float) -> None:
    """An expert with fewer choices than the mean gains ``rate``, one with more loses it (arXiv 2408.15664)."""
    for name, bias in ledger.biases.items():
        for expert, load in enumerate(ledger.loads[name].tolist()):
            mean = float(ledger.loads[name].sum()) / len(bias)
            bias[expert] += rate * ((load < mean) - (load > mean))


def apply(model: ModelConfig, w: Weights, name: str, x: Tensor, ledger: Ledger | None) -> Tensor:
    """The MLP of block ``name``: [seq, batch, hidden] to the same. Without ``ledger`` as the trained model: no drop."""
    length = x.shape[0]
    logits = x @ w[f"{name}.router.weight"].T
    scores = torch.softmax(logits, -1) if model.router_scores == "softmax" else torch.sigmoid(logits)
    bias = None if ledger is None else ledger.biases.get(name)
    picks = choose(scores.detach() if bias is None else scores.detach() + bias, model.experts_per_token)
    picked = torch.stack([scores.gather(-1, pick.unsqueeze(-1)).squeeze(-1) for pick in picks])  # [k, seq, batch]
    if model.router_normalize:
        picked = picked / picked.sum(0)
    gates = picked * model.router_scale
    if ledger is not None:
        _record(model, ledger, name, logits, scores, picks)
        if model.capacity_factor:
            capacity = math.ceil(round(model.capacity_factor * model.experts_per_token * length / model.experts, 6))
            gates = gates * _served(picks, model.experts, capacity)
    out = torch.zeros_like(x)
    for expert in range(model.experts):
        mine = torch.stack([(pick == expert).double() for pick in picks])
        out = out + (gates * mine).sum(0).unsqueeze(-1) * mlp(model, w, f"{name}.experts.{expert}", x)
    if model.shared_experts:
        out = out + mlp(model, w, f"{name}.shared", x)
    return out


def choose(scores: Tensor, k: int) -> list[Tensor]:
    """The best expert of every token, the best of the others, and so on; the lower number of equal ones."""
    left = scores.clone()
    picks = []
    for _ in range(k):
        best = (left == left.max(-1, keepdim=True).values).double().argmax(-1)
        picks.append(best)
        left.scatter_(-1, best.unsqueeze(-1), -math.inf)
    return picks


def _record(
    model: ModelConfig, ledger: Ledger, name: str, logits: Tensor, scores: Tensor, picks: list[Tensor]
) -> None:
    length, batch, experts = scores.shape
    ledger.choices.setdefault(name, []).append(torch.stack(picks, -1))
    taken = sum((F.one_hot(pick, experts) for pick in picks), torch.zeros(1, dtype=torch.int64))
    ledger.loads[name] = ledger.loads.get(name, torch.zeros(experts)) + taken.sum((0, 1))
    shares = scores / scores.sum(-1, keepdim=True)
    for sequence in range(batch):
        fraction = taken[:, sequence].double().sum(0) / (model.experts_per_token * length)
        balance = experts * (fraction * shares[:, sequence].mean(0)).sum()
        z = (logits[:, sequence].exp().sum(-1).log() ** 2).mean()
        ledger.auxiliary = ledger.auxiliary + model.router_aux_loss * balance + model.router_z_loss * z
        ledger.balance += float(balance.detach())
        ledger.z += float(z.detach())


def _served(picks: list[Tensor], experts: int, capacity: int) -> Tensor:
    """1 where an expert still has room when the sequence is read token by token, choice by choice, else 0."""
    length, batch = picks[0].shape
    served = torch.zeros(len(picks), length, batch, dtype=torch.float64)
    for sequence in range(batch):
        room = [capacity] * experts
        for token in range(length):
            for choice, pick in enumerate(picks):
                expert = int(pick[token, sequence])
                if room[expert]:
                    room[expert] -= 1
                    served[choice, token, sequence] = 1
    return served
