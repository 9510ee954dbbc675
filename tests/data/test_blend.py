from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from megapre.data import native
from megapre.data.blend import Blend, round_weights


def largest_error(blend: Blend, samples: int) -> float:
    """Distance of any source from its share after any prefix, in samples."""
    sources = np.array([blend.locate(n)[0] for n in range(samples)])
    prefix = np.arange(1, samples + 1)
    share = np.array(blend.counts) / blend.period
    return max(np.abs(np.cumsum(sources == i) - prefix * share[i]).max() for i in range(len(share)))


def check_ranks(blend: Blend, samples: int) -> None:
    """The ranks of a source count its samples."""
    seen = [0] * len(blend.counts)
    for n in range(samples):
        source, rank = blend.locate(n)
        assert rank == seen[source]
        seen[source] += 1


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_is_within_one_sample(seed):
    rng = random.Random(seed)
    k = rng.choice([2, 3, 5, 8, 30])
    weights = [rng.choice([1, 2, 3, 10, 0.5, 100]) for _ in range(k)]
    blend = Blend(weights)
    samples = min(2 * blend.period + 3, 4000)
    assert largest_error(blend, samples) <= 1 - 1 / (2 * k - 2) + 1e-9, f"seed {seed}: {weights}"
    check_ranks(blend, samples)


@pytest.mark.parametrize("weights", [[0.001, 0.999], [1e-6, 1], [1e-6, 1e-6, 1]])
def test_extreme_weights(weights):
    """B57: realised counts within one of the target at every prefix of a period, and ranks never out of range."""
    blend = Blend(weights)
    source = blend._source
    prefix = np.arange(1, blend.period + 1)
    for i, count in enumerate(blend.counts):
        taken = np.cumsum(source == i)
        assert np.abs(taken - prefix * (count / blend.period)).max() < 1
        assert taken[-1] == count
    first = blend.locate(5 * blend.period + int(np.argmax(source == 0)))
    assert first == (0, 5 * blend.counts[0])


def test_a_large_blend_is_quick():
    rng = random.Random(1)
    started = time.perf_counter()
    blend = Blend([0.01 + rng.random() for _ in range(1000)])
    assert time.perf_counter() - started < 4
    assert np.array_equal(np.bincount(blend._source), blend.counts)


def test_equal_weights_take_turns_from_a_tiny_table():
    blend = Blend([0.2] * 7)
    assert blend.period == 7
    assert sorted(blend.locate(n)[0] for n in range(7)) == list(range(7))


def test_a_single_source_needs_no_table():
    blend = Blend([0.3])
    assert blend.locate(10**15) == (0, 10**15) and blend._source is None


def test_weights_are_ratios():
    assert round_weights([1, 3]) == round_weights([0.25, 0.75]) == [1, 3]


def test_shares_are_met_to_half_a_unit():
    rng = random.Random(9)
    for weights in ([0.3, 0.7], [0.05, 0.15, 0.8], [1 / 3, 2 / 3], [rng.random() for _ in range(9)], [1e-5, 1]):
        counts = round_weights(weights)
        for weight, count in zip(weights, counts):
            # The long period need not be 2^20 exactly: its own share moves by the rounding of the others.
            assert abs(count / sum(counts) - weight / sum(weights)) <= (1 + len(weights)) * 0.5 / 2**20
    assert round_weights([0.05, 0.15, 0.8]) == [1, 3, 16] and round_weights([1e-5, 1]) == [5, 524283]


def test_refusals_name_the_path():
    with pytest.raises(ValueError, match=r"data\.weights\[1\] = 1e-07 \(b\) .* rounds to 0 .*data\.paths\[1\]"):
        round_weights([1, 1e-7], ["a", "b"])
    for weights in ([1, 0], [0, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match=r"data\.weights"):
            round_weights(weights)
    with pytest.raises(ValueError, match=r"data\.paths"):
        round_weights([])


def test_a_library_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "_data.so").write_bytes(b"half a copy")
    for path in (tmp_path / "_data.so", tmp_path / "gone.so"):
        assert native.missing(path).startswith(f"{path.name} is missing or older than its sources")
