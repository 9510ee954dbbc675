"""Runs of `megapre train` that are killed, stopped and compared with one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megapre.checkpoint import store
from megapre.config.load import to_toml
from megapre.config.schema import Config
from megapre.resilience.watch import children
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import corpus, job, losses, run, same

ROOT = Path(__file__).parents[2]
FOREVER = 10**6
SAVE_EVERY = 4


def ended(pid: int) -> bool:
    """Whether a process is gone, or a corpse that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class Run:
    """One run folder, and the launcher that trains in it."""

    def __init__(self, folder: Path, layout: str = "1x1x2+zero1", interval: int = SAVE_EVERY) -> None:
        self.folder, self.layout, self.interval = folder, layout, interval
        folder.mkdir(parents=True, exist_ok=True)
        self.prefix = corpus(folder / "text")
        self.run_dir = folder / "run"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "out.txt"

    def config(self, steps: int = FOREVER, run_dir: str = "run") -> Config:
        """A job whose learning rate does not depend on its length."""
        config = job(self.prefix, self.folder / run_dir, parse(self.layout), steps=steps, interval=self.interval)
        config = replace(config, schedule=replace(config.schedule, decay=100_000, warmup=5))
        config = replace(config, checkpoint=replace(config.checkpoint, keep_last=3))
        config = replace(config, train=replace(config.train, eval_interval=7))
        return replace(config, resilience=replace(config.resilience, max_restarts=1000))

    def start(self) -> None:
        (self.folder / "job.toml").write_text(to_toml(self.config()))
        command = [sys.executable, "-m", "megapre", "train", str(self.folder / "job.toml")]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)

    def ranks(self) -> list[int]:
        """Process ids of the ranks: the fork server's children."""
        assert self.process is not None
        return [rank for server in children(self.process.pid) for rank in children(server) if not ended(rank)]

    def steps(self) -> int:
        """The last step in the metrics."""
        return max(losses(self.run_dir), default=0) if (self.run_dir / "metrics.jsonl").exists() else 0

    def lines(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saving(self) -> bool:
        """Whether a save is under way."""
        return any((self.run_dir / "checkpoints").glob("*.partial-*"))

    def until(self, condition: Callable[[], object], seconds: float = 120.0, pause: float = 0.02) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process and self.process.poll() is None, self.tail()
            time.sleep(pause)

    def more(self, lines: int) -> None:
        """Wait for so many more lines of metrics."""
        seen = self.lines()
        self.until(lambda: self.lines() >= seen + lines)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self) -> int:
        """Ask for an orderly stop; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def newest(self) -> int:
        """Step of the newest finished checkpoint; 0 without one."""
        entries = store.list_checkpoints(self.run_dir / "checkpoints")
        return max((entry.step for entry in entries if entry.problem is None), default=0)

    def equals_undisturbed(self, pool: RankPool) -> int:
        """Assert that loss by loss and bit by bit this run is one that nobody disturbed; its last step."""
        steps, world = self.newest(), parse(self.layout).world
        config = self.config(steps, "whole")
        config = replace(config, checkpoint=replace(config.checkpoint, interval=0))
        assert pool.run(world, run, config, timeout=1200) == [0] * world
        mine, whole = losses(self.run_dir), losses(self.folder / "whole")
        assert {step: mine.get(step) for step in whole} == whole
        last = Path("checkpoints") / store.step_name(steps)
        same(self.folder / "whole" / last, self.run_dir / last)
        return steps


def kills(count: int, rng: random.Random, folder: Path, pool: RankPool, limit: float = 60.0) -> str:
    """SIGKILL a random rank ``count`` times, a third of them while a save is under way, then compare; a note.

    ``limit`` is the most seconds that the other ranks may live.
    """
    job_ = Run(folder)
    phases = {"starting": 0, "saving": 0, "any": 0}
    longest = 0.0
    try:
        job_.start()
        for _ in range(count):
            phase = rng.choices(list(phases), (1, 3, 5))[0]
            job_.until(lambda: len(job_.ranks()) == 2)
            if phase != "starting":
                job_.more(rng.randrange(2, 21))
            if phase == "saving":
                job_.until(job_.saving, pause=0.001)
            else:
                time.sleep(rng.uniform(0, 0.5))
            victims = job_.ranks()
            os.kill(rng.choice(victims), signal.SIGKILL)
            began = time.monotonic()
            job_.until(lambda v=victims: all(map(ended, v)), 60)  # type: ignore[misc]
            longest = max(longest, time.monotonic() - began)
            assert longest < limit, f"ranks lived for {longest:.1f} s after a kill while {phase}"
            phases[phase] += 1
        job_.more(4)
        assert job_.stop() == 75, job_.tail()
    finally:
        job_.close()
    steps = job_.equals_undisturbed(pool)
    told = ", ".join(f"{n} {phase}" for phase, n in phases.items())
    return f"{steps} steps; {told}; all ranks gone after at most {longest:.1f} s"


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    lines = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")
    return bool(int(lines[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1)


def signals(count: int, rng: random.Random, folder: Path, pool: RankPool, limit: float = 120.0) -> str:
    """SIGTERM or SIGUSR1 to supervisor, group or one rank at a random instant of the run's life, ``count`` times.

    ``limit`` is the most seconds from signal to end; start-up, which a busy machine stretches, is part of it.
    """
    job_ = Run(folder, interval=50)
    longest = 0.0
    try:
        for _ in range(count):
            before = job_.newest()
            job_.start()
            assert job_.process is not None
            job_.until(lambda: catches(job_.process.pid))  # type: ignore[union-attr]
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 4))  # still starting, or just begun
            else:
                job_.more(3)
                time.sleep(rng.uniform(0, 2))
            number = rng.choice((signal.SIGTERM, signal.SIGUSR1))
            ranks = [pid for pid in job_.ranks() if catches(pid)]
            target = rng.choice(("supervisor", "group", "rank") if ranks else ("supervisor", "group"))
            began = time.monotonic()
            if target == "group":
                os.killpg(job_.process.pid, number)
            else:
                os.kill(rng.choice(ranks) if target == "rank" else job_.process.pid, number)
            code = job_.process.wait(120)
            longest = max(longest, time.monotonic() - began)
            assert code == 75, (code, number, target, job_.tail())
            assert longest < limit, f"{longest:.0f} s after {number} to the {target}"
            assert all(map(ended, ranks)), "ranks outlive their supervisor"
            assert job_.newest() == max(job_.steps(), before), "steps were lost"
    finally:
        job_.close()
    steps = job_.equals_undisturbed(pool)
    return f"{steps} steps, 0 lost; longest {longest:.1f} s"


def soak(steps: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """``steps`` steps with saves and evaluations: memory, descriptors and threads of every rank stay what they were.

    Memory is the slope of a least-squares line through the second half, times ``steps``: what leaks goes on, while the
    heap settles (measured: 1.1% more after 6,800 steps, then the same for 3,200).
    """
    job_ = Run(folder, interval=100)
    seen: dict[int, list[tuple[int, int, int, int]]] = {}
    try:
        job_.start()
        job_.until(lambda: len(job_.ranks()) == 2 and job_.steps() > steps // 20, 3600)
        pids = job_.ranks()
        while (at := job_.steps()) < steps:
            for pid in pids:
                status = Path(f"/proc/{pid}/status").read_text()
                resident = int(status.split("VmRSS:")[1].split()[0])
                files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                seen.setdefault(pid, []).append((at, resident, files, int(status.split("Threads:")[1].split()[0])))
            time.sleep(1)
        assert job_.stop() == 75, job_.tail()
    finally:
        job_.close()
    notes = []
    for rows in seen.values():
        quarter = max(1, len(rows) // 4)
        early, late = rows[:quarter], rows[-quarter:]
        growth = steps * _slope([(r[0], r[1]) for r in rows[len(rows) // 2 :]])
        # A save in flight holds files and a thread: the least of each quarter is what stays.
        files, threads = (min(r[k] for r in late) - min(r[k] for r in early) for k in (2, 3))
        assert growth <= 0.01 and files <= 0 and threads <= 0, (growth, files, threads)
        notes.append(f"memory {growth:+.2%}")
    return f"{', '.join(notes)}; descriptors and threads +0"


def _slope(points: list[tuple[int, int]]) -> float:
    """Of the line through ``points``, as a share of their mean."""
    x, y = (sum(column) / len(points) for column in zip(*points))
    return sum((a - x) * (b - y) for a, b in points) / max(1, sum((a - x) ** 2 for a, _ in points)) / y
