"""Times of a case's arms, interleaved, and their ratios: what the CPU's table and a GPU's share."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.kernels.setting import Case

Clock = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


def wall(call: Callable[[], object]) -> float:
    """Seconds on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def processor(call: Callable[[], object]) -> float:
    """CPU seconds of this process's threads: what remains comparable on a machine that others use."""
    start = time.process_time()
    call()
    return time.process_time() - start


def events(call: Callable[[], object]) -> float:
    """Seconds between two events of the GPU's stream, after its L2 cache was filled with something else."""
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


CLOCKS: dict[str, Clock] = {"wall": wall, "cpu": processor, "events": events}


def interleaved(case: Case, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of every arm in every round; what an arm destroys is restored outside the timing."""
    arms = list(case.arms)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for index in range(-2, rounds):
        for shift in range(len(arms)):
            arm = arms[(index + shift) % len(arms)]
            case.restore()
            taken = clock(case.arms[arm])
            if index >= 0:
                times[arm].append(taken)
    return times


def median(values: list[float]) -> float:
    """The middle value, or the mean of the middle two."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def ratio(times: dict[str, list[float]], arm: str, ours: str) -> str:
    """Median and quartiles of the rounds' ratios of ``arm`` to ``ours``, or - where there is no such arm."""
    if arm not in times or ours not in times:
        return "-"
    found = sorted(other / mine for other, mine in zip(times[arm], times[ours]))
    return f"{median(found):.2f} ({found[len(found) // 4]:.2f}-{found[(3 * len(found)) // 4]:.2f})"
