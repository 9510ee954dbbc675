"""Where the logical tensors of a model lie in the tensors of a Hugging Face checkpoint. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """One logical tensor is a box of one of theirs, perhaps transposed."""

    ours: str
    theirs: str
    offset: tuple[int, ...] = ()
    """First index of the box, in their dimensions; empty: all zeros. What is longer than our shape begins with indices
    (of an expert in a stack)."""
    transposed: bool = False
    """Whether the box is our matrix transposed."""
    heads: int = 0
    """Where it is not 0, their last two dimensions, heads and features of a head, are one of ours."""

    def box(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and size in their tensor of our tensor of ``shape``."""
        size = shape[::-1] if self.transposed else shape
        if self.heads:
            size = (*size[:-1], self.heads, size[-1] // self.heads)
        offset = self.offset or (0,) * len(size)
        return offset, (1,) * (len(offset) - len(size)) + size


def matrices(ours: str, theirs: str, *, bias: bool = False, transposed: bool = False) -> list[Link]:
    """The weight of a linear layer or norm, and its bias where it has one."""
    links = [Link(f"{ours}.weight", f"{theirs}.weight", transposed=transposed)]
    return links + ([Link(f"{ours}.bias", f"{theirs}.bias")] if bias else [])


def their_shapes(links: Iterable[Link], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of each of their tensors: the smallest that holds all boxes of ours, whose ``shapes`` are given."""
    found: dict[str, tuple[int, ...]] = {}
    for link in links:
        offset, size = link.box(shapes[link.ours])
        end = tuple(o + n for o, n in zip(offset, size))
        found[link.theirs] = tuple(map(max, end, found.get(link.theirs, end)))
    return found
