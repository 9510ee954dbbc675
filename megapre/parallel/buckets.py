"""The flat memory of a rank's parameters and main gradients, and the reduction that fills bucket by bucket.

A weight gradient has one home: layers add it straight into ``main_grad`` (fp32, or fp64 under fp64), and
``.grad`` stays None. The executor calls :meth:`Buffers.layer_done` after a layer's last microbatch; the
reduction of every bucket that this completes starts at once, beside the backward of earlier layers.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from megapre.parallel.comm import Axis, Work
from megapre.parallel.grid import Grid
from megapre.parallel.layout import Bucket, Layout, Slot
from megapre.parallel.weight_queue import WeightQueue


class Buffers:
    """Parameters and gradients of one rank, in the order of ``layout``.

    Parameters are views of ``weights`` with an attribute ``main_grad``, a view of ``gradients``, and ``queue``, where
    linear layers hand in the products that make up their weight gradients.
    """

    def __init__(self, layout: Layout, grid: Grid, dtype: torch.dtype, device: torch.device, zero: int) -> None:
        self.layout, self.grid, self.zero = layout, grid, zero
        self.weights = torch.zeros(layout.total, dtype=dtype, device=device)
        self.gradients = torch.zeros(layout.total, dtype=gradient_dtype(dtype), device=device)
        self.queue = WeightQueue()
        self.slots = {slot.spec.name: slot for slot in layout.slots}
        self._waiting: dict[int, set[int]] = {}
        self._sums: list[Work] = []
        self._ties: list[Work] = []
        self._reductions: list[Work] = []

    def parameter(self, *names: str) -> nn.Parameter:
        """The parameter that spans the named neighbours, concatenated along dimension 0."""
        slots = [self.slots[name] for name in names]
        assert all(a.end == b.start for a, b in pairwise(slots)), f"{names} are not adjacent"
        start, end = slots[0].start, slots[-1].end
        shape = (sum(slot.shape[0] for slot in slots), *slots[0].shape[1:])
        parameter = nn.Parameter(self.weights[start:end].view(shape))
        parameter.main_grad = self.gradients[start:end].view(shape)  # type: ignore[attr-defined]
        parameter.queue = self.queue  # type: ignore[attr-defined]
        return parameter

    def replicas(self, bucket: Bucket) -> Axis:
        """The ranks that hold the same weights as this one, over which ``bucket`` is reduced and sharded."""
        axis: Axis = getattr(self.grid, bucket.replicas)
        return axis

    def share(self, bucket: Bucket) -> tuple[int, int]:
        """Flat range of ``bucket`` that this rank speaks for among its replicas."""
        axis = self.replicas(bucket)
        return bucket.shard(axis.rank, axis.size)

    def shard(self, bucket: Bucket) -> tuple[int, int]:
        """Flat range of ``bucket`` that this rank's optimizer updates."""
        return self.share(bucket) if self.zero else (bucket.start, bucket.end)

    def start_step(self) -> None:
        """Forget the last step's gradients; every layer is expected to report once."""
        self.gradients.zero_()
        self._waiting = {
            i: {layer for slot in bucket.slots for layer in slot.spec.layers if layer in self.layout.held}
            for i, bucket in enumerate(self.layout.buckets)
        }
        self._sums, self._ties, self._reductions = [], [], []

    def layer_done(self, layer: int) -> None:
        """The last microbatch's gradients of ``layer`` are in: start what can be reduced."""
        sums = [work for run, axis in self._partial_runs(layer) for work in [axis.all_reduce(self.gradients[run])]]
        for index, waiting in self._waiting.items():
            bucket = self.layout.buckets[index]
            if layer not in waiting:
                continue
            waiting.remove(layer)
            if waiting:
                continue
            if bucket.tied:  # the other stage may be many microbatches away: sum now, reduce in finish()
                self._ties.append(self.grid.tied.all_reduce(self.gradients[bucket.start : bucket.end]))
                continue
            for work in self._sums + sums:
                work.wait()
            self._sums, sums = [], []
            self._reductions.append(self._reduce(bucket))
        self._sums += sums

    def finish(self) -> None:
        """Return when every gradient that this rank's optimizer reads is complete."""
        assert not any(self._waiting.values()), f"layers never reported: {self._waiting}"
        for work in self._sums + self._ties:
            work.wait()
        self._reductions += [self._reduce(bucket) for bucket in self.layout.buckets if bucket.tied]
        for work in self._reductions:
            work.wait()

    def gather_weights(self) -> None:
        """Under ZeRO, give every data rank the weights that the others have updated."""
        if not self.zero:
            return
        works = []
        for bucket in self.layout.buckets:
            start, end = self.shard(bucket)
            whole = self.weights[bucket.start : bucket.end]
            works.append(self.replicas(bucket).all_gather(whole, self.weights[start:end]))
        for work in works:
            work.wait()

    def _reduce(self, bucket: Bucket) -> Work:
        whole = self.gradients[bucket.start : bucket.end]
        if not self.zero:
            return self.replicas(bucket).all_reduce(whole)
        start, end = self.shard(bucket)
        return self.replicas(bucket).reduce_scatter(self.gradients[start:end], whole)

    def _partial_runs(self, layer: int) -> list[tuple[slice, Axis]]:
        """Neighbouring slots of ``layer`` whose gradients the same axis must sum."""
        runs: list[tuple[slice, str]] = []
        for slot in self.layout.slots:
            if slot.layer != layer or not slot.partial:
                continue
            if runs and runs[-1][1] == slot.partial and self._adjacent(runs[-1][0].stop, slot):
                runs[-1] = (slice(runs[-1][0].start, slot.end), slot.partial)
            else:
                runs.append((slice(slot.start, slot.end), slot.partial))
        return [(run, getattr(self.grid, axis)) for run, axis in runs]

    def _adjacent(self, end: int, slot: Slot) -> bool:
        """Whether only padding lies between ``end`` and ``slot``."""
        return not any(end <= other.start < slot.start for other in self.layout.slots)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Number format of main gradients, master weights and moments."""
    return torch.float64 if dtype == torch.float64 else torch.float32
