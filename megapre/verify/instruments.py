"""Stand-ins for ``Axis`` that are stricter, slower or more talkative than the real ones.

A layout that agrees with the oracle under these is right for reasons, not by luck of timing: gloo forgives what
NCCL does not.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from megapre.parallel.comm import Around, Axis, Work
from megapre.parallel.grid import Grid
from megapre.parallel.layout import Bucket

PATIENCE = 60.0
"""Seconds until an operation that nobody answers is called a deadlock."""


def poison(tensor: Tensor) -> None:
    """Fill with NaN, or with the type's largest number."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


class FifoAxis(Around):
    """An axis as strict as an NCCL communicator on its own stream.

    One thread runs one operation at a time to its end, in the order of posting, so a message that nobody answers
    holds up all that was posted after it. A result that is read before ``wait()`` is poison.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis)
        self._queue: SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self._queue,), daemon=True).start()

    def __del__(self) -> None:
        self._queue.put(None)

    def _post(self, operation: Callable[[Tensor], Work], result: Tensor | None) -> Work:
        """Queue ``operation``; it works on a copy of ``result`` that ``wait`` puts back."""
        scratch = torch.empty(0)
        if result is not None:
            scratch = result.clone()
            poison(result)
        finished = threading.Event()
        self._queue.put((lambda: (operation(scratch).wait(), None)[1], finished))
        return _Queued(finished, result, scratch)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        return self._post(lambda x: self.inner.all_reduce(x, op), tensor)

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        source = shard.clone()
        return self._post(lambda x: self.inner.all_gather(x, source), output)

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis. The input lies around ``shard`` in ZeRO's buffers: it is copied before the poison falls."""
        source = tensor.clone()
        return self._post(lambda x: self.inner.reduce_scatter(x, source), shard)

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        source = tensor.clone()
        return self._post(lambda x: self.inner.all_to_all(x, source, received, sent), output)

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis; reads ``tensor`` when its turn comes, so it must live until then."""
        return self._post(lambda _: self.inner.send(tensor, to), None)

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        return self._post(lambda x: self.inner.recv(x, source), tensor)

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        return self._post(lambda x: self.inner.exchange(tensor, to, x, source), received)


def _serve(queue: SimpleQueue[tuple[Callable[[], None], threading.Event] | None]) -> None:
    """Run what is queued, in order, until the axis is gone. Holds no axis, or none would ever go."""
    while (item := queue.get()) is not None:
        operation, finished = item
        operation()
        finished.set()
        del item, operation


class _Queued:
    def __init__(self, finished: threading.Event, result: Tensor | None, scratch: Tensor) -> None:
        self.finished, self.result, self.scratch = finished, result, scratch

    def wait(self) -> None:
        """Let the queue come to this operation, then show its result."""
        if not self.finished.wait(timeout=PATIENCE):
            raise RuntimeError("an operation was never answered: this order of messages deadlocks on NCCL")
        if self.result is not None:
            self.result.copy_(self.scratch)
            self.result = None


class DelayedAxis(FifoAxis):
    """A FIFO axis on which every operation also takes a random time, drawn from a seed."""

    def __init__(self, axis: Axis, seed: int) -> None:
        self._random = random.Random(f"{seed}/{axis.name}/{axis.rank}")
        super().__init__(axis)

    def _post(self, operation: Callable[[Tensor], Work], result: Tensor | None) -> Work:
        pause = self._random.expovariate(1 / 0.001)

        def late(x: Tensor) -> Work:
            time.sleep(min(pause, 0.02))
            return operation(x)

        return super()._post(late, result)


class CountingAxis(Around):
    """Counts the bytes that this rank hands to each kind of operation, as (kind, bytes of its whole tensor)."""

    def __init__(self, axis: Axis, counts: dict[str, int]) -> None:
        super().__init__(axis)
        self.counts = counts

    def _count(self, kind: str, tensor: Tensor) -> None:
        if self.size > 1:
            key = f"{self.name}/{kind}"
            self.counts[key] = self.counts.get(key, 0) + tensor.nbytes

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        self._count("all_reduce", tensor)
        return self.inner.all_reduce(tensor, op)

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        self._count("all_gather", output)
        return self.inner.all_gather(output, shard)

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis."""
        self._count("reduce_scatter", tensor)
        return self.inner.reduce_scatter(shard, tensor)

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        self._count("all_to_all", tensor)
        return self.inner.all_to_all(output, tensor, received, sent)

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis."""
        self._count("send", tensor)
        return self.inner.send(tensor, to)

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        self._count("recv", tensor)
        return self.inner.recv(tensor, source)

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        self._count("exchange", tensor)
        return self.inner.exchange(tensor, to, received, source)


class FlippingAxis(Around):
    """Flips one bit of one result on one rank: what a broken link or memory cell does.

    ``flip`` picks by (kind of operation, number of the call, elements) the (element, bit) to flip, or None.
    """

    def __init__(self, axis: Axis, flip: Callable[[str, int, int], tuple[int, int] | None]) -> None:
        super().__init__(axis)
        self._flip, self._calls = flip, 0

    def _watch(self, kind: str, result: Tensor, work: Work) -> Work:
        self._calls += 1
        chosen = self._flip(f"{self.name}/{kind}", self._calls, result.numel())
        return work if chosen is None else _Flipped(work, result, *chosen)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        return self._watch("all_reduce", tensor, self.inner.all_reduce(tensor, op))

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        return self._watch("all_gather", output, self.inner.all_gather(output, shard))

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis."""
        return self._watch("reduce_scatter", shard, self.inner.reduce_scatter(shard, tensor))

    def all_to_all(self, output: Tensor, tensor: Tensor, *rows: Any) -> Work:
        """As Axis."""
        return self._watch("all_to_all", output, self.inner.all_to_all(output, tensor, *rows))

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis."""
        return self.inner.send(tensor, to)

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        return self._watch("recv", tensor, self.inner.recv(tensor, source))

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        return self._watch("exchange", received, self.inner.exchange(tensor, to, received, source))


class _Flipped:
    def __init__(self, work: Work, result: Tensor, element: int, bit: int) -> None:
        self.work, self.result, self.element, self.bit = work, result, element, bit

    def wait(self) -> None:
        """Wait, then flip the bit."""
        self.work.wait()
        size = self.result.element_size()
        data = self.result.view(-1)[self.element : self.element + 1].view(torch.uint8)
        data[min(self.bit // 8, size - 1)] ^= 1 << self.bit % 8


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written is NaN (integers: the largest), as is what a freed tensor leaves to the next.

    Process-wide: for ranks that are threads, enter it once around them.
    """
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def poison_gaps(bucket: Bucket, flat: Tensor) -> None:
    """Fill what lies between the tensors of ``bucket``, laid out in ``flat``: nothing may read it."""
    end = 0
    for slot in bucket.slots:
        place = bucket.place(slot)
        poison(flat[end : place.start])
        end = place.stop
    poison(flat[end:])


INSTRUMENTS: dict[str, Callable[[Axis, int], Axis]] = {
    "": lambda axis, seed: axis,
    "fifo": lambda axis, seed: FifoAxis(axis) if axis.size > 1 else axis,
    "delay": lambda axis, seed: DelayedAxis(axis, seed) if axis.size > 1 else axis,
}


def instrumented(grid: Grid, name: str, seed: int = 0) -> Grid:
    """``grid`` with every axis replaced by the instrument called ``name``; two names of one axis share one."""
    return grid.mapped(lambda axis: INSTRUMENTS[name](axis, seed))


def flipped(grid: Grid, flip: Callable[[str, int, int], tuple[int, int] | None]) -> Grid:
    """``grid`` with every axis of more than one rank flipping the bits that ``flip`` picks, by axis/operation."""
    return grid.mapped(lambda axis: FlippingAxis(axis, flip) if axis.size > 1 else axis)


def counted(grid: Grid, counts: dict[str, int]) -> Grid:
    """``grid`` with every axis counting into ``counts`` under ``axis/operation``."""
    return grid.mapped(lambda axis: CountingAxis(axis, counts))
