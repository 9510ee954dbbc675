from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest

from megapre.data.blend import Blend
from megapre.data.order import (
    SampleOrder,
    derive_key,
    permute,
    short_block_slot,
    split_documents,
    two_level,
    two_level_place,
    unpermute,
)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 1000, 4099])
def test_permutation_is_a_bijection_with_its_inverse(size):
    key = derive_key(size, 5)
    image = [permute(i, size, key) for i in range(size)]
    assert sorted(image) == list(range(size))
    assert [unpermute(j, size, key) for j in image] == list(range(size))


@pytest.mark.parametrize("block, group", [(1, 1), (4, 16), (16, 65536), (3, 12)])
def test_two_levels_visit_every_window_once(block, group):
    for size in [*range(1, 80), 255, 1001]:
        key = derive_key(size, block)
        slot = short_block_slot(size, key, block)
        assert sorted(two_level(i, size, key, slot, block, group) for i in range(size)) == list(range(size)), size


def test_windows_stay_in_the_group_of_their_block():
    """Locality: the places of a group draw from no more blocks than a group holds (one may be shared)."""
    size, block, group = 1003, 4, 64
    slot = short_block_slot(size, 99, block)
    for start in range(0, size, group):
        blocks = {two_level(i, size, 99, slot, block, group) // block for i in range(start, min(start + group, size))}
        assert len(blocks) <= group // block + 2


def test_the_order_looks_random():
    """Neighbours in the order are not neighbours in the file, and each half of the file fills half of each half."""
    size = 100_000
    order = SampleOrder(7, 0, 0, size * 8 + 3, 8)
    windows = [order.window(r) for r in range(size)]
    mean_step = sum(abs(a - b) for a, b in pairwise(windows)) / size
    # Two independent uniform places are size / 3 apart; a second level of 65,536 places keeps it there.
    assert abs(mean_step - size / 3) < size * 0.02
    low = sum(w < size // 2 for w in windows[: size // 2])
    assert abs(low - size / 4) < size * 0.03


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_every_epoch_reads_each_token_at_most_once_and_leaves_out_fewer_than_a_window(length):
    rng = random.Random(length)
    for _ in range(30):
        lo = rng.randrange(50)
        hi = lo + length + 1 + rng.randrange(5 * length + 3)
        order = SampleOrder(rng.randrange(99), 1, lo, hi, length)
        for epoch in range(4):
            inputs: list[int] = []
            for rank in range(epoch * order.windows, (epoch + 1) * order.windows):
                assert order.epoch(rank) == epoch
                spans = order.spans(rank)
                tokens = [t for start, stop in spans for t in range(start, stop)]
                assert len(tokens) == length + 1 and min(tokens) >= lo and max(tokens) < hi
                inputs += tokens[:-1]
            assert len(set(inputs)) == len(inputs) > hi - lo - length


@pytest.mark.parametrize("length", [2, 3, 16, 100, 2048])
def test_phases_differ_from_epoch_to_epoch(length):
    order = SampleOrder(1, 0, 0, 10 * length, length)
    phases = [order.phase(epoch) for epoch in range(length)]
    assert sorted(phases) == list(range(length))


def test_permutations_of_epochs_sources_and_seeds_differ():
    """B60, B61: every epoch identical."""
    size = 64
    orders = {
        tuple(SampleOrder(seed, stream, 0, size * 4 + 1, 4).window(epoch * size + r) for r in range(size))
        for seed in (1, 2)
        for stream in (0, 1)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_last_sample_of_an_epoch_is_in_range():
    """B55: an index one too many, at the end of every epoch and at any size."""
    rng = random.Random(4)
    for _ in range(300):
        length, size = rng.randrange(1, 9), rng.randrange(2, 200)
        if size < length + 1:
            continue
        order = SampleOrder(rng.randrange(9), 0, 0, size, length)
        for rank in (0, order.windows - 1, order.windows, 3 * order.windows - 1):
            assert all(0 <= start < stop <= size for start, stop in order.spans(rank))


def test_a_trillion_tokens_cost_nothing():
    """B56: arithmetic beyond 32 bits, and no arrays."""
    started = time.perf_counter()
    order = SampleOrder(1, 0, 17, 10**12 + 17, 2048)
    assert order.windows == 10**12 // 2048
    seen = set()
    for rank in [*range(200), *range(order.windows - 100, order.windows + 100), 10**11]:
        for start, stop in order.spans(rank):
            assert 17 <= start < stop <= 10**12 + 17
        seen.add((order.epoch(rank), order.window(rank)))
    assert len(seen) == 401
    assert max(window for _, window in seen) > 2**28
    assert time.perf_counter() - started < 0.5


def test_two_months_of_steps_serve_every_window_once_an_epoch():
    """1e6 steps of 512 samples over 1e12 tokens: by algebra, by sampling, and all of the smallest source.

    Algebra: sample -> (source, rank) has an inverse and ranks count up without a gap, so no rank is left out or served
    twice; rank -> window has an inverse within its epoch, so no window is.
    """
    seed = random.randrange(2**32)
    rng, total, length = random.Random(seed), 10**6 * 512, 2048
    blend = Blend([0.9, 0.0998, 0.0002])
    orders = [SampleOrder(seed, i, 0, size, length) for i, size in enumerate((10**12, 3 * 10**9 + 7, 40_000 * length))]
    counts = [blend.count(source, total) for source in range(3)]
    assert sum(counts) == total, f"seed {seed}"
    for sample in rng.sample(range(total), 300):
        source, rank = blend.locate(sample)
        order = orders[source]
        epoch, place = divmod(rank, order.windows)
        state = order._at(epoch)
        window = order.window(rank)
        assert blend.number(source, rank) == sample and blend.count(source, sample) == rank, f"seed {seed}"
        assert 0 <= window < order.windows, f"seed {seed}"
        assert two_level_place(window, order.windows, state.key, state.short_slot) == place, f"seed {seed}"
    drawn = [blend.locate(sample) for sample in rng.sample(range(total), 20_000)]
    served = {(s, orders[s].epoch(rank), orders[s].window(rank)) for s, rank in drawn}
    assert len(served) == len(drawn), f"seed {seed}"
    smallest = orders[2]
    for epoch in range(counts[2] // smallest.windows + 1):
        ranks = range(epoch * smallest.windows, min((epoch + 1) * smallest.windows, counts[2]))
        windows = {smallest.window(rank) for rank in ranks}
        assert len(windows) == len(ranks), f"seed {seed}"
        assert len(ranks) < smallest.windows or windows == set(range(smallest.windows)), f"seed {seed}"


def test_too_few_tokens_are_refused_with_numbers():
    with pytest.raises(ValueError, match=r"here has 16 tokens .* 17 .*model\.sequence"):
        SampleOrder(1, 0, 4, 20, 16, "here")
    assert SampleOrder(1, 0, 4, 21, 16).windows == 1


def test_splits_are_whole_documents_in_order():
    assert split_documents(100, [0.98, 0.02, 0.0]) == [(0, 98), (98, 100), (100, 100)]
    assert split_documents(1, [0.98, 0.02, 0.0]) == [(0, 1), (1, 1), (1, 1)]
    assert split_documents(10, [8, 1, 1]) == [(0, 8), (8, 9), (9, 10)]
    assert split_documents(3_000_000_001, [1, 1, 1])[2][1] == 3_000_000_001
    for shares in ([], [0.0, 0.0], [1.0, -0.1]):
        with pytest.raises(ValueError, match=r"data\.split"):
            split_documents(10, shares)
