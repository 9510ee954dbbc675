"""Running out of memory leaves a snapshot behind and stays the error that it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre.config.schema import Config
from megapre.resilience.memory import ran_out, snapshot_on_exhaustion
from megapre.resilience.ranks import Ranks
from megapre.training.step import TrainStep
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.resilience.test_guard import patched
from tests.training.jobs import corpus, job, run


def test_the_hosts_own_refusal_is_one(tmp_path: Path) -> None:
    held = torch.empty(7, 10_000_019)  # larger than what other tests left: the largest are listed
    with pytest.raises(RuntimeError, match="allocate"), snapshot_on_exhaustion(tmp_path / "log", 3):
        torch.empty(2**56, dtype=torch.uint8)
    found = json.loads((tmp_path / "log" / "oom_rank_3.json").read_text())
    assert found["memory"]["host_gib"] > 0 and "allocate" in found["error"]
    mine = next(entry for entry in found["tensors"] if entry["shape"] == [7, 10_000_019])
    assert mine["bytes"] == held.nbytes * mine["count"] and mine["dtype"] == "float32" and mine["device"] == "cpu"


def test_other_errors_leave_nothing_and_a_full_disk_hides_none(tmp_path: Path) -> None:
    assert not ran_out(RuntimeError("size mismatch")) and ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="mismatch"), snapshot_on_exhaustion(tmp_path, 0):
        raise RuntimeError("size mismatch")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(MemoryError), snapshot_on_exhaustion(tmp_path / "file" / "log", 0):
        raise MemoryError


def run_out(ranks: Ranks, config: Config) -> int:
    real = TrainStep.__call__

    def step(self: TrainStep, microbatches: Any, targets: Any, index: int, lr: float) -> Any:
        if ranks.rank == 1 and index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, microbatches, targets, index, lr)

    with patched(TrainStep, "__call__", step):
        return run(ranks, config)


def test_a_run_leaves_that_of_the_rank(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x1x2"), steps=4, interval=0)
    with pytest.raises(Exception, match=r"out of memory|closed|reset"):
        pool.run(2, run_out, config)
    found = json.loads((tmp_path / "run" / "log" / "oom_rank_1.json").read_text())
    assert "Tried to allocate 2.00 GiB" in found["error"] and any(e["shape"] for e in found["tensors"])
