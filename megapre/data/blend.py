"""Which source sample n comes from, and its rank there: one table per period, O(1) a sample.

Weights become integers over 2^20; the table is Tijdeman's chairman assignment ("The chairman assignment problem",
Discrete Mathematics 32, 1980): after any number of samples each source is less than one sample from its share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise
from math import fsum, gcd, isfinite

import numpy as np

from megapre.data import native

UNIT = 1 << 20
SHORT_PERIOD = 4096


def round_weights(weights: Sequence[float], names: Sequence[str] | None = None) -> list[int]:
    """Weights as small integers, whose shares are those of the weights to the nearest 2^-20.

    Weights that people write, like 0.3 and 0.7, have a period of a few samples within the same rounding, and then
    that is taken. Raises ValueError on a weight that is negative, not finite, or rounds to 0.
    """
    if not weights:
        raise ValueError("data.paths is empty: name at least one .bin/.idx prefix.")
    for i, weight in enumerate(weights):
        if not isfinite(weight) or weight < 0:
            raise ValueError(f"data.weights[{i}] = {weight} is not a share; shares are finite and positive.")
    total = fsum(weights)
    rounded = [round(weight / total * UNIT) if total > 0 else 0 for weight in weights]
    for i, units in enumerate(rounded):
        if units == 0:
            name = f" ({names[i]})" if names else ""
            share = weights[i] / total if total > 0 else 0.0
            raise ValueError(
                f"data.weights[{i}] = {weights[i]:g}{name} is {share:.3g} of the whole and rounds to 0 in units of "
                f"2^-20: give it at least {0.5 / UNIT:.2g} of the whole or drop data.paths[{i}]."
            )
    short = _short_period(np.asarray(weights, np.float64) / total)
    if short is not None:
        return short
    divisor = gcd(*rounded)
    return [units // divisor for units in rounded]


def _short_period(shares: np.ndarray) -> list[int] | None:
    """Counts of the shortest period up to 4,096 in which every share is met to half a unit of 2^-20."""
    for period in range(len(shares), SHORT_PERIOD + 1):
        exact = shares * period
        counts = np.rint(exact)
        if counts.min() >= 1 and np.abs(exact - counts).max() * UNIT <= 0.5 * period and counts.sum() == period:
            return [int(count) for count in counts]
    return None


def chairman(counts: Sequence[int]) -> np.ndarray:
    """Source of each slot of one period: int32 [sum(counts)], in which source i appears counts[i] times.

    Seat j of source i opens at slot ceil(((j - 1) + e) P / c) and is due by (j - e) P / c, with e = 1 / (2k - 2) for
    k sources; filling each slot with the open seat that is due first keeps every prefix within 1 - e.
    """
    k, period = len(counts), sum(counts)
    if k == 1:
        return np.zeros(period, np.int32)
    parts = 2 * k - 2
    source = np.repeat(np.arange(k, dtype=np.int32), counts)
    count = np.repeat(np.asarray(counts, np.int64), counts)
    seat = np.arange(period, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    opens = -(-(((seat - 1) * parts + 1) * period) // (count * parts))
    due = ((seat * parts - 1) * period) // (count * parts)
    by_due = np.lexsort((source, due))
    place = np.empty(period, np.int64)
    place[by_due] = np.arange(period)
    by_opening = np.argsort(opens, kind="stable")
    waiting = place[by_opening].tolist()
    ends = np.searchsorted(opens[by_opening], np.arange(1, period + 1), side="right").tolist()
    heap: list[int] = []
    seated = []
    taken = 0
    for end in ends:
        while taken < end:
            heappush(heap, waiting[taken])
            taken += 1
        seated.append(heappop(heap))
    return source[by_due[np.asarray(seated)]]


def _with_ranks(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`chairman` and the rank of each slot among its source's, int32: the definition that csrc/data follows."""
    source = chairman(counts)
    rank = np.empty(len(source), np.int32)
    first = np.cumsum(counts) - counts
    rank[np.argsort(source, kind="stable")] = np.arange(len(source)) - np.repeat(first, counts)
    return source, rank


class Blend:
    """Order of sources under fixed weights; the same whatever the length of the run."""

    def __init__(self, weights: Sequence[float], names: Sequence[str] | None = None) -> None:
        self.counts = round_weights(weights, names)
        self.period = sum(self.counts)
        self._source: np.ndarray | None = None
        if len(self.counts) > 1:
            self._source, self._rank = native.chairman(self.counts) or _with_ranks(self.counts)

    def locate(self, sample: int) -> tuple[int, int]:
        """Source of ``sample`` and its rank among all samples of that source."""
        if self._source is None:
            return 0, sample
        cycle, slot = divmod(sample, self.period)
        source = int(self._source[slot])
        return source, cycle * self.counts[source] + int(self._rank[slot])

    def count(self, source: int, samples: int) -> int:
        """Samples of ``source`` among the first ``samples``."""
        if self._source is None:
            return samples
        cycles, slots = divmod(samples, self.period)
        return cycles * self.counts[source] + int(np.count_nonzero(self._source[:slots] == source))

    def number(self, source: int, rank: int) -> int:
        """The sample that ``locate`` finds as ``source`` and ``rank``."""
        if self._source is None:
            return rank
        cycle, within = divmod(rank, self.counts[source])
        return cycle * self.period + int(np.flatnonzero(self._source == source)[within])


class StagedBlend:
    """Weights that change at given samples; a source goes on where the stage before left it.

    ``stages`` holds the first sample of each stage after the first, ``weights`` a share for every source in each. A
    source may have none in some stages, where it rests; ValueError when it has none in any.
    """

    def __init__(
        self, weights: Sequence[Sequence[float]], stages: Sequence[int], names: Sequence[str] | None = None
    ) -> None:
        self.starts = [0, *stages]
        if any(a >= b for a, b in pairwise(self.starts)) or len(self.starts) != len(weights):
            raise ValueError(f"data.stages = {list(stages)} must rise from above 0, with data.weights for each stage.")
        size = len(weights[0])
        for source in range(size):
            if all(shares[source] == 0 for shares in weights):
                name = f" ({names[source]})" if names else ""
                raise ValueError(f"data.paths[{source}]{name} has no weight in any stage: drop it.")
        self._used = [[i for i, share in enumerate(shares) if share] or [0] for shares in weights]
        single = len(weights) == 1
        self._blends = [
            Blend(shares if single else [shares[i] for i in used], names if single else None)
            for used, shares in zip(self._used, weights)
        ]
        self._before = [[0] * size]
        for stage in range(len(stages)):
            length, counts = self.starts[stage + 1] - self.starts[stage], list(self._before[-1])
            for place, source in enumerate(self._used[stage]):
                counts[source] += self._blends[stage].count(place, length)
            self._before.append(counts)

    @property
    def counts(self) -> list[int]:
        """Shares of the first stage as small integers."""
        return self._blends[0].counts

    def locate(self, sample: int) -> tuple[int, int]:
        """Source of ``sample`` and its rank among all samples of that source."""
        stage = bisect_right(self.starts, sample) - 1
        place, rank = self._blends[stage].locate(sample - self.starts[stage])
        source = self._used[stage][place]
        return source, self._before[stage][source] + rank

    def number(self, source: int, rank: int) -> int | None:
        """The sample that ``locate`` finds as ``source`` and ``rank``; None when no stage comes so far."""
        for stage, start in enumerate(self.starts):
            last = stage + 1 == len(self.starts)
            if source not in self._used[stage] or (not last and rank >= self._before[stage + 1][source]):
                continue
            return start + self._blends[stage].number(
                self._used[stage].index(source), rank - self._before[stage][source]
            )
        return None
