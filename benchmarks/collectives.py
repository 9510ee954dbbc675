"""Bus bandwidth and latency of gloo between two local ranks: the network part of a CPU profile.

``python benchmarks/collectives.py`` prints them; ``benchmarks/gemm.py --profile`` writes them into a profile.
"""

from __future__ import annotations

import statistics
import time

import torch

from megapre.config.check import check
from megapre.config.load import from_dict
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.verify.pool import RankPool

SIZES = (1 << 12, 1 << 24)
"""Bytes: one that shows the latency, one that shows the bandwidth."""
ROUNDS = 9


def time_reductions(ranks: Ranks) -> list[float]:
    """Median CPU seconds of an all-reduce of each size."""
    config = check(from_dict({"parallel": {"data": ranks.world}, "train": {"global_batch": 8}}), ranks.world)
    found = []
    with connected(config, ranks) as (grid, _):
        for size in SIZES:
            tensor, times = torch.ones(size // 4), []
            for _ in range(ROUNDS):
                start = time.process_time()
                grid.data.all_reduce(tensor).wait()
                times.append(time.process_time() - start)
            found.append(statistics.median(times))
    return found


def measure() -> tuple[float, float]:
    """(GB/s of bus bandwidth, seconds of latency) of an all-reduce over two ranks."""
    with RankPool(2) as pool:
        short, long = (max(times) for times in zip(*pool.run(2, time_reductions)))
    # Over two ranks a ring moves 2 x 1/2 of the bytes.
    return (SIZES[1] - SIZES[0]) / (long - short) / 1e9, short


if __name__ == "__main__":
    bandwidth, latency = measure()
    print(f"gloo over 2 local ranks: {bandwidth:.2f} GB/s, {1e6 * latency:.0f} us")
