"""Seconds per GB of state that saving and loading take, beside the raw disk, torch.save and DCP, in one run.

    python benchmarks/checkpoint/run.py --gb 1 --rounds 3 --dir build

One process, tensors of the sizes of a transformer layer with AdamW's moments. Every way is timed once a round, in turn;
medians are printed with their ratio to the raw disk, which writes the same bytes with one fsync, or reads them after
their pages were dropped from the cache. "blocked" is the time that training waits for an asynchronous save. "own CPU"
is the time that the calling thread computes, which a busy machine does not change much. The last line is the share of a
run's time that this blocks at the default cadence, `checkpoint.minutes`, and the state of a rank at which it is 1%.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megapre.checkpoint import store
from megapre.checkpoint.writer import Saver
from megapre.config.schema import CheckpointConfig
from megapre.parallel.placement import Address

GB = 1e9


def state(gb: float) -> dict[str, torch.Tensor]:
    """Weights and two moments of layers of 12 x 1024^2 parameters, fp32."""
    tensors, layer = {}, 0
    while sum(t.nbytes for t in tensors.values()) < gb * GB:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for name, rows in (("qkv", 3), ("out", 1), ("up", 4), ("down", 4)):
                tensors[f"{kind}/layers.{layer}.{name}"] = torch.randn(rows * 1024, 1024).flatten()
        layer += 1
    return tensors


def pieces(tensors: dict[str, torch.Tensor]) -> list[tuple[Address, torch.Tensor]]:
    return [(Address(n, (len(t),), (0,), (len(t),), 0, len(t)), t) for n, t in tensors.items()]


def forget(path: Path) -> None:
    """Drop a file's or folder's pages from the cache."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def synced(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default=None, help="on the disk to measure (default: a temporary folder)")
    args = parser.parse_args()
    if args.dir:
        os.makedirs(args.dir, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.dir))
    tensors = state(args.gb)
    size = sum(t.nbytes for t in tensors.values())
    items = pieces(tensors)
    saver = Saver(root / "async", rank=0, world=1, sync=store.SingleProcess(), say=print)
    if not saver.prepare(items, 0):
        print("the rows of the asynchronous save are those of a synchronous one")
    seconds: dict[str, list[float]] = {}

    used: dict[str, list[float]] = {}

    def row(name: str, action: Callable[[], object]) -> None:
        began = time.thread_time()
        seconds.setdefault(name, []).append(timed(action))
        used.setdefault(name, []).append(time.thread_time() - began)

    def raw_write() -> None:
        with open(root / "raw", "wb") as file:
            for tensor in tensors.values():
                file.write(tensor.numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def raw_read() -> None:
        buffer = memoryview(bytearray(64 * 2**20))
        with open(root / "raw", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def torch_save() -> None:
        torch.save(tensors, root / "torch.pt")
        with open(root / "torch.pt", "rb") as file:
            os.fsync(file.fileno())

    def dcp_save() -> None:
        shutil.rmtree(root / "dcp", ignore_errors=True)
        dcp.save(tensors, checkpoint_id=root / "dcp", no_dist=True)
        synced(root / "dcp")

    try:
        for step in range(args.rounds):
            row("write: raw disk", raw_write)
            row("write: megapre, asynchronous, blocked", lambda s=step: saver.save(s, items, {}))
            seconds.setdefault("write: megapre, asynchronous, until valid", []).append(
                seconds["write: megapre, asynchronous, blocked"][-1] + timed(saver.finish)
            )
            row("write: megapre, synchronous", lambda s=step: store.save(
                root / "sync", s, items, {}, rank=0, world=1, sync=store.SingleProcess()))  # fmt: skip
            row("write: torch.save + fsync", torch_save)
            row("write: DCP + fsync", dcp_save)
            ours = root / "sync" / store.step_name(step)
            for path in (root / "raw", ours, root / "torch.pt", root / "dcp"):
                forget(path)
            row("read: raw disk", raw_read)
            row("read: megapre, every chunk verified", lambda path=ours: store.load(path, items))
            row("read: torch.load", lambda: torch.load(root / "torch.pt"))
            row("read: DCP", lambda: dcp.load(tensors, checkpoint_id=root / "dcp", no_dist=True))
            for folder in ("async", "sync"):
                shutil.rmtree(root / folder)
    finally:
        shutil.rmtree(root)
    print(f"{size / GB:.2f} GB of state, {args.rounds} rounds, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        raw = statistics.median(seconds[name.split(":")[0] + ": raw disk"])
        median = statistics.median(values)
        own = f"{statistics.median(used[name]) / (size / GB):5.2f}" if name in used else "    -"
        print(f"{name:44} {median / (size / GB):6.2f} s per GB {own} of own CPU {median / raw:6.2f} x the raw disk")
    blocked = statistics.median(seconds["write: megapre, asynchronous, blocked"])
    print(cadence(blocked / (size / GB), CheckpointConfig().minutes))


def cadence(blocked: float, minutes: float) -> str:
    """What ``blocked`` seconds per GB cost when a rank saves every ``minutes``."""
    share = blocked / (60 * minutes + blocked)
    return (
        f"every {minutes:g} minutes, the default: blocked {share:.3%} of the time per GB of a rank's state, 1% at "
        f"{60 * minutes / 99 / blocked:.3g} GB"
    )


if __name__ == "__main__":
    main()
