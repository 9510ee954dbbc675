"""Layout: parameter -> slot of one flat range, cut into buckets, cut into shards. Torch-free arithmetic.

The reduction of gradients, ZeRO, the clipper, the optimizer and the checkpoint all read this one map.
Slots follow the order in which a backward pass finishes them (last layer first), so that a bucket fills, and
is reduced, while earlier layers are still at work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from megapre.parallel.placement import Address, TensorSpec

ALIGNMENT = 64
"""Elements to which buckets' shards are aligned, so that every shard starts on a cache line and a 128-bit word."""


@dataclass(frozen=True)
class Slot:
    """One local tensor inside the flat range."""

    spec: TensorSpec
    layer: int
    """The owning layer (of this rank's) whose backward runs last."""
    start: int
    shape: tuple[int, ...]
    """Local shape, padding included."""
    offset: tuple[int, ...]
    size: tuple[int, ...]
    """This rank's box of the logical tensor; a prefix of the local tensor, since padding lies at its end."""
    partial: str
    """Axis over which the gradient is a partial sum ("" for none)."""
    primary: bool
    """Whether this rank speaks for the tensor among the tensor ranks and stages that hold the same box."""

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + prod(self.shape)

    def address(self, start: int, end: int, prefix: str = "") -> Address | None:
        """Address of the elements of this slot inside flat range [start, end); None when there are none."""
        a, b = max(start, self.start) - self.start, min(end, self.start + prod(self.size)) - self.start
        if a >= b:
            return None
        return Address(prefix + self.spec.name, self.spec.shape, self.offset, self.size, a, b)


@dataclass(frozen=True)
class Bucket:
    """A contiguous stretch of the flat range: one piece of memory, reduced at once."""

    start: int
    end: int
    slots: tuple[Slot, ...]
    tied: tuple[int, ...]
    """Layers that share its tensors, where other stages hold some of them: gradients are summed over all; else ()."""
    layers: frozenset[int]
    """Layers of this rank that use it."""
    replicas: str = "replicas"
    """Axis of the ranks that hold the same weights: one for all tensors of the bucket."""

    @property
    def size(self) -> int:
        """Elements, padding included."""
        return self.end - self.start

    def shard(self, rank: int, size: int) -> slice:
        """Part of this bucket owned by replica ``rank`` of ``size``."""
        part = self.size // size
        return slice(rank * part, (rank + 1) * part)

    def place(self, slot: Slot) -> slice:
        """Where ``slot`` lies inside this bucket."""
        return slice(slot.start - self.start, slot.end - self.start)


@dataclass(frozen=True)
class ExpertPlace:
    """Where a rank stands on the expert mesh, and the experts that it holds."""

    experts: range = range(0)
    tensor_rank: int = 0
    tensor_size: int = 1
    replicas: int = 1
    """Ranks that hold the same experts."""


@dataclass(frozen=True)
class Layout:
    """All slots and buckets of one rank."""

    slots: tuple[Slot, ...]
    buckets: tuple[Bucket, ...]
    held: frozenset[int]
    """Layers of this rank."""

    @property
    def total(self) -> int:
        """Elements of the flat range, padding included."""
        return self.buckets[-1].end

    @staticmethod
    def build(
        specs: Iterable[TensorSpec],
        layers: Sequence[int],
        *,
        tensor_rank: int,
        tensor_size: int,
        replicas: int,
        sequence_parallel: bool,
        bucket_elements: int,
        expert: ExpertPlace = ExpertPlace(),
        by_layer: bool = False,
    ) -> Layout:
        """Lay out the tensors that ``layers`` use, for one tensor rank and any of its ``replicas``.

        Experts' tensors follow all others: their replicas are other ranks, so they share no bucket. With ``by_layer``
        no bucket spans layers: what ZeRO-2 and 3 reduce and gather layer by layer.
        """
        held = frozenset(layers)
        groups = _groups(
            [s for s in specs if held.intersection(s.layers) and (s.expert is None or s.expert in expert.experts)]
        )
        # Last layer first; inside a layer what another axis must sum first, so that it is one run.
        groups.sort(
            key=lambda g: (
                g[0].expert is not None, -_finished(g[0], held), _tied(g[0], held), not g[0].partial(sequence_parallel)
            )
        )  # fmt: skip
        axes = {"replicas": (tensor_rank, tensor_size, replicas)}
        axes["expert_replicas"] = (expert.tensor_rank, expert.tensor_size, expert.replicas)
        slots: list[Slot] = []
        buckets: list[Bucket] = []
        opened = position = 0  # flat positions: start of the open bucket, end of the last slot
        first = 0  # first slot of the open bucket
        for index, group in enumerate(groups):
            tied = _tied(group[0], held)
            kind = group[0].replicas
            place, places, copies = axes[kind]
            for spec in group:
                offset, size = spec.placement.box(spec.shape, place, places)
                shape = spec.placement.local_shape(spec.shape, places)
                primary = place % spec.placement.replicas(places) == 0 and min(spec.layers) in held
                partial = spec.partial(sequence_parallel)
                slots.append(Slot(spec, _finished(spec, held), position, shape, offset, size, partial, primary))
                position = slots[-1].end
            position = _round_up(position, ALIGNMENT)
            after = groups[index + 1][0] if index + 1 < len(groups) else None
            # Tensors tied to other stages share a bucket with none but their like: all stages then cut, reduce and
            # update it alike.
            alone = after is None or after.replicas != kind or tied != _tied(after, held)
            if after is not None and by_layer:
                alone = alone or held.intersection(after.layers) != held.intersection(group[0].layers)
            if alone or position - opened >= bucket_elements:
                position = opened + _round_up(position - opened, copies * ALIGNMENT)
                inside = tuple(slots[first:])
                used = held.intersection(layer for slot in inside for layer in slot.spec.layers)
                buckets.append(Bucket(opened, position, inside, tied, used, kind))
                opened, first = position, len(slots)
        return Layout(tuple(slots), tuple(buckets), held)


def _tied(spec: TensorSpec, held: frozenset[int]) -> tuple[int, ...]:
    """The layers that share the tensor where some are not among ``held``."""
    return () if held.issuperset(spec.layers) else spec.layers


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _finished(spec: TensorSpec, held: frozenset[int]) -> int:
    """The layer among ``held`` whose backward completes this tensor's gradient."""
    return min(held.intersection(spec.layers))


def _groups(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    """Runs of tensors that must lie side by side because one fused matrix is a view of them all."""
    groups: list[list[TensorSpec]] = []
    joined = False
    for spec in specs:
        # A rank's last expert is followed, in its list, by what comes after all experts.
        if joined and spec.replicas == groups[-1][0].replicas:
            groups[-1].append(spec)
        else:
            groups.append([spec])
        joined = spec.fused
    return groups
