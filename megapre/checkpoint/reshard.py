"""Geometry of checkpoint pieces: which elements two addresses share, and how to copy them. No I/O.

A flat range of a box is cut into at most ``2 * ndim - 1`` axis-aligned boxes, each contiguous in the piece,
so that copying between any two layouts is a handful of strided rectangle copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megapre.config.check import RunError
from megapre.parallel.placement import Address

MAX_DIMS = 16
MAX_ELEMENTS = 2**63 - 1


class CheckpointError(RunError, ValueError):
    """A checkpoint cannot be written, read or trusted; one sentence says why."""


@dataclass(frozen=True)
class Box:
    """An axis-aligned box of a logical tensor, in global coordinates."""

    offset: tuple[int, ...]
    """First index, counted in the logical tensor."""
    size: tuple[int, ...]
    """Extent in each dimension."""
    at: int
    """Position of the box's first element in the 1-D tensor of the piece; the box is contiguous there."""


def validate(address: Address) -> None:
    """Raise CheckpointError unless the range lies in the box and the box in the logical tensor."""
    shape, offset, size = address.shape, address.offset, address.size
    where = f"the piece of {address.name!r}"
    if not len(shape) == len(offset) == len(size) <= MAX_DIMS:
        raise CheckpointError(
            f"{where} has shape {shape}, offset {offset} and size {size}, "
            f"which need equal lengths of at most {MAX_DIMS}"
        )
    if any(not (0 <= o and 0 <= s and o + s <= n) for n, o, s in zip(shape, offset, size)):
        raise CheckpointError(f"{where} has a box at {offset} of size {size} that leaves the tensor of shape {shape}")
    if any(n > MAX_ELEMENTS for n in shape) or prod(shape) > MAX_ELEMENTS:
        raise CheckpointError(f"{where} has shape {shape}, more than {MAX_ELEMENTS} elements")
    if not 0 <= address.start <= address.end <= prod(size):
        raise CheckpointError(
            f"{where} has the flat range [{address.start}, {address.end}) in a box of {prod(size)} elements"
        )


def boxes(address: Address) -> list[Box]:
    """Cut a flat range of a box into few boxes in global coordinates, in the order of the piece's elements.

    At most ``2 * ndim - 1`` boxes (one for a scalar, none for an empty range). Raises CheckpointError when the
    range leaves its box or the box its tensor.
    """
    validate(address)
    return list(_cut(address.offset, address.size, 0, address.start, address.end, 0))


def _cut(
    offset: tuple[int, ...], size: tuple[int, ...], dim: int, start: int, end: int, at: int
) -> Iterator[Box]:
    """Cut [start, end) of a box whose dimensions before ``dim`` have length one."""
    if start == end:
        return
    if dim == len(size):
        yield Box(offset, size, at)
        return
    row = prod(size[dim + 1 :])
    first, inside = divmod(start, row)
    last, beyond = divmod(end, row)

    def rows(index: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (*offset[:dim], offset[dim] + index, *offset[dim + 1 :]), (*size[:dim], count, *size[dim + 1 :])

    if first == last:
        yield from _cut(*rows(first, 1), dim + 1, inside, beyond, at)
        return
    if inside:
        yield from _cut(*rows(first, 1), dim + 1, inside, row, at)
        first += 1
    if first < last:
        yield Box(*rows(first, last - first), at + first * row - start)
    if beyond:
        yield from _cut(*rows(last, 1), dim + 1, 0, beyond, at + last * row - start)


def _meeting(a: Box, b: Box) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """First and one-past-last index of the intersection of two boxes, None when they do not meet."""
    low = tuple(map(max, a.offset, b.offset))
    high = tuple(min(p + m, q + n) for p, m, q, n in zip(a.offset, a.size, b.offset, b.size))
    return (low, high) if all(l < h for l, h in zip(low, high)) else None


def _meetings(
    source: Address, target: Address
) -> Iterator[tuple[Box, Box, tuple[int, ...], tuple[int, ...]]]:
    if source.name != target.name:
        return
    if source.shape != target.shape:
        raise CheckpointError(
            f"{target.name!r} has shape {source.shape} in the checkpoint and {target.shape} in this run"
        )
    targets = boxes(target)
    for a in boxes(source):
        for b in targets:
            met = _meeting(a, b)
            if met:
                yield a, b, *met


def overlap(source: Address, target: Address) -> int:
    """Count the elements that both addresses hold. Raises CheckpointError when their global shapes differ."""
    return sum(prod(h - l for l, h in zip(low, high)) for _, _, low, high in _meetings(source, target))


def _window(data: Tensor, box: Box, low: tuple[int, ...], high: tuple[int, ...]) -> Tensor:
    """View of the elements of [low, high) in a piece that holds ``box``."""
    whole = data[box.at : box.at + prod(box.size)].view(box.size)
    return whole[tuple(slice(l - o, h - o) for l, h, o in zip(low, high, box.offset))]


def check_data(address: Address, data: Tensor) -> None:
    """Raise CheckpointError unless ``data`` is 1-D with one element per address."""
    if data.shape != (address.end - address.start,):
        raise CheckpointError(
            f"the piece of {address.name!r} addresses {address.end - address.start} elements "
            f"and its tensor has shape {tuple(data.shape)}"
        )


@torch.no_grad()
def copy_overlap(source: Address, source_data: Tensor, target: Address, target_data: Tensor) -> int:
    """Copy every element that both addresses hold and return how many there were.

    ``source_data`` and ``target_data`` are 1-D, of one dtype, on any devices. Addresses of different logical
    tensors share nothing. Raises CheckpointError on another global shape, dtype or length.
    """
    check_data(source, source_data)
    check_data(target, target_data)
    copied = 0
    for a, b, low, high in _meetings(source, target):
        if source_data.dtype != target_data.dtype:
            raise CheckpointError(
                f"{target.name!r} is {source_data.dtype} in the checkpoint and {target_data.dtype} in this run"
            )
        _window(target_data, b, low, high).copy_(_window(source_data, a, low, high))
        copied += prod(h - l for l, h in zip(low, high))
    return copied


def tiling_fault(shape: tuple[int, ...], parts: Sequence[Box]) -> str | None:
    """Say where ``parts`` fail to cover a tensor of ``shape`` exactly once, None when they do.

    Sweeps one dimension after the other: between two neighbouring edges the same parts are present, and these
    must tile the remaining dimensions.
    """
    if prod(shape) == 0:
        return None
    fault = _sweep(shape, parts, 0)
    if fault is None:
        return None
    index, count = fault
    return f"element {list(index)} is held by {count or 'no'} piece{'s' if count > 1 else ''}"


def _sweep(shape: tuple[int, ...], parts: Sequence[Box], dim: int) -> tuple[tuple[int, ...], int] | None:
    """First index, counted from ``dim``, that is not held exactly once, and how many parts hold it."""
    if dim == len(shape):
        return None if len(parts) == 1 else ((), len(parts))
    if not parts:
        return (0,) * (len(shape) - dim), 0
    edges = sorted({0, shape[dim]}.union(*((p.offset[dim], p.offset[dim] + p.size[dim]) for p in parts)))
    waiting = sorted(parts, key=lambda p: p.offset[dim], reverse=True)
    present: list[Box] = []
    for edge in edges[:-1]:
        present = [p for p in present if p.offset[dim] + p.size[dim] > edge]
        while waiting and waiting[-1].offset[dim] == edge:
            present.append(waiting.pop())
        fault = _sweep(shape, present, dim + 1)
        if fault is not None:
            return (edge, *fault[0]), fault[1]
    return None
