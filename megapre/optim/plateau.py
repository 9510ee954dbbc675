"""Reduce on plateau: the learning rate falls when the validation loss no longer does.

The one part of the learning rate that is no function of the step; its state is in the checkpoint.
"""

from __future__ import annotations

from typing import Any

from megapre.config.schema import ScheduleConfig


class Plateau:
    """A factor of the learning rate; 1 unless ``schedule.kind`` is ``plateau``.

    After more than ``schedule.patience`` validations in a row without a loss below the best one, the factor is
    multiplied by ``schedule.plateau_factor``, down to ``schedule.min_lr_ratio``, and the count begins anew.
    """

    def __init__(self, schedule: ScheduleConfig, state: dict[str, Any]) -> None:
        self.schedule = schedule
        self.factor, self.waited = 1.0, 0
        self.best: float | None = None
        self.load(state)

    def observe(self, loss: float) -> None:
        """Take note of a validation loss."""
        if self.schedule.kind != "plateau":
            return
        if self.best is None or loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.schedule.patience:
            self.factor = max(self.factor * self.schedule.plateau_factor, self.schedule.min_lr_ratio)
            self.waited = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; an empty state is the beginning."""
        self.factor, self.waited = state.get("factor", 1.0), state.get("waited", 0)
        self.best = state.get("best")
