"""The linear layers of a block as one rank runs them."""

from __future__ import annotations

from dataclasses import dataclass

from megapre.planner.job import Job


@dataclass(frozen=True)
class Linear:
    """A linear layer [inputs -> outputs] on this rank's rows, ``groups`` times (experts)."""

    inputs: int
    outputs: int
    rows: float
    groups: int = 1

    @property
    def flops(self) -> float:
        """Of its forward pass."""
        return 2.0 * self.rows * self.inputs * self.outputs * self.groups


def linears(job: Job, tokens: float, moe: bool) -> tuple[list[Linear], list[Linear]]:
    """A block's linear layers on one rank: those of every token, and those of experts."""
    shape, layout = job.shape, job.layout
    t = layout.tensor
    kv = max(shape.kv_width / t, shape.head_dim)
    dense = [
        Linear(shape.hidden, round(shape.q_width / t + 2 * kv), tokens),
        Linear(round(shape.q_width / t), shape.hidden, tokens),
    ]
    up = shape.matrices - 1

    def mlp(width: int, split: int, rows: float, groups: int = 1) -> list[Linear]:
        return [
            Linear(shape.hidden, round(up * width / split), rows, groups),
            Linear(round(width / split), shape.hidden, rows, groups),
        ]

    if not moe:
        return dense + mlp(shape.ffn, t, tokens), []
    if shape.shared_ffn:
        dense += mlp(shape.shared_ffn, t, tokens)
    local = max(1, shape.experts // layout.expert)
    rows = tokens / t * layout.expert * layout.expert_tensor * shape.experts_per_token / shape.experts
    return dense, mlp(shape.expert_ffn, layout.expert_tensor, rows, local)
