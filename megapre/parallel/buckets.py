"""The memory of a rank's parameters and main gradients: one piece per bucket of the layout.

A weight gradient has one home: layers add it straight into ``main_grad`` (fp32, or fp64 under fp64), and
``.grad`` stays None. The executor says what it is about to read and what it has completed (``parallel/zero.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from megapre.parallel.comm import Axis
from megapre.parallel.grid import Grid
from megapre.parallel.layout import Bucket, Layout
from megapre.parallel.offload import Home, Host
from megapre.parallel.weight_queue import WeightQueue
from megapre.parallel.zero import (
    Gradients,
    Partition,
    ShardedGradients,
    ShardedWeights,
    Weights,
    WholeGradients,
    WholeWeights,
)


class Buffers:
    """Parameters and gradients of one rank, in the order of ``layout``.

    Parameters are views of a bucket's weights with an attribute ``main_grad``, a view of its gradients, and ``queue``,
    where layers hand in their weight gradients. ``zero`` is the ZeRO stage. ``offload``: ``none``, ``optimizer`` or
    ``parameters``; ``home`` is where the optimizer's state lives, ``weights.home`` where shards of the weights do.
    """

    def __init__(
        self,
        layout: Layout,
        grid: Grid,
        dtype: torch.dtype,
        device: torch.device,
        zero: int = 0,
        offload: str = "none",
    ) -> None:
        self.layout, self.grid, self.device = layout, grid, device
        self.wide = gradient_dtype(dtype)
        self.partition = Partition(layout, grid, zero)
        beside = Home(device)
        self.home = beside if offload == "none" else Host(device)
        self.weights: Weights
        if zero == 3:
            shelf = self.home if offload == "parameters" else beside
            self.weights = ShardedWeights(self.partition, dtype, device, shelf)
        else:
            self.weights = WholeWeights(self.partition, dtype, beside)
        sharded = zero >= 2
        self.gradients: Gradients = (ShardedGradients if sharded else WholeGradients)(self.partition, self.wide, device)
        self.queue = WeightQueue()
        self._places = {
            slot.spec.name: (index, slot) for index, bucket in enumerate(layout.buckets) for slot in bucket.slots
        }

    def holds(self, name: str) -> bool:
        """Whether this rank has the tensor."""
        return name in self._places

    def replicas(self, bucket: Bucket) -> Axis:
        """The ranks that hold the same weights as this one, over which ``bucket`` is reduced and sharded."""
        return self.partition.replicas(bucket)

    def share(self, bucket: Bucket) -> tuple[int, int]:
        """Flat range of ``bucket`` that this rank speaks for among its replicas."""
        part = self.partition.share(bucket)
        return bucket.start + part.start, bucket.start + part.stop

    def shard(self, bucket: Bucket) -> tuple[int, int]:
        """Flat range of ``bucket`` that this rank's optimizer updates."""
        part = self.partition.shard(bucket)
        return bucket.start + part.start, bucket.start + part.stop

    def parameter(self, *names: str) -> nn.Parameter:
        """The parameter that spans the named neighbours, concatenated along dimension 0."""
        index = self._places[names[0]][0]
        slots = [self._places[name][1] for name in names]
        assert all(a.end == b.start for a, b in pairwise(slots)), f"{names} are not adjacent"
        bucket = self.layout.buckets[index]
        part = slice(bucket.place(slots[0]).start, bucket.place(slots[-1]).stop)
        shape = (sum(slot.shape[0] for slot in slots), *slots[0].shape[1:])
        with self.weights.rooms[index].present() as weights, self.gradients.rooms[index].present() as gradients:
            # .data: a gather between forward and backward does not count as a change of what autograd has saved
            parameter = nn.Parameter(weights.data[part].view(shape))
            parameter.main_grad = gradients[part].view(shape)  # type: ignore[attr-defined]
        parameter.queue = self.queue  # type: ignore[attr-defined]
        return parameter

    # What the executor says.

    def begin(self, visits: Sequence[int]) -> None:
        """A plan starts that enters these layers, in this order."""
        self.weights.begin(visits)

    def enter(self, layer: int) -> None:
        """The weights of ``layer`` are read from here on."""
        self.weights.enter(layer)

    def leave(self, layer: int) -> None:
        """The weights of ``layer`` are not read before its next visit."""
        self.weights.leave(layer)

    def open(self, layer: int) -> None:
        """Gradients of ``layer`` are added from here on."""
        self.gradients.open(layer)

    def close(self, layer: int, last: bool) -> None:
        """A microbatch's gradients of ``layer`` are in; ``last``: it was the plan's last."""
        self.gradients.close(layer, last)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Number format of main gradients, master weights and moments."""
    return torch.float64 if dtype == torch.float64 else torch.float32
