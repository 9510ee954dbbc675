"""What an update rule works on: this rank's shard of one bucket, its state, and the scalars of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megapre.config.schema import OptimizerConfig
from megapre.kernels.registry import Kernels
from megapre.parallel.buckets import Buffers
from megapre.parallel.layout import Bucket, Slot
from megapre.parallel.placement import Address


@dataclass(frozen=True)
class Now:
    """Scalars of one step: 0-d tensors where the state lives."""

    lr: Tensor
    divisor: Tensor
    """Loss scale x clip factor: the gradient is divided by it."""
    skip: Tensor
    """1 where nothing may change, else 0."""
    steps: Tensor
    """Updates so far, this one included."""

    @property
    def kept(self) -> Tensor:
        """1 where the update counts, 0 where it is skipped."""
        return 1 - self.skip

    def clean(self, gradient: Tensor) -> Tensor:
        """The gradient divided, and zero in a step that is skipped, whose gradient may not be finite."""
        return (gradient / self.divisor).masked_fill_(self.skip != 0, 0.0)


@dataclass(frozen=True)
class Stretch:
    """Neighbours in a shard that one rule updates alike; padding joins what precedes it."""

    rule: str
    decay: bool
    part: slice
    """Elements of the shard."""


class Shard:
    """This rank's part of one bucket: all of it, or its share under ZeRO."""

    def __init__(
        self, index: int, bucket: Bucket, span: tuple[int, int], weight: Tensor, model: Tensor | None,
        stretches: Sequence[Stretch], state: Mapping[str, Tensor], starts: Mapping[str, Mapping[int, int]],
    ) -> None:  # fmt: skip
        self.index, self.bucket, self.stretches = index, bucket, stretches
        self.start, self.end = span
        """Its range of the layout."""
        self.weight = weight
        """fp32 (fp64 under fp64) master weights."""
        self.model = model
        """The same weights in the model's format, where an update should write them too."""
        self._state, self._starts = state, starts

    def of(self, rule: str) -> Iterable[Stretch]:
        """The stretches of one rule."""
        return (stretch for stretch in self.stretches if stretch.rule == rule)

    def held(self, kind: str, part: slice) -> Tensor | None:
        """State of elements that lie in one stretch; None where its rule keeps no such state."""
        if kind == "weight":
            return self.weight[part]
        for number, stretch in enumerate(self.stretches):
            if stretch.part.start <= part.start < stretch.part.stop and number in self._starts[kind]:
                first = self._starts[kind][number] + part.start - stretch.part.start
                return self._state[kind][first : first + part.stop - part.start]
        return None

    def state(self, kind: str, part: slice) -> Tensor:
        """State that the rule of these elements keeps."""
        held = self.held(kind, part)
        assert held is not None, f"no {kind} is kept for {part}"
        return held

    def overlap(self, slot: Slot) -> slice:
        """Elements of ``slot``, padding left out, that this shard holds, counted in the shard; may be empty."""
        address = slot.address(self.start, self.end)
        if address is None:
            return slice(0, 0)
        first = slot.start + address.start - self.start
        return slice(first, first + address.end - address.start)

    def publish(self, part: slice) -> None:
        """Write updated weights in the model's format too."""
        if self.model is not None:
            self.model[part] = self.weight[part]


class Rule:
    """How weights follow their gradients; this one leaves them as they are.

    ``mine``: bucket -> the tensors in it that the rule updates. Ranks that share a bucket call ``update`` in the same
    order.
    """

    states: tuple[str, ...] = ()
    """State that it keeps for each element, by name."""

    def __init__(
        self, config: OptimizerConfig, buffers: Buffers, kernels: Kernels, mine: Mapping[int, Sequence[Slot]]
    ) -> None:
        self.config, self.buffers, self.kernels, self.mine = config, buffers, kernels, mine

    def update(self, shard: Shard, gradient: Tensor, now: Now) -> None:
        """Update what is this rule's in ``shard``; ``gradient`` lives where the state does."""

    def pieces(self, *, share: bool) -> Iterable[tuple[Address, Tensor]]:
        """State that is not kept by element, as the optimizer's ``pieces``."""
        return ()
