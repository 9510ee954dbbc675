"""Stops, kills and damage: what a run does when it does not end by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megapre.checkpoint import store
from megapre.config.load import to_toml
from megapre.config.schema import Config
from megapre.resilience.ranks import Ranks
from megapre.resilience.signals import StopRequest
from megapre.train import run as train
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import corpus, job, losses, run, same


class StopAfter(StopRequest):
    """Asks for a stop when it has been consulted ``calls`` times."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def requested(self) -> bool:
        self.calls -= 1
        return self.calls < 0


def run_and_stop_rank_1(ranks: Ranks, config: Config) -> int:
    return train(config, ranks, StopAfter(5) if ranks.rank == 1 else StopRequest())


def test_a_stop_asked_of_one_rank_stops_all_at_one_step_and_loses_none(pool: RankPool, tmp_path: Path) -> None:
    cell = parse("1x2x2+zero1")
    prefix = corpus(tmp_path / "text")
    whole = job(prefix, tmp_path / "whole", cell, interval=0)
    assert pool.run(4, run, whole) == [0] * 4
    stopped = job(prefix, tmp_path / "stopped", cell, interval=0)
    assert pool.run(4, run_and_stop_rank_1, stopped) == [75] * 4
    assert [entry.step for entry in store.list_checkpoints(tmp_path / "stopped" / "checkpoints")] == [5]
    assert pool.run(4, run, stopped) == [0] * 4
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    last = Path("checkpoints") / store.step_name(12)
    same(tmp_path / "whole" / last, tmp_path / "stopped" / last)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("2x1x1"), steps=4)
    assert pool.run(2, run, config) == [0] * 2
    first = losses(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / store.step_name(4)
    victim = newest / "rank_00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    (tmp_path / "job.toml").write_text(to_toml(config))
    again = [sys.executable, "-m", "megapre", "train", str(tmp_path / "job.toml")]
    said = subprocess.run(again, check=True, capture_output=True, text=True).stdout
    assert "rank_00001.safetensors" in said and "step_0000003 at step 3" in said
    assert losses(tmp_path / "run") == first  # step 4 was run again, to the same bits
    assert store.check(newest) == []


def wait_for(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@pytest.mark.parametrize("grid", [{}, {"tensor": 2}], ids=["alone", "launched"])
def test_sigterm_saves_and_returns_75_then_the_run_goes_on(grid: dict[str, int], tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x1x1"), steps=10_000, interval=0)
    config = replace(config, parallel=replace(config.parallel, **grid))
    config = replace(config, train=replace(config.train, eval_interval=0))
    (tmp_path / "job.toml").write_text(to_toml(config))
    process = subprocess.Popen([sys.executable, "-m", "megapre", "train", str(tmp_path / "job.toml")])
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
        process.wait()
    saved = store.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(saved) == 1 and saved[0].problem is None
    more = [f"train.steps={saved[0].step + 2}"]
    assert subprocess.run([sys.executable, "-m", "megapre", "train", str(tmp_path / "job.toml"), *more]).returncode == 0
    assert max(losses(tmp_path / "run")) == saved[0].step + 2
