"""Dynamic loss scaling for fp16 (arXiv 1710.03740), kept on the device so that no step waits for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from megapre.config.schema import PrecisionConfig


class LossScale:
    """``value`` halves after a step with a non-finite gradient and doubles after ``growth_interval`` finite ones.

    For every other number format it is 1 for good.
    """

    LEAST = 2.0**-24

    def __init__(self, precision: PrecisionConfig, device: torch.device) -> None:
        self.dynamic = precision.dtype == "fp16"
        self.interval = precision.growth_interval
        wide = torch.float64 if precision.dtype == "fp64" else torch.float32
        self.value = torch.tensor(precision.initial_loss_scale if self.dynamic else 1.0, dtype=wide, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, overflow: Tensor) -> None:
        """Adapt to the step just taken; ``overflow`` is 1 where it was skipped."""
        if not self.dynamic:
            return
        bad = overflow.bool()
        count = torch.where(bad, 0, self.finite_steps + 1)
        grow = count >= self.interval
        factor = torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
        self.value.mul_(factor).clamp_(min=self.LEAST, max=2.0**32)
        self.finite_steps.copy_(torch.where(grow, 0, count))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": float(self.value), "finite_steps": int(self.finite_steps)}

    def load(self, state: dict[str, float]) -> None:
        """Continue from ``state``."""
        self.value.fill_(state["value"])
        self.finite_steps.fill_(int(state["finite_steps"]))
