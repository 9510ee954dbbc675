"""Replica digests: ranks that must hold the same bits compare sums of them, so that silent corruption is found.

Weights are equal on all data-parallel replicas, and master weights and moments too where they are not sharded. A bit
that flips in one of them is never repaired by training: the replicas drift apart.
"""

from __future__ import annotations

import json
from collections import Counter

import torch
from torch import Tensor

from megapre.parallel.comm import Axis
from megapre.training.step import TrainStep


class Replicas:
    """The replicated tensors of one rank, by the axis over which they are equal."""

    def __init__(self, step: TrainStep, zero: int) -> None:
        self.host, self.world = step.grid.host, step.grid.world
        self._flat = flat = step.flat
        axis_of = {slot.spec.name: bucket.replicas for bucket in flat.layout.buckets for slot in bucket.slots}
        self._axes: dict[str, Axis] = {name: getattr(step.grid, name) for name in set(axis_of.values())}
        self._held: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in self._axes}
        if zero < 3:
            for bucket, room in zip(flat.layout.buckets, flat.weights.rooms):
                self._held[bucket.replicas] += [(s.spec.name, room.tensor[bucket.place(s)]) for s in bucket.slots]
        if zero == 0:
            for address, data in step.optimizer.pieces(share=False):
                self._held[axis_of[address.name.partition("/")[2]]].append((address.name, data))

    def faults(self) -> list[str]:
        """One sentence per corrupted tensor that names its rank, the same on all ranks; all ranks call it together."""
        found: list[str] = []
        self._flat.weights.settle()
        for name, held in sorted(self._held.items()):
            if held and self._axes[name].size > 1:
                found += self._compare(self._axes[name], held)
        told = {line for text in self.host.gather_text(json.dumps(found)) for line in json.loads(text)}
        return sorted(told)

    def _compare(self, axis: Axis, held: list[tuple[str, Tensor]]) -> list[str]:
        device = self._flat.device
        mine = torch.stack([torch.tensor(self.world.rank, device=device)] + [digest(t).to(device) for _, t in held])
        every = mine.new_empty(axis.size * len(mine))
        axis.all_gather(every, mine).wait()
        ranks, *columns = every.view(axis.size, -1).T.tolist()
        found = []
        for (name, _), column in zip(held, columns):
            (value, most), *others = Counter(column).most_common()
            if not others:
                continue
            odd = [rank for rank, seen in zip(ranks, column) if seen != value]
            if most > len(column) // 2:
                found.append(f"{name} of rank {', '.join(map(str, odd))} is not what {most} replicas of it hold")
            else:
                found.append(f"{name} differs between ranks {', '.join(map(str, ranks))}, and no majority tells which")
        return found


def digest(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits as integers, a 0-d int64 tensor: any single flipped bit changes it."""
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(wide).sum(dtype=torch.int64)
