"""Going back: what may ask a run for it, and to which checkpoint it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megapre.checkpoint import store
from megapre.checkpoint.store import Sync
from megapre.data.loader import Counts, StepBatch, batch_number
from megapre.training.step import StepResult


@dataclass(frozen=True)
class Trouble:
    """Why the run must go back: to a checkpoint of step ``first`` or before, without the batches of ``skip``."""

    first: int
    skip: range
    """Steps whose batches are left out; empty: all are run again."""
    reason: str
    fatal: bool = False
    """Whether the run cannot go on where no checkpoint is old enough."""


class Watcher(Protocol):
    """Who judges the steps of a run (``resilience/guard.py``); all ranks call it together and hear the same."""

    def observe(self, result: StepResult, batch: StepBatch, counts: Counts) -> Trouble | None:
        """Judge a step, one step late."""

    def verify(self, step: int) -> Trouble | None:
        """Judge the weights after ``step`` steps."""

    def due(self, step: int) -> bool:
        """Whether `verify` is."""

    def state(self) -> dict[str, Any]:
        """Plain JSON for a checkpoint."""

    def load(self, state: dict[str, Any], step: int) -> None:
        """Continue after ``step`` steps from ``state``."""


def checkpoint_before(root: Path, step: int, rank: int, sync: Sync, say: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint of ``step`` or before, on all ranks; later ones hold the trouble and are removed."""
    found = ""
    if rank == 0:
        newest = store.newest_valid(root, log=say, at_most=step)
        if newest:
            found = str(newest)
            store.remove_after(root, step)
    found = sync.broadcast_text(found if rank == 0 else None)
    return Path(found) if found else None


def batches_of(steps: range, skipped: Sequence[int]) -> list[int]:
    """Numbers of the batches that ``steps`` ran while ``skipped`` were left out."""
    return [batch_number(step, skipped) for step in steps]


def skipped_batches(state: dict[str, Any], wanted: Sequence[int]) -> list[int]:
    """The batches a resumed run leaves out: its checkpoint's and the job's.

    ValueError when the job leaves out one that the run has consumed: the others would move, and one of them be lost.
    """
    before = state.get("skipped_batches", [])
    passed = batch_number(state.get("step", 0), before)
    late = sorted(number for number in set(wanted) - set(before) if number < passed)
    if late:
        raise ValueError(
            f"data.skip_batches holds batch {late[0]}, but the checkpoint of step {state['step']} has passed batch "
            f"{passed - 1}: resume from an earlier checkpoint or drop it"
        )
    return sorted({*before, *wanted})
