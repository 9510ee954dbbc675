"""Stand-ins for ``Axis`` that are stricter, slower or more talkative than the real ones.

A layout that agrees with the oracle under these is right for reasons, not by luck of timing: gloo forgives what
NCCL does not.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

import torch
from torch import Tensor

from megapre.parallel.comm import Axis, Work
from megapre.parallel.grid import AXES, Grid


def poison(tensor: Tensor) -> None:
    """Fill with NaN, or with the type's largest number."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


class FifoAxis(Axis):
    """An axis as strict as an NCCL communicator on its own stream.

    One thread runs one operation at a time to its end, in the order of posting, so a message that nobody answers
    holds up all that was posted after it. A result that is read before ``wait()`` is poison.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis.name, axis.rank, axis.size, axis.group)
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
        return self._post(lambda x: super(FifoAxis, self).all_reduce(x, op), tensor)

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        source = shard.clone()
        return self._post(lambda x: super(FifoAxis, self).all_gather(x, source), output)

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis. The input lies around ``shard`` in ZeRO's buffers: it is copied before the poison falls."""
        source = tensor.clone()
        return self._post(lambda x: super(FifoAxis, self).reduce_scatter(x, source), shard)

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        source = tensor.clone()
        return self._post(lambda x: super(FifoAxis, self).all_to_all(x, source, received, sent), output)

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis; reads ``tensor`` when its turn comes, so it must live until then."""
        return self._post(lambda _: super(FifoAxis, self).send(tensor, to), None)

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        return self._post(lambda x: super(FifoAxis, self).recv(x, source), tensor)

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        return self._post(lambda x: super(FifoAxis, self).exchange(tensor, to, x, source), received)


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
        if not self.finished.wait(timeout=60):
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


class CountingAxis(Axis):
    """Counts the bytes that this rank hands to each kind of operation, as (kind, bytes of its whole tensor)."""

    def __init__(self, axis: Axis, counts: dict[str, int]) -> None:
        super().__init__(axis.name, axis.rank, axis.size, axis.group)
        self.counts = counts

    def _count(self, kind: str, tensor: Tensor) -> None:
        if self.size > 1:
            key = f"{self.name}/{kind}"
            self.counts[key] = self.counts.get(key, 0) + tensor.nbytes

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        self._count("all_reduce", tensor)
        return super().all_reduce(tensor, op)

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        self._count("all_gather", output)
        return super().all_gather(output, shard)

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis."""
        self._count("reduce_scatter", tensor)
        return super().reduce_scatter(shard, tensor)

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        self._count("all_to_all", tensor)
        return super().all_to_all(output, tensor, received, sent)

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis."""
        self._count("send", tensor)
        return super().send(tensor, to)

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        self._count("recv", tensor)
        return super().recv(tensor, source)

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        self._count("exchange", tensor)
        return super().exchange(tensor, to, received, source)


INSTRUMENTS: dict[str, Callable[[Axis, int], Axis]] = {
    "": lambda axis, seed: axis,
    "fifo": lambda axis, seed: FifoAxis(axis) if axis.size > 1 else axis,
    "delay": lambda axis, seed: DelayedAxis(axis, seed) if axis.size > 1 else axis,
}


def instrumented(grid: Grid, name: str, seed: int = 0) -> Grid:
    """``grid`` with every axis replaced by the instrument called ``name``; two names of one axis share one."""
    made = {id(getattr(grid, axis)): INSTRUMENTS[name](getattr(grid, axis), seed) for axis in reversed(AXES)}
    return replace(grid, **{axis: made[id(getattr(grid, axis))] for axis in AXES})


def counted(grid: Grid, counts: dict[str, int]) -> Grid:
    """``grid`` with every axis counting into ``counts`` under ``axis/operation``."""
    return replace(grid, **{axis: CountingAxis(getattr(grid, axis), counts) for axis in AXES})
