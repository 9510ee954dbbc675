"""The flight record: every operation on every axis is told to the rank's pulse before it is posted, its wait timed."""

from __future__ import annotations

from torch import Tensor

from megapre.parallel.comm import Around, Axis, Work
from megapre.parallel.grid import Grid
from megapre.resilience.pace import Waits
from megapre.resilience.pulse import Pulse


def recorded(grid: Grid, pulse: Pulse, waits: Waits) -> Grid:
    """``grid`` with every axis telling its operations; a grid of one rank itself."""
    if grid.world.size == 1 and not pulse.watched:
        return grid
    return grid.mapped(lambda axis: RecordedAxis(axis, pulse, waits))


class RecordedAxis(Around):
    """An axis that notes each operation before it is posted."""

    def __init__(self, axis: Axis, pulse: Pulse, waits: Waits) -> None:
        super().__init__(axis)
        self.pulse, self.waits = pulse, waits

    def _counted(self, work: Work) -> Work:
        return work if self.size == 1 else self.waits.around(work)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        self.pulse.beat(f"{self.name} all_reduce {tensor.nbytes}")
        return self._counted(self.inner.all_reduce(tensor, op))

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        self.pulse.beat(f"{self.name} all_gather {output.nbytes}")
        return self._counted(self.inner.all_gather(output, shard))

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis."""
        self.pulse.beat(f"{self.name} reduce_scatter {tensor.nbytes}")
        return self._counted(self.inner.reduce_scatter(shard, tensor))

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        self.pulse.beat(f"{self.name} all_to_all {tensor.nbytes}")
        return self._counted(self.inner.all_to_all(output, tensor, received, sent))

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis."""
        self.pulse.beat(f"{self.name} send {tensor.nbytes} to {to}")
        return self._counted(self.inner.send(tensor, to))

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        self.pulse.beat(f"{self.name} recv {tensor.nbytes} from {source}")
        return self._counted(self.inner.recv(tensor, source))

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        self.pulse.beat(f"{self.name} exchange {tensor.nbytes} with {to}, {source}")
        return self._counted(self.inner.exchange(tensor, to, received, source))
