"""The counted series of faults: ``python -m tests.faults.series [--full] [--rows NAMES] [--count N] [--seed N]``.

Each row repeats one kind of fault and counts; the table says what was asked and what was done. A row that fails says
at which seed, and the others still run. Exit code 1 when one failed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megapre.checkpoint import format as disk
from megapre.checkpoint import store
from megapre.checkpoint.store import load
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.checkpoint import test_damage, test_writer
from tests.checkpoint.conftest import Kit
from tests.faults import chaos
from tests.resilience import test_peers
from tests.resilience.test_guard import guarded, heard, last, run_with
from tests.resilience.test_launcher import Job, gone
from tests.training.jobs import corpus, job, losses, run, same

ROOT = Path(__file__).parents[2]
Body = Callable[[int, random.Random, Path, RankPool], str]


def crash_points(layouts: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """Every operation of saves of several layouts, synchronous and not, and every loss of power."""
    points = 0
    for number, kind in enumerate(("row", "flat", "column", "zero_in_column")[:layouts]):
        kit = Kit(rng.randrange(2**32))
        addresses = kit.layout(kind, 1)[0]
        kit.whole = lambda addresses=addresses: addresses  # type: ignore[method-assign, misc]
        for step, death in itertools.product((2, 1), ("kill", "error")):
            for name, body in (("sync", test_damage.every_end), ("async", test_writer.every_end)):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(os, "fsync", lambda descriptor: None)
                    points += body(fresh(folder, f"{number}{name}{step}{death}"), kit, patch, step, death)
        for step, mode in itertools.product((2, 1), ("sync", "async")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", lambda descriptor: None)
                points += test_writer.every_loss(fresh(folder, f"{number}{mode}{step}"), kit, patch, rng, step, mode)
    return f"{points} points, a checkpoint loads after each"


def fresh(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def two_checkpoints(folder: Path, rng: random.Random, patch: pytest.MonkeyPatch) -> tuple[tuple[Path, Path], Kit]:
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setattr(disk, "CHUNK", 128)
    patch.setattr(store, "_SLICE", 96)
    kit = Kit(rng.randrange(2**32))
    return (kit.save(folder, 10, "flat"), kit.save(folder, 20, "flat")), kit


def damage(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """Flipped bits and truncations, then swapped, stale and missing files."""
    with pytest.MonkeyPatch.context() as patch:
        two, kit = two_checkpoints(folder, rng, patch)
        test_damage.damage(two, kit, rng, count)
        test_damage.exchange(two, kit)
    return "0 silent; swapped, stale and missing files too"


LAYOUTS = (
    ("row", 1), ("row", 2), ("row", 3), ("column", 2), ("column", 4), ("middle", 2), ("middle", 3), ("flat", 2),
    ("flat", 11), ("replicas", 3), ("zero_in_column", 4), ("zero_in_column", 6),
)  # fmt: skip


def reshard(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """Ordered pairs of twelve layouts of up to eleven writers, ragged tensors of seven types."""
    pairs = list(itertools.permutations(LAYOUTS, 2))
    kit, paths = Kit(rng.randrange(2**32)), {}
    for source, target in rng.sample(pairs, count):
        if source not in paths:
            paths[source] = kit.save(folder / f"{source[0]}{source[1]}", 1, *source)
        for addresses in kit.layout(*target):
            wanted = kit.blank(addresses)
            load(paths[source], wanted)
            kit.assert_equal(wanted)
    return f"of {len(pairs)} pairs"


def hangs(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """Stopped ranks on one host, cut links between two hosts, and ranks ten times as slow that must live."""
    kinds = [("stop", "stop", "stop", "cut", "slow")[n % 5] for n in range(count)]
    slowest = {"stop": 0.0, "cut": 0.0}
    for number, kind in enumerate(kinds):
        place = fresh(folder, str(number))
        if kind == "cut":
            pair = test_peers.Hosts(place, "loop", 5.0)
            try:
                took = test_peers.cut_and_time(pair, 5.0)
                assert took < 5 + 5, pair.text()
                for log, other in zip(pair.logs, (1, 0)):
                    assert f"node {other} has not been heard" in log.read_text(), pair.text()
                slowest[kind] = max(slowest[kind], took)
            finally:
                pair.close()
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HEARTBEAT", "2")
            one = Job(place, 3, "loop" if kind == "stop" else "slow")
        try:
            one.until(lambda one=one: len(one.pids()) == 3)  # type: ignore[misc]
            time.sleep(rng.uniform(1, 3))
            if kind == "slow":
                time.sleep(8)
                assert "hung" not in one.text() and "restart" not in one.text(), one.text()
            else:
                slowest[kind] = max(slowest[kind], stop_one(one, rng))
            one.process.send_signal(signal.SIGTERM)
            assert one.code() == 75, one.text()
        finally:
            if one.process.poll() is None:
                os.killpg(one.process.pid, signal.SIGKILL)
    return (
        f"{kinds.count('stop')} stopped (2 s heartbeat, all gone after at most {slowest['stop']:.1f} s), "
        f"{kinds.count('cut')} cut (5 s, {slowest['cut']:.1f} s), {kinds.count('slow')} slow and alive"
    )


def stop_one(one: Job, rng: random.Random) -> float:
    """SIGSTOP a random rank; seconds until the attempt is gone, the culprit named and all started again."""
    victims, culprit = one.pids(), rng.randrange(3)
    began = time.monotonic()
    os.kill(one.pids(rank=culprit)[-1], signal.SIGSTOP)
    one.until(lambda: "hung for" in one.text())
    named = time.monotonic()
    one.until(lambda: all(gone(pid) for pid in victims))
    took = time.monotonic() - began
    assert took < 2 + 2 + GONE and began + took - named < GONE, f"{took:.1f} s, {named - began:.1f} s of them silent"
    one.until(lambda: len(one.pids()) == 6)
    assert re.findall(r"rank (\d) hung", one.text()) == [str(culprit)], one.text()
    return took


def numerics(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """NaN in a loss or gradient, spikes, flipped weights: named, and the bits of the run that they must end as."""
    prefix = corpus(folder / "text")
    kinds = {kind: 0 for kind in ("loss", "gradient", "flip", "spike")}
    settings: dict[str, dict[str, Any]] = {
        "loss": {}, "gradient": {"on_nonfinite": "rerun"}, "flip": {"digest_interval": 2},
        "spike": {"spike_zscore": 12.0, "spike_window": 16},
    }  # fmt: skip
    for number in range(count):
        kind, culprit = rng.choice(list(kinds)), rng.randrange(4)
        steps, when = (24, rng.randrange(17, 23)) if kind == "spike" else (8, rng.randrange(3, 8))
        base = job(prefix, folder / f"whole{number}", parse("1x1x4"), steps=steps, interval=2)
        base = guarded(base, **settings[kind])
        if kind == "spike":
            base = replace(base, data=replace(base.data, skip_batches=[when]))
        faulty = replace(base, train=replace(base.train, run_dir=str(folder / f"run{number}")))
        faulty = replace(faulty, data=replace(faulty.data, skip_batches=[]))
        times, at = (10**6, -1) if kind == "spike" else (10**6 if kind == "loss" else 1, culprit)
        assert pool.run(4, run_with, faulty, kind, at, when, times) == [0] * 4
        said, told = heard(faulty), f"{kind} on rank {culprit} at step {when}"
        if kind == "loss":
            assert f"the loss of rank {culprit}" in said and "the step was skipped" in said, (told, said)
            assert store.read_state(last(faulty))["optimizer_steps"] == steps - 1, told
        else:
            named = {
                "gradient": "on rank",
                "flip": f"of rank {culprit} is not what 3",
                "spike": f"without batch {when}",
            }
            assert named[kind] in said and "going on from step" in said, (told, said)
            assert pool.run(4, run, base) == [0] * 4
            same(last(base), last(faulty))
            assert losses(folder / f"run{number}") == losses(folder / f"whole{number}"), told
        kinds[kind] += 1
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def blocked(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """What the benchmark of checkpoints says of a state of ``count`` hundredths of a GB."""
    command = [sys.executable, "benchmarks/checkpoint/run.py", "--gb", str(count / 100), "--dir", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    found = re.search(r"blocked\s+([\d.]+) s per GB", done.stdout)
    assert found, done.stdout
    return f"training blocked {found[1]} s per GB (goal 0.8)"


def fuzz(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """Crafted files under the audit hook, then ``count`` spoilt manifests, roots and data files."""
    nodes = ["tests/faults/test_hostile.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *nodes]
    crafted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert crafted.returncode == 0, crafted.stdout[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        two, kit = two_checkpoints(folder / "m", rng, patch)
        test_damage.craft_manifests(two, kit, rng, count // 4)
        two, kit = two_checkpoints(folder / "r", rng, patch)
        test_damage.craft_roots(two, kit, rng, count // 4)
    env = {**os.environ, "MEGAPRE_FUZZ": str(count // 2), "PYTHONPATH": "."}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/data/test_fuzz.py", "-m", "not nightly"]
    data = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert data.returncode == 0, data.stdout[-3000:]
    return "34 crafted files and the spoilt ones: 0 code run, 0 files outside, 0 over-allocations"


GONE = 5.0
"""Seconds within which all ranks are gone after one was killed, or found to hang."""


def kills(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """As `chaos.kills`, with the limit of the promise."""
    return chaos.kills(count, rng, folder, pool, limit=GONE)


def signals(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
    """As `chaos.signals`, within the 30 s that schedulers and torchrun leave before SIGKILL."""
    return chaos.signals(count, rng, folder, pool, limit=30.0)


@dataclass(frozen=True)
class Row:
    """One kind of fault."""

    name: str
    text: str
    body: Body
    nightly: int
    full: int


ROWS = (
    Row("kills", "SIGKILL of a random rank, saves included: bitwise the undisturbed run", kills, 30, 200),
    Row("crashes", "layouts whose saves end at every operation, and lose power after each", crash_points, 1, 4),
    Row("damage", "bit flips and truncations: named, the checkpoint before is used", damage, 500, 10_000),
    Row("reshard", "ordered pairs of layouts saved and loaded bitwise", reshard, 30, 132),
    Row("hangs", "stopped ranks, cut links, slow ranks: culprit right, in time, slow ones alive", hangs, 10, 50),
    Row("signals", "SIGTERM and SIGUSR1 at any time: saved, 0 steps lost, within 30 s", signals, 20, 100),
    Row("numerics", "NaN, spike, flipped weight: named, bitwise what it must end as", numerics, 30, 300),
    Row("blocked", "hundredths of a GB saved asynchronously", blocked, 25, 100),
    Row("fuzz", "spoilt files read", fuzz, 2_000, 1_000_000),
    Row("soak", "steps: memory slope at most 1%, descriptors and threads constant", chaos.soak, 0, 10_000),
)
LINE = "| {:<8} | {:<82} | {:>10} | {:>6} | {} |"


def play(row: Row, count: int, pool: RankPool, seed: int) -> tuple[bool, str, float]:
    """Run one row; whether it held, what it found, and its seconds."""
    folder, began = Path(tempfile.mkdtemp(prefix=f"megapre-{row.name}-")), time.monotonic()
    try:
        note, held = row.body(count, random.Random(seed), folder, pool), True
        shutil.rmtree(folder, ignore_errors=True)
    except Exception as error:
        traceback.print_exc()
        pool.close()
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        note, held = f"FAILED with seed {seed} in {folder}: {first}", False
    return held, note, time.monotonic() - began


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="count faults that a run survives")
    parser.add_argument("--full", action="store_true", help="the counts of a release (hours)")
    parser.add_argument("--rows", default="", help=f"names separated by commas, of {', '.join(r.name for r in ROWS)}")
    parser.add_argument("--count", type=int, default=0, help="this many of each row")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = set(filter(None, args.rows.split(","))) or {row.name for row in ROWS}
    if unknown := wanted - {row.name for row in ROWS}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}")
    # What the runs print is theirs: the table stays readable.
    shown, noise = os.fdopen(os.dup(1), "w"), Path(tempfile.gettempdir(), f"megapre-series-{os.getpid()}.log")
    with noise.open("w") as file:
        os.dup2(file.fileno(), 1)
    print(f"seed {args.seed}; the runs print to {noise}", file=shown, flush=True)
    table, bad = [LINE.format("row", "what", "held", "s", "note"), "|---|---|---|---|---|"], 0
    with RankPool(8) as pool:
        for row in ROWS:
            count = args.count or (row.full if args.full else row.nightly)
            if row.name not in wanted or not count:
                continue
            held, note, seconds = play(row, count, pool, args.seed)
            bad += not held
            table.append(LINE.format(row.name, row.text, f"{count if held else 'not'}/{count}", f"{seconds:.0f}", note))
            print(table[-1], file=shown, flush=True)
    print("\n" + "\n".join(table), file=shown, flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
