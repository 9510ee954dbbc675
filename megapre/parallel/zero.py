"""How weights and gradients live on the replicas: whole, or sharded (ZeRO, arXiv 1910.02054).

The executor says which layer it enters and leaves, and when a layer's gradients of a microbatch are complete; from
this alone buckets are gathered ahead of their use, freed, and reduced. There are no autograd hooks. All replicas run
the same plan, so they post the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megapre.parallel.comm import Axis, Work
from megapre.parallel.grid import Grid
from megapre.parallel.layout import Bucket, Layout
from megapre.parallel.offload import Home


@dataclass(frozen=True)
class Partition:
    """Which part of every bucket is whose."""

    layout: Layout
    grid: Grid
    zero: int
    used: dict[int, list[int]] = field(init=False)
    """Layer -> numbers of the buckets that it uses."""

    def __post_init__(self) -> None:
        numbered = list(enumerate(self.layout.buckets))
        used = {layer: [i for i, bucket in numbered if layer in bucket.layers] for layer in self.layout.held}
        object.__setattr__(self, "used", used)

    def replicas(self, bucket: Bucket) -> Axis:
        """The ranks that hold the same weights as this one, over which ``bucket`` is reduced and sharded."""
        axis: Axis = getattr(self.grid, bucket.replicas)
        return axis

    def share(self, bucket: Bucket) -> slice:
        """Part of ``bucket`` that this rank speaks for among its replicas."""
        axis = self.replicas(bucket)
        return bucket.shard(axis.rank, axis.size)

    def shard(self, bucket: Bucket) -> slice:
        """Part of ``bucket`` that this rank's optimizer updates."""
        return self.share(bucket) if self.zero else slice(0, bucket.size)


class Room:
    """A flat tensor whose memory can be given back and taken again; its views stay, and must not be read meanwhile."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(count, dtype=dtype, device=device)
        self._storage, self._bytes = self.tensor.untyped_storage(), self.tensor.nbytes
        self.held = True

    def take(self) -> None:
        """Have memory, of unknown contents when it is new."""
        if not self.held:
            self._storage.resize_(self._bytes)
            self.held = True

    def free(self) -> None:
        """Give the memory back."""
        self._storage.resize_(0)
        self.held = False

    @contextmanager
    def present(self) -> Iterator[Tensor]:
        """The tensor, with memory inside the block."""
        held = self.held
        self.take()
        yield self.tensor
        if not held:
            self.free()


class WholeWeights:
    """Every replica holds all weights (ZeRO-0, 1, 2).

    After an update the replicas' shards are gathered, in the order in which forward reads them; a layer that is entered
    waits for its own buckets alone.
    """

    def __init__(self, partition: Partition, dtype: torch.dtype, home: Home) -> None:
        self._partition, self.home = partition, home
        self.rooms = [Room(bucket.size, dtype, home.device) for bucket in partition.layout.buckets]
        for room in self.rooms:
            room.tensor.zero_()
        self.shards = [
            room.tensor[partition.shard(bucket)] for room, bucket in zip(self.rooms, partition.layout.buckets)
        ]
        self._under_way: dict[int, Work] = {}

    def begin(self, visits: Sequence[int]) -> None:
        """Nothing is prepared."""

    def enter(self, layer: int) -> None:
        """Return when the weights of ``layer`` are those of the last update."""
        for index in self._partition.used[layer]:
            self._arrive(index)

    def leave(self, layer: int) -> None:
        """Nothing is freed."""

    def publish(self) -> None:
        """Shards have been updated: let the replicas have them."""
        self.settle()
        if not self._partition.zero:
            return
        buckets = self._partition.layout.buckets
        for index in sorted(range(len(buckets)), key=lambda i: (min(buckets[i].layers), i)):
            axis = self._partition.replicas(buckets[index])
            self._under_way[index] = axis.all_gather(self.rooms[index].tensor, self.shards[index])

    def settle(self) -> None:
        """Return when nothing is under way."""
        for index in list(self._under_way):
            self._arrive(index)

    @contextmanager
    def filling(self, index: int) -> Iterator[Tensor]:
        """A bucket of zeros, to be given its first values."""
        yield self.rooms[index].tensor.zero_()

    @contextmanager
    def whole(self, index: int) -> Iterator[Tensor]:
        """All of a bucket; the replicas enter together."""
        self._arrive(index)
        yield self.rooms[index].tensor

    def _arrive(self, index: int) -> None:
        if index in self._under_way:
            self._under_way.pop(index).wait()


class ShardedWeights:
    """Every replica holds its shard; a bucket is whole only around its use (ZeRO-3).

    While a layer computes, the buckets of the next visit are gathered: two layers are whole at most. What one of the
    next two visits uses is kept, since the second is gathered as soon as the first begins.
    """

    def __init__(self, partition: Partition, dtype: torch.dtype, device: torch.device, home: Home) -> None:
        self._partition, self.home = partition, home
        self._buckets = partition.layout.buckets
        self.shards = [home.zeros(_length(partition.shard(bucket)), dtype) for bucket in self._buckets]
        self.rooms = []
        for bucket in self._buckets:
            self.rooms.append(Room(bucket.size, dtype, device))
            self.rooms[-1].free()
        self._gathering: dict[int, Work] = {}
        self._visits: Sequence[int] = ()
        self._at = 0

    def begin(self, visits: Sequence[int]) -> None:
        """``visits``: the layers of the coming plan in the order in which it enters them."""
        assert self._at == len(self._visits), "the last plan was left undone"
        self._visits, self._at = visits, 0
        for layer in visits[:1]:
            self._gather(layer)

    def enter(self, layer: int) -> None:
        """Return when the weights of ``layer`` are here; those of the next visit travel meanwhile."""
        assert self._visits[self._at] == layer, "the plan goes another way than announced"
        for after in self._visits[self._at + 1 : self._at + 2]:
            self._gather(after)
        for index in self._partition.used[layer]:
            if index in self._gathering:
                self._gathering.pop(index).wait()

    def leave(self, layer: int) -> None:
        """Free what the next two visits do not use."""
        self._at += 1
        kept = {index for after in self._visits[self._at : self._at + 2] for index in self._partition.used[after]}
        for index in self._partition.used[layer]:
            if index not in kept:
                self.rooms[index].free()

    def publish(self) -> None:
        """Shards have been updated: the next plan's first visit gathers them."""

    def settle(self) -> None:
        """Between plans nothing is under way."""

    @contextmanager
    def filling(self, index: int) -> Iterator[Tensor]:
        """A bucket of zeros, to be given its first values, of which the shard stays."""
        with self.rooms[index].present() as whole:
            yield whole.zero_()
            self.shards[index].copy_(whole[self._partition.shard(self._buckets[index])])

    @contextmanager
    def whole(self, index: int) -> Iterator[Tensor]:
        """All of a bucket; the replicas enter together."""
        with self.rooms[index].present() as whole:
            self._post(index).wait()
            yield whole

    def _gather(self, layer: int) -> None:
        for index in self._partition.used[layer]:
            if not self.rooms[index].held:
                self._gathering[index] = self._post(index)

    def _post(self, index: int) -> Work:
        bucket, room = self._buckets[index], self.rooms[index]
        room.take()
        axis, part = self._partition.replicas(bucket), self._partition.shard(bucket)
        return self.home.gather(axis, room.tensor, part, self.shards[index])


class WholeGradients:
    """Every replica accumulates whole main gradients over the microbatches; a bucket is reduced once (ZeRO-0, 1)."""

    def __init__(self, partition: Partition, dtype: torch.dtype, device: torch.device) -> None:
        self._partition, self._grid = partition, partition.grid
        self._buckets = partition.layout.buckets
        self.rooms = [Room(bucket.size, dtype, device) for bucket in self._buckets]
        self.shards = [room.tensor[partition.shard(bucket)] for room, bucket in zip(self.rooms, self._buckets)]
        self._waiting: list[set[int]] = []
        self._sums: list[list[Work]] = []
        self._reductions: list[Work] = []

    def begin(self) -> None:
        """Forget the last step's gradients; every layer is expected to report its last microbatch."""
        for room in self.rooms:
            room.tensor.zero_()
        self._waiting = [set(bucket.layers) for bucket in self._buckets]
        self._sums = [[] for _ in self._buckets]
        self._reductions = []

    def open(self, layer: int) -> None:
        """Gradients of ``layer`` are about to be added."""

    def close(self, layer: int, last: bool) -> None:
        """A microbatch's gradients of ``layer`` are in; after the ``last`` start what can be reduced."""
        if not last:
            return
        for index in self._partition.used[layer]:
            bucket, whole = self._buckets[index], self.rooms[index].tensor
            self._waiting[index].remove(layer)
            self._sums[index] += _partial_sums(self._grid, bucket, whole, layer=layer)
            if self._waiting[index]:
                continue
            if not bucket.tied:  # other stages may be many microbatches away
                self._reductions.append(self._reduce(index))

    def finish(self) -> None:
        """Return when every gradient that this rank's optimizer reads is complete."""
        assert not any(self._waiting), f"layers never reported: {self._waiting}"
        tied = _tied_order(self._buckets)
        for index in tied:
            for work in self._sums[index]:
                work.wait()
            self._sums[index] = [self._grid.tied[self._buckets[index].tied].all_reduce(self.rooms[index].tensor)]
        self._reductions += [self._reduce(index) for index in tied]
        for work in self._reductions:
            work.wait()

    def _reduce(self, index: int) -> Work:
        for work in self._sums[index]:
            work.wait()
        axis, whole = self._partition.replicas(self._buckets[index]), self.rooms[index].tensor
        if not self._partition.zero:
            return axis.all_reduce(whole)
        return axis.reduce_scatter(self.shards[index], whole)


class ShardedGradients:
    """Every replica keeps the main gradients of its shard (ZeRO-2, 3).

    A whole buffer exists from a layer's backward of one microbatch until the next layer's is done: by then it is
    reduced, and it is added to the shard, in the order of the plan, so that sums are the same in every run. Two layers
    are whole at most. What other axes sum is summed once a step, over shards.
    """

    def __init__(self, partition: Partition, dtype: torch.dtype, device: torch.device) -> None:
        self._partition, self._grid = partition, partition.grid
        self._buckets = partition.layout.buckets
        lengths = [_length(partition.shard(bucket)) for bucket in self._buckets]
        self.shards = [torch.zeros(length, dtype=dtype, device=device) for length in lengths]
        self.rooms = []
        for bucket in self._buckets:
            self.rooms.append(Room(bucket.size, dtype, device))
            self.rooms[-1].free()
        self._waiting: list[set[int]] = []
        self._under_way: list[tuple[int, Work, bool]] = []
        self._sums: list[Work] = []

    def begin(self) -> None:
        """Forget the last step's gradients; every layer is expected to report its last microbatch."""
        for shard in self.shards:
            shard.zero_()
        self._waiting = [set(bucket.layers) for bucket in self._buckets]
        self._sums = []

    def open(self, layer: int) -> None:
        """Make room for a microbatch's gradients of ``layer``."""
        mine = self._partition.used[layer]
        if any(index in mine for index, *_ in self._under_way):  # the same layer twice in a row
            self._land()
        for index in mine:
            self.rooms[index].take()
            self.rooms[index].tensor.zero_()

    def close(self, layer: int, last: bool) -> None:
        """A microbatch's gradients of ``layer`` are in: send them off, and take in those sent before."""
        posted = []
        for index in self._partition.used[layer]:
            bucket, whole = self._buckets[index], self.rooms[index].tensor
            own = whole[self._partition.shard(bucket)]
            if last:
                self._waiting[index].remove(layer)
            work = self._partition.replicas(bucket).reduce_scatter(own, whole)
            posted.append((index, work, not self._waiting[index]))
        self._land()
        self._under_way = posted

    def finish(self) -> None:
        """Return when every gradient that this rank's optimizer reads is complete."""
        self._land()
        assert not any(self._waiting), f"layers never reported: {self._waiting}"
        for work in self._sums:
            work.wait()
        tied = _tied_order(self._buckets)
        works = [self._grid.tied[self._buckets[index].tied].all_reduce(self.shards[index]) for index in tied]
        for work in works:
            work.wait()

    def _land(self) -> None:
        """Add what is under way to the shards and free its room."""
        for index, work, complete in self._under_way:
            work.wait()
            bucket, shard = self._buckets[index], self.shards[index]
            part = self._partition.shard(bucket)
            shard.add_(self.rooms[index].tensor[part])
            self.rooms[index].free()
            if complete:
                self._sums += _partial_sums(self._grid, bucket, shard, first=part.start)
        self._under_way = []


Weights = WholeWeights | ShardedWeights
Gradients = WholeGradients | ShardedGradients


def _tied_order(buckets: Sequence[Bucket]) -> list[int]:
    """Numbers of the buckets that other stages hold too, in the one order in which all stages sum them.

    Stages complete them in different orders, and a communicator matches its operations by their order.
    """
    tied = [index for index, bucket in enumerate(buckets) if bucket.tied]
    return sorted(tied, key=lambda index: (buckets[index].tied, buckets[index].slots[0].spec.name))


def _length(part: slice) -> int:
    return part.stop - part.start


def _partial_sums(
    grid: Grid, bucket: Bucket, tensor: Tensor, *, first: int = 0, layer: int | None = None
) -> list[Work]:
    """Start the sums over other axes than the replicas of what is partial in ``tensor``.

    ``tensor`` holds the elements of ``bucket`` from ``first`` on. With ``layer``, only what that layer completes.
    """
    works = []
    for axis, start, stop in _partial_runs(bucket, layer):
        a, b = max(start - first, 0), min(stop - first, tensor.numel())
        if a < b:
            works.append(getattr(grid, axis).all_reduce(tensor[a:b]))
    return works


def _partial_runs(bucket: Bucket, layer: int | None) -> list[tuple[str, int, int]]:
    """Neighbours that one axis must sum: its name and their range inside the bucket, padding between them included."""
    runs: list[tuple[str, int, int]] = []
    before = None
    for slot in bucket.slots:
        mine = slot.partial and layer in (None, slot.layer)
        place = bucket.place(slot)
        if mine and before == slot.partial:
            runs[-1] = (slot.partial, runs[-1][1], place.stop)
        elif mine:
            runs.append((slot.partial, place.start, place.stop))
        before = slot.partial if mine else None
    return runs
