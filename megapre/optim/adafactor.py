"""Adafactor (arXiv 1804.04235): second moments of a matrix by row and column, steps relative to the weights' size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megapre.config.schema import OptimizerConfig
from megapre.kernels.registry import Kernels
from megapre.optim.shard import Now, Rule, Shard
from megapre.parallel.buckets import Buffers
from megapre.parallel.layout import Bucket, Slot
from megapre.parallel.placement import Address

SQUARE_FLOOR, WEIGHT_FLOOR = 1e-30, 1e-3
"""epsilon 1 (added to squared gradients) and 2 (least root mean square of a tensor's weights) of the paper."""
DECAY_POWER = 0.8
"""The second moment of step t decays by 1 - t^-0.8."""
THRESHOLD = 1.0
"""Largest root mean square of an update before the learning rate."""


@dataclass(frozen=True)
class Rectangle:
    """Elements of a flat range of a matrix that form a rectangle."""

    part: slice
    """In the flat range."""
    row: int
    rows: int
    column: int
    columns: int


class Factors:
    """Second moment of one logical matrix, whole on every rank."""

    def __init__(self, slot: Slot, buffers: Buffers) -> None:
        self.slot = slot
        self.row, self.column = (buffers.home.zeros(n, buffers.wide) for n in slot.spec.shape)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means of the squares of each row and of each column."""
        return self.row, self.column

    def rectangles(self, shard: Shard) -> Iterator[Rectangle]:
        """What ``shard`` holds of the matrix: part of a row, rows, part of a row; parts counted in the shard."""
        part, width = shard.overlap(self.slot), self.slot.size[1]
        size = part.stop - part.start
        top, left = self.slot.offset
        at = shard.start + part.start - self.slot.start
        done = 0
        while done < size:
            row, column = divmod(at + done, width)
            whole = (size - done) // width if column == 0 else 0
            rows, columns = (whole, width) if whole else (1, min(width - column, size - done))
            first = part.start + done
            yield Rectangle(slice(first, first + rows * columns), top + row, rows, left + column, columns)
            done += rows * columns


class Adafactor(Rule):
    """r, c = b2 (r, c) + (1 - b2) means of g^2 + eps1 over a row, a column; v = r c / mean(r); u = g / sqrt(v);
    u = u / max(1, RMS(u)); w = w (1 - lr decay) - lr max(eps2, RMS(w)) u. Vectors keep v itself. No first moment.

    Sums and means are those of the logical tensor, whatever the layout: two small sums over replicas and tensor ranks.
    """

    states: tuple[str, ...] = ()
    rule = "adafactor"

    def __init__(
        self, config: OptimizerConfig, buffers: Buffers, kernels: Kernels, mine: Mapping[int, Sequence[Slot]]
    ) -> None:
        super().__init__(config, buffers, kernels, mine)
        self.factors = self._factors()

    def _factors(self) -> dict[str, Factors]:
        return {slot.spec.name: Factors(slot, self.buffers) for slots in self.mine.values() for slot in slots}

    def update(self, shard: Shard, gradient: Tensor, now: Now) -> None:
        """As the optimizer asks."""
        slots = self.mine[shard.index]
        if not slots:
            return
        rate = 1 - now.steps.to(gradient.dtype).clamp(min=1) ** -DECAY_POWER
        gradient = now.clean(gradient)
        self._learn(shard, slots, gradient, (1 - rate) * now.kept)
        updates = [self._update(shard, slot, gradient) for slot in slots]
        parts = [shard.overlap(slot) for slot in slots]
        squares = [torch.stack([_square_sum(u), _square_sum(shard.weight[p])]) for u, p in zip(updates, parts)]
        means = self._sum(shard.bucket, slots, squares)
        for slot, part, u, (update, weights) in zip(slots, parts, updates, means):
            count = prod(slot.spec.shape)
            clipped = u.div_(((update / count).sqrt() / THRESHOLD).clamp(min=1.0))
            lr = now.lr * now.kept
            decay = self.config.weight_decay if slot.spec.decay else 0.0
            length = lr * (weights / count).sqrt().clamp(min=WEIGHT_FLOOR)
            shard.weight[part].mul_(1 - lr * decay).sub_(clipped.mul_(length))
            shard.publish(part)

    def _learn(self, shard: Shard, slots: Sequence[Slot], gradient: Tensor, weight: Tensor) -> None:
        """Move the second moments towards this step's by ``weight``."""
        sums = []
        for slot in slots:
            row, column = (torch.zeros_like(moment) for moment in self.factors[slot.spec.name].moments)
            for r in self.factors[slot.spec.name].rectangles(shard):
                part = gradient[r.part].view(r.rows, r.columns)
                row[r.row : r.row + r.rows] += _square_sum(part, 1) + r.columns * SQUARE_FLOOR
                column[r.column : r.column + r.columns] += _square_sum(part, 0) + r.rows * SQUARE_FLOOR
            sums.append(torch.cat([row, column]))
        for slot, total in zip(slots, self._sum(shard.bucket, slots, sums)):
            rows, columns = slot.spec.shape
            for moment, new in zip(self.factors[slot.spec.name].moments, (total[:rows] / columns, total[rows:] / rows)):
                moment.lerp_(new, weight)

    def _update(self, shard: Shard, slot: Slot, gradient: Tensor) -> Tensor:
        """g / sqrt(v) of what the shard holds of a tensor."""
        factors = self.factors[slot.spec.name]
        part = shard.overlap(slot)
        update = gradient[part]
        for r in factors.rectangles(shard):
            row = factors.row[r.row : r.row + r.rows] / factors.row.mean()
            column = factors.column[r.column : r.column + r.columns]
            here = update[r.part.start - part.start : r.part.stop - part.start].view(r.rows, r.columns)
            here.mul_(row.rsqrt().unsqueeze(1)).mul_(column.rsqrt())
        return update

    def _sum(self, bucket: Bucket, slots: Sequence[Slot], parts: Sequence[Tensor]) -> list[Tensor]:
        """Sums of each slot's ``parts`` over all ranks that hold pieces of its tensor, each piece counted once."""
        grid = self.buffers.grid
        tensor = grid.tensor if bucket.replicas == "replicas" else grid.expert_tensor
        total = torch.cat([part / s.spec.placement.replicas(tensor.size) for s, part in zip(slots, parts)])
        if self.buffers.partition.zero:
            self.buffers.replicas(bucket).all_reduce(total).wait()
        tensor.all_reduce(total).wait()
        return list(total.split([len(part) for part in parts]))

    def pieces(self, *, share: bool) -> Iterator[tuple[Address, Tensor]]:
        """The moments of rows and columns, as the optimizer's ``pieces``."""
        for index, bucket in enumerate(self.buffers.layout.buckets):
            speaks = self.buffers.replicas(bucket).rank == 0
            for slot in self.mine[index]:
                if share and not (speaks and slot.primary and not any(slot.offset)):
                    continue
                for kind, moment in zip(("row", "column"), self.factors[slot.spec.name].moments):
                    shape = tuple(moment.shape)
                    address = Address(f"exp_avg_sq_{kind}/{slot.spec.name}", shape, (0,), shape, 0, moment.numel())
                    yield address, moment


def _square_sum(x: Tensor, dim: int | None = None) -> Tensor:
    """Sum of squares without a temporary of them."""
    return torch.linalg.vector_norm(x, dim=dim).square()


class AdafactorVector(Adafactor):
    """Adafactor of what is no matrix: the second moment is kept by element."""

    states: tuple[str, ...] = ("exp_avg_sq",)
    rule = "adafactor-vector"

    def _factors(self) -> dict[str, Factors]:
        return {}

    def _learn(self, shard: Shard, slots: Sequence[Slot], gradient: Tensor, weight: Tensor) -> None:
        for stretch in shard.of(self.rule):
            squares = gradient[stretch.part].square() + SQUARE_FLOOR
            shard.state("exp_avg_sq", stretch.part).lerp_(squares, weight)

    def _update(self, shard: Shard, slot: Slot, gradient: Tensor) -> Tensor:
        part = shard.overlap(slot)
        if part.start == part.stop:
            return gradient[part]
        return gradient[part].mul_(shard.state("exp_avg_sq", part).clamp(min=SQUARE_FLOOR).rsqrt())

    def pieces(self, *, share: bool) -> Iterator[tuple[Address, Tensor]]:
        """Nothing beside what is kept by element."""
        return iter(())
