"""The geometry of pieces against plain numpy indexing."""

import itertools
import random

import numpy as np
import pytest
import torch

from megapre.checkpoint.reshard import Box, CheckpointError, boxes, copy_overlap, overlap, tiling_fault
from megapre.parallel.placement import Address

KINDS = ("row", "column", "middle", "flat", "replicas", "zero_in_column")


def draw(rng: random.Random, shape: tuple[int, ...]) -> Address:
    """A random range of a random box."""
    offset = tuple(rng.choice((0, 0, rng.randint(0, n))) for n in shape)
    size = tuple(rng.randint(0, n - o) if rng.random() < 0.3 else n - o for n, o in zip(shape, offset))
    count = int(np.prod(size))
    start, end = sorted((rng.randint(0, count), rng.randint(0, count)))
    if rng.random() < 0.2:
        start, end = 0, count
    return Address("t", shape, offset, size, start, end)


def indices(address: Address) -> np.ndarray:
    """Global flat index of every element of an address."""
    every = np.arange(int(np.prod(address.shape))).reshape(address.shape)
    box = every[tuple(slice(o, o + n) for o, n in zip(address.offset, address.size))]
    return box.reshape(-1)[address.start : address.end]


def shapes(rng: random.Random, count: int) -> list[tuple[int, ...]]:
    lengths = (0, *range(1, 8), *range(1, 8), *range(1, 8))
    return [tuple(rng.choice(lengths) for _ in range(rng.randint(0, 4))) for _ in range(count)]


def test_boxes_list_the_elements_in_order(seed):
    rng = random.Random(seed)
    for shape in shapes(rng, 600):
        address = draw(rng, shape)
        found = boxes(address)
        assert len(found) <= max(1, 2 * len(shape) - 1), address
        listed = [
            (box.at, indices(Address("t", shape, box.offset, box.size, 0, int(np.prod(box.size))))) for box in found
        ]
        assert [at for at, _ in listed] == list(np.cumsum([0] + [len(part) for _, part in listed])[:-1]), address
        flat = np.concatenate([part for _, part in listed]) if listed else np.empty(0, int)
        assert np.array_equal(flat, indices(address)), address


def test_whole_boxes_and_whole_rows_stay_whole():
    assert boxes(Address("t", (9, 8, 7), (1, 2, 3), (4, 5, 2), 0, 40)) == [Box((1, 2, 3), (4, 5, 2), 0)]
    assert boxes(Address("t", (9, 8), (1, 0), (4, 8), 8, 24)) == [Box((2, 0), (2, 8), 0)]
    assert boxes(Address("t", (), (), (), 0, 1)) == [Box((), (), 0)]
    assert boxes(Address("t", (9, 0), (0, 0), (9, 0), 0, 0)) == []


def test_copy_overlap_against_indices(seed):
    rng = random.Random(seed)
    copies = 0
    for shape in shapes(rng, 600):
        source, target = draw(rng, shape), draw(rng, shape)
        have, want = indices(source), indices(target)
        data = torch.full((len(want),), -1)
        count = copy_overlap(source, torch.from_numpy(have.astype(np.int64)), target, data)
        shared = np.isin(want, have)
        assert count == shared.sum() == overlap(source, target), (source, target)
        assert np.array_equal(data.numpy(), np.where(shared, want, -1)), (source, target)
        copies += count
    assert copies > 200, "the draw has become trivial"


@pytest.mark.parametrize("have,want", list(itertools.product(KINDS, KINDS)))
def test_every_pair_of_layouts_is_bitwise(kit, resharded, have, want):
    sources = [piece for rank in kit.layout(have, 4) for piece in kit.pieces(rank)]
    for rank in kit.layout(want, 3):
        targets = kit.blank(rank)
        assert resharded(sources, targets) == sum(len(data) for _, data in targets)
        kit.assert_equal(targets)


def test_copy_refuses_what_does_not_match():
    a = Address("t", (4,), (0,), (4,), 0, 4)
    data = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"torch.float32 in the checkpoint and torch.float64"):
        copy_overlap(a, data, a, data.double())
    with pytest.raises(CheckpointError, match=r"shape \(4,\) in the checkpoint and \(5,\)"):
        copy_overlap(a, data, Address("t", (5,), (0,), (4,), 0, 4), data)
    with pytest.raises(CheckpointError, match=r"addresses 4 elements"):
        copy_overlap(a, torch.zeros(3), a, data)
    assert copy_overlap(Address("u", (4,), (0,), (4,), 0, 4), data, a, data) == 0


@pytest.mark.parametrize(
    "address",
    [
        Address("t", (4,), (-1,), (4,), 0, 4),
        Address("t", (4,), (1,), (4,), 0, 4),
        Address("t", (4,), (0,), (4,), 3, 5),
        Address("t", (4,), (0,), (4,), 3, 2),
        Address("t", (4, 4), (0,), (4,), 0, 4),
        Address("t", (2**40, 2**40), (0, 0), (1, 1), 0, 1),
        Address("t", (1,) * 17, (0,) * 17, (1,) * 17, 0, 1),
    ],
)
def test_impossible_addresses_are_refused(address):
    with pytest.raises(CheckpointError, match="'t'"):
        boxes(address)


def test_tiling_fault_finds_the_first_gap_and_overlap(kit, seed):
    rng = random.Random(seed)
    for kind in KINDS:
        held = [address for rank in kit.layout(kind, 5) for address in rank]
        for name in {address.name for address in held}:
            mine = [a for a in held if a.name == name]
            shape = mine[0].shape
            parts = [box for a in mine for box in boxes(a)]
            rng.shuffle(parts)
            assert tiling_fault(shape, parts) is None, (kind, name)
            if not parts:
                continue
            damaged = parts.pop()
            assert tiling_fault(shape, parts) == f"element {list(damaged.offset)} is held by no piece", (kind, name)
            doubled = [*parts, damaged, damaged]
            assert tiling_fault(shape, doubled) == f"element {list(damaged.offset)} is held by 2 pieces", (kind, name)
