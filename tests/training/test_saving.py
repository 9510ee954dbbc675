"""When a run saves, and that a save which fails costs the run nothing but itself."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from megapre import cli
from megapre.checkpoint import store
from megapre.checkpoint.store import list_checkpoints
from megapre.checkpoint.writer import Saver
from megapre.config.load import to_toml
from megapre.config.schema import Config
from megapre.monitor.metrics import Monitor
from megapre.resilience.lock import run_lock
from megapre.resilience.ranks import Ranks
from megapre.training import trainer
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import corpus, events, job, losses, run, same


def run_on_a_full_disk(ranks: Ranks, config: Config, first: int, last: int) -> int:
    """Rank 1's shards of steps [first, last] find no space."""
    return on_a_full_disk(lambda: run(ranks, config), "rank_" if ranks.rank == 1 else "no file", first, last)


def on_a_full_disk(action: Callable[[], int], name: str, first: int, last: int) -> int:
    """``action``, in which files of that name find no space in checkpoints of steps [first, last]."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        step = path.parent.name[5:12]
        if name in path.name and step.isdigit() and first <= int(step) <= last:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    os.fsync = fsync
    try:
        return action()
    finally:
        os.fsync = real


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_step(pool: RankPool, tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "text")
    whole = job(prefix, tmp_path / "whole", parse("1x1x2+zero1"), steps=8, interval=0)
    assert pool.run(2, run, whole) == [0, 0]
    for mode in (True, False):
        config = job(prefix, tmp_path / f"run{mode}", parse("1x1x2+zero1"), steps=8, interval=2)
        config = replace(config, checkpoint=replace(config.checkpoint, async_save=mode))
        assert pool.run(2, run_on_a_full_disk, config, 4, 6) == [0, 0]
        root = Path(config.train.run_dir) / "checkpoints"
        assert [entry.step for entry in list_checkpoints(root)] == [2, 8], mode
        assert losses(Path(config.train.run_dir)) == losses(tmp_path / "whole")
        same(root / store.step_name(8), tmp_path / "whole" / "checkpoints" / store.step_name(8))
        told = events(Path(config.train.run_dir))
        assert [event["event"] for event in told] == ["start", "unsaved", "unsaved", "end"], told
        assert "rank 1 failed: No space left on device" in told[1]["reason"]


def run_and_count_copies(ranks: Ranks, config: Config) -> list[int]:
    """Checkpoints that were there each time that host memory for copies was allocated."""
    prepare, found = Saver.prepare, []

    def counted(saver: Saver, pieces: Any, budget: float) -> bool:
        found.append(len(list_checkpoints(saver.root)))
        return prepare(saver, pieces, budget)

    Saver.prepare = counted  # type: ignore[method-assign]
    try:
        assert run(ranks, config) == 0
    finally:
        Saver.prepare = prepare  # type: ignore[method-assign]
    return found


def test_memory_for_copies_is_taken_at_the_first_save_and_for_no_last_one(pool: RankPool, tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "text")
    for interval, wanted in ((0, []), (2, [0])):
        config = job(prefix, tmp_path / f"run{interval}", parse("1x1x1"), steps=4, interval=interval)
        assert pool.run(1, run_and_count_copies, config) == [wanted]


def test_a_last_save_that_fails_is_the_failure_of_the_run(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x1x2"), steps=4, interval=2)
    try:
        pool.run(2, run_on_a_full_disk, config, 4, 4)
    except Exception as error:
        assert "rank 1 failed: No space left on device" in str(error)
    else:
        raise AssertionError("the run claims to have saved")
    assert [entry.step for entry in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    assert "No space left on device" in events(tmp_path / "run")[-1]["error"]


def told_by_the_command(ranks: Ranks, path: Path) -> tuple[int, str]:
    """``megapre train`` as a user calls it, whose shard of step 4 finds no space: exit code and stderr."""
    said = StringIO()
    with redirect_stderr(said):
        code = on_a_full_disk(lambda: cli.main(["train", str(path)]), "rank_0", 4, 4)
    return code, said.getvalue()


def test_a_last_save_that_fails_is_told_in_one_sentence(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x1x1"), steps=4, interval=2)
    path = tmp_path / "job.toml"
    path.write_text(to_toml(config))
    ((code, said),) = pool.run(1, told_by_the_command, path)
    assert code == 1 and len(said.splitlines()) == 1 and said.startswith("megapre: the checkpoint was not saved"), said
    assert "No space left on device; step 4 was to be the last" in said


def run_on_a_slow_disk(ranks: Ranks, config: Config) -> int:
    """Every shard takes 0.6 s to be durable; rank 0 notes what is said, and the steps done then."""
    fsync, text, log, done = os.fsync, Monitor.text, Monitor.log, [0]

    def slow(descriptor: int) -> None:
        if "rank_" in os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")):
            time.sleep(0.6)
        fsync(descriptor)

    def say(self: Monitor, line: str) -> None:
        if ranks.rank == 0:
            with open(Path(config.train.run_dir) / "heard.txt", "a") as file:
                file.write(f"{done[0]} {line}\n")
        text(self, line)

    def note(self: Monitor, step: int, values: Mapping[str, float], *, split: str = "train") -> None:
        done[0] = step
        log(self, step, values, split=split)

    os.fsync, Monitor.text, Monitor.log = slow, say, note  # type: ignore[method-assign]
    try:
        return run(ranks, config)
    finally:
        os.fsync, Monitor.text, Monitor.log = fsync, text, log  # type: ignore[method-assign]


def test_a_slow_disk_holds_up_no_step_until_the_next_save_and_is_said_once(pool: RankPool, tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "text")
    whole = job(prefix, tmp_path / "whole", parse("1x1x2+zero1"), steps=12, interval=0)
    assert pool.run(2, run, whole) == [0, 0]
    config = job(prefix, tmp_path / "run", parse("1x1x2+zero1"), steps=12, interval=3)
    assert pool.run(2, run_on_a_slow_disk, config) == [0, 0]
    heard = (tmp_path / "run" / "heard.txt").read_text().splitlines()
    assert len([line for line in heard if "for the save of step" in line]) == 1, heard
    saved = [(int(line.split()[0]), int(line.split("step_")[1].split()[0])) for line in heard if " saved " in line]
    assert [step for _, step in saved] == [3, 6, 9, 12], "one after the other, none left out"
    assert all(step <= done <= step + 3 for done, step in saved) and any(done > step for done, step in saved), saved
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    last = Path("checkpoints") / store.step_name(12)
    same(tmp_path / "run" / last, tmp_path / "whole" / last)


def run_by_another_clock(ranks: Ranks, config: Config) -> int:
    """Time passes 20 s a look, on rank 0 alone: the others' clocks must not matter."""
    real = time.monotonic
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            now[0] += 20 if ranks.rank == 0 else 1e6
            return now[0] if ranks.rank == 0 else real()

    trainer.time = Clock  # type: ignore[assignment]
    try:
        return run(ranks, config)
    finally:
        trainer.time = time


def test_minutes_are_counted_on_one_rank_and_all_save_at_one_step(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x2x1"), steps=12, interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, minutes=1.0))
    assert pool.run(2, run_by_another_clock, config) == [0, 0]
    steps = [entry.step for entry in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps[-1] == 12 and 2 <= len(steps) < 8, steps
    assert all(b - a >= 2 for a, b in pairwise(steps[:-1])), steps
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if row.get("split") == "train"]) == 12


def test_a_folder_holds_one_run_at_a_time(tmp_path: Path) -> None:
    def other() -> subprocess.CompletedProcess[str]:
        code = (
            "import sys; from pathlib import Path; from megapre.checkpoint.store import SingleProcess\n"
            "from megapre.resilience.lock import run_lock\n"
            "with run_lock(Path(sys.argv[1]), 0, SingleProcess()): print('in')"
        )
        return subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)

    with run_lock(tmp_path / "run", 0, store.SingleProcess()):
        refused = other()
        assert refused.returncode == 1, refused.stdout
        told = f"run is in use by process {os.getpid()} on "
        assert told in refused.stderr and "set another train.run_dir" in refused.stderr
    assert other().stdout == "in\n", "the lock ends with its holder"
