"""Stragglers: named with how much and where, others are not."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre.config.schema import Config
from megapre.data.loader import Loader, StepBatch
from megapre.parallel.pipeline.executor import _Run
from megapre.resilience import pace
from megapre.resilience.pace import LEAST, SLOW, Waits, slow
from megapre.resilience.ranks import Ranks
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.resilience.test_guard import heard, patched, run_with
from tests.training.jobs import corpus, job


@pytest.mark.parametrize("times", [1.2, 2.0, 10.0])
def test_who_is_slow(times: float) -> None:
    best: dict[int, float] = {}
    laps = [(0, 0.10), (0, 0.11), (0, 0.10), (0, 0.09), (1, 0.3), (1, 0.31)]
    assert slow(laps, best) == {}, "the last stage has more work"
    laps[2] = (0, 0.10 * times)
    assert list(slow(laps, best)) == [2]
    told = slow(laps, best)[2]
    assert told == f"{times * 100:.0f} ms a step for itself, {times:.2f} times the median of the 4 ranks of its stage"


def test_two_ranks_are_compared_with_the_faster_and_one_alone_with_its_past() -> None:
    best: dict[int, float] = {}
    assert list(slow([(0, 0.2), (0, 0.1)], best)) == [0]
    best = {}
    assert slow([(0, 0.1), (1, 0.1)], best) == {}
    assert slow([(0, 0.1), (1, 0.14)], best) == {}
    found = slow([(0, 0.1), (1, 0.16)], best)
    assert list(found) == [1] and "1.60 times its own best" in found[1]


def test_rounding_of_short_steps_is_no_news() -> None:
    assert slow([(0, 1e-4), (0, 1e-4 * SLOW * 2 + LEAST / 2)], {}) == {}


def test_what_a_rank_waits_is_not_its_own_time() -> None:
    class Slow:
        def wait(self) -> str:
            time.sleep(0.2)
            return "result"

    waits = Waits(torch.device("cpu"))
    waits.lap()
    assert waits.around(Slow()).wait() == "result"
    time.sleep(0.05)
    assert 0.04 < waits.lap() < 0.2
    assert waits.lap() < 0.04


def test_on_a_gpu_nobody_waits_for_the_step_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest event is never waited for; a step is measured when the next one has been queued."""
    clock, made = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            made.append(self)

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            assert self is not made[-1], "the step that was just queued is waited for"

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    class Queued:
        def wait(self) -> None:
            clock[0] += 30

    monkeypatch.setattr(pace, "Event", Event)
    waits = Waits(torch.device("cuda"))
    laps = []
    for own in (100.0, 200.0, 400.0):
        clock[0] += own
        waits.around(Queued()).wait()
        laps.append(waits.lap())
    assert laps == [None, pytest.approx(0.1), pytest.approx(0.2)]


def run_slow(ranks: Ranks, config: Config, where: str) -> int:
    """Rank 1 takes a tenth of a second longer in one phase of every step."""
    owner, name = {"loader": (Loader, "step_batch"), "backward": (_Run, "backward")}[where]
    real = getattr(owner, name)

    def delayed(self: Any, *args: Any, **named: Any) -> StepBatch:
        if ranks.rank == 1:
            time.sleep(0.1)
        return real(self, *args, **named)

    with patched(owner, name, delayed):
        code = run_with(ranks, config, "", 0, -1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    return code


@pytest.mark.parametrize("where", ["loader", pytest.param("backward", marks=pytest.mark.nightly)])
def test_a_rank_that_is_slow_is_named_with_its_phase_within_twenty_steps(
    where: str, pool: RankPool, tmp_path: Path
) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x2x2"), steps=20, interval=0)
    config = replace(config, train=replace(config.train, eval_interval=0))
    assert pool.run(4, run_slow, config, where) == [0] * 4
    told = re.findall(r"step (\d+): rank 1 is slow: .* ms a step for itself, .* mostly in (\w+)", heard(config))
    assert told and int(told[0][0]) <= 20, heard(config)


def test_a_run_that_ends_no_longer_looks_at_its_suspect(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x2x2"), steps=10, interval=0)
    assert pool.run(4, run_slow, config, "loader") == [0] * 4  # a suspect since step 8
