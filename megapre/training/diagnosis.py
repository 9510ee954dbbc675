"""Whose gradient it was: the batch's gradients on each rank, before anything is summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from megapre.data.loader import Counts, StepBatch
from megapre.parallel.buckets import Buffers
from megapre.training.step import TrainStep


class _Own:
    """The executor's memory without its reductions; notes what is not finite as each layer completes."""

    def __init__(self, flat: Buffers) -> None:
        self.flat = flat
        self.found: dict[str, None] = {}

    def begin(self, visits: Sequence[int]) -> None:
        self.flat.begin(visits)

    def enter(self, layer: int) -> None:
        self.flat.enter(layer)

    def leave(self, layer: int) -> None:
        self.flat.leave(layer)

    def open(self, layer: int) -> None:
        self.flat.open(layer)

    def close(self, layer: int, last: bool) -> None:
        for index in self.flat.partition.used[layer]:
            bucket, room = self.flat.layout.buckets[index], self.flat.gradients.rooms[index]
            if not bool(room.tensor.isfinite().all()):
                places = ((slot.spec.name, bucket.place(slot)) for slot in bucket.slots)
                self.found.update((name, None) for name, part in places if not bool(room.tensor[part].isfinite().all()))
            if self.flat.partition.zero >= 2:  # here a bucket is whole from `open` to `close` only
                room.free()


def not_finite(step: TrainStep, batch: StepBatch, counts: Counts) -> list[str]:
    """Tensors of whose gradient this rank's own part is not finite when ``batch`` runs again; ranks call together."""
    own = _Own(step.flat)
    step.own_gradients(batch.microbatches, counts, batch.step, own)
    return list(own.found)
