"""Which samples a step reads, and in how long rows, under the ramps of the batch and of the sequence.

A sample is a window of ``model.sequence`` tokens. A shorter row is a part of a window, so the order of windows, the
tokens of a step and every count of samples stay what they are without the sequence ramp. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from megapre.config.schema import Config


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads."""

    first: int
    """Number of its first sample, which is how many have been consumed."""
    samples: int
    """Samples of the global batch."""
    rows: int
    """Rows that each sample is cut into; 1 when the sequence has its full length."""


class Steps:
    """Every step of a run, O(log phases) each: a pure function of the job."""

    def __init__(self, config: Config) -> None:
        train = config.train
        self._table = _phases(train.global_batch, tuple(train.batch_ramp))
        self._starts = [step for step, _, _ in self._table]
        self._ramp = _halvings(config)

    def at(self, step: int) -> Step:
        """Step ``step``, from 0."""
        begun, first, batch = self._table[bisect_right(self._starts, step) - 1]
        first += (step - begun) * batch
        rows = next((rows for until, rows in self._ramp if first < until), 1)
        return Step(first, batch, rows)

    def step_of(self, sample: int) -> int:
        """The step that reads ``sample``."""
        begun, first, batch = next(phase for phase in reversed(self._table) if phase[1] <= sample)
        return begun + (sample - first) // batch

    def batches(self) -> list[int]:
        """Batch sizes that occur, ascending."""
        return [batch for _, _, batch in self._table]

    def row_counts(self) -> list[int]:
        """Cuts that occur, descending to 1."""
        return [*(rows for _, rows in self._ramp), 1]


@lru_cache(maxsize=8)
def _phases(final: int, ramp: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first step, first sample, batch) of every batch size, as Megatron's --rampup-batch-size START INCREMENT SAMPLES.

    The samples of the ramp are shared equally among the sizes below the final one; a size is left at the first step
    that begins at or behind the end of its share.
    """
    if not ramp:
        return [(0, 0, final)]
    start, increment, samples = ramp
    count = (final - start) // increment
    table, step, sample = [], 0, 0
    for number in range(count):
        end = samples * (number + 1) // count
        if sample < end:
            batch = start + number * increment
            table.append((step, sample, batch))
            steps = -(-(end - sample) // batch)
            step, sample = step + steps, sample + steps * batch
    return [*table, (step, sample, final)]


def _halvings(config: Config) -> list[tuple[int, int]]:
    """(sample where it ends, rows per window) of each length below the full one, from the shortest."""
    if not config.train.sequence_ramp:
        return []
    start, samples = config.train.sequence_ramp
    rows = config.model.sequence // start
    count = rows.bit_length() - 1
    return [(samples * (number + 1) // count, rows >> number) for number in range(count)]


def clock(config: Config, step: int) -> int:
    """Place of the beginning of ``step`` in the unit of ``schedule.unit``: steps, samples or tokens."""
    if config.schedule.unit == "steps":
        return step
    consumed = Steps(config).at(step).first
    return consumed * (config.model.sequence if config.schedule.unit == "tokens" else 1)
