"""The time of a training step with this tree's kernels, as a ratio to another tree's or to torch's ops.

    python benchmarks/kernels/step.py [--before TREE] [--jobs J1 J2] [--dtype bf16] [--rounds 5] [--shares]

J1 is GPT-2-like (6 layers of 384, sequences of 256, 16 of them, vocabulary 50304), J2 Llama-like (8 layers of 512,
sequences of 1024, 2 microbatches of 4, vocabulary 32000). Each arm is a process that builds the engine of ``megapre
train`` and runs its step(); arms take turns step by step under the launcher's allocator settings, and a ratio is the
median of the rounds' ratios. ``--before`` is a checkout of an earlier commit with its library built in place; without
it the other arm is this tree with ``[kernels]`` set to torch's ops and references.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "J1": {
        "model": dict(layers=6, hidden=384, heads=6, sequence=256, vocab_size=50304),
        "train": dict(global_batch=16, microbatch=16, threads=1, device="cpu"),
    },
    "J2": {
        "model": dict(
            layers=8, hidden=512, heads=8, kv_heads=4, ffn_hidden=1408, sequence=1024, vocab_size=32000, norm="rmsnorm",
            activation="swiglu", positions="rope", bias=False, tied_embeddings=False,
        ),
        "train": dict(global_batch=8, microbatch=4, threads=1, device="cpu"),
    },
}  # fmt: skip
PLAIN = dict(
    norm="torch", activation="torch", rope="reference", cross_entropy="reference", linear="reference",
    dropout="reference", optimizer="torch",
)  # fmt: skip
"""torch's own ops where it has one; ops of a key without a version of that name are left to auto."""


def stepper(name: str, dtype: str, plain: bool) -> Callable[[int], float]:
    """The engine's step on one fixed batch: number of the step -> its loss."""
    import torch

    from megapre.config.check import check
    from megapre.config.load import from_dict
    from megapre.data import loader
    from megapre.parallel.grid import single
    from megapre.training.engine import build

    tables = {**TABLES[name], "precision": {"dtype": dtype}, "kernels": PLAIN if plain else {}}
    config = check(from_dict(tables), 1)
    torch.set_num_threads(1)
    model, train = config.model, config.train
    engine = build(config, single(), torch.device("cpu"), model.vocab_size)
    generator = torch.Generator().manual_seed(1)
    batch = []
    for first in range(0, train.global_batch, train.microbatch):
        shape = (model.sequence, train.microbatch)
        tokens, targets = (torch.randint(model.vocab_size, shape, generator=generator) for _ in range(2))
        positions = torch.arange(model.sequence).unsqueeze(1).expand(shape).contiguous()
        samples = torch.arange(first, first + train.microbatch)
        batch.append(loader.Microbatch(tokens, targets, torch.ones(shape), positions, None, samples))
    count = model.sequence * train.global_batch
    if hasattr(loader, "Counts"):  # an earlier tree takes the number
        count = loader.Counts(count)
    return lambda step: float(engine.step(batch, count, step, 1e-3).loss)


def arm(name: str, dtype: str, plain: bool) -> None:
    """A step for every line on stdin; answers with wall and CPU seconds, the loss and the peak of memory in MiB."""
    run = stepper(name, dtype, plain)
    for step, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = run(step)
        used = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([*used, loss, peak]), flush=True)


def shares(name: str, dtype: str) -> str:
    """Where a step's time goes: each op's own share, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    run = stepper(name, dtype, False)
    for step in range(2):
        run(step)
    start = time.process_time()
    run(2)
    cpu = time.process_time() - start
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(3)
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    whole = sum(row.self_cpu_time_total for row in rows)
    told = [f"{row.key} {100 * row.self_cpu_time_total / whole:.1f}%" for row in rows[:14]]
    return f"{name} {dtype}: {cpu:.2f} CPU-s a step. " + ", ".join(told) + "."


def start(tree: Path, name: str, dtype: str, plain: bool) -> subprocess.Popen[str]:
    from megapre.resilience.environment import prepare

    environment = {**os.environ, "PYTHONPATH": str(tree)}
    prepare(environment, 1, single_host=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--arm", name, "--dtype", dtype, *(["--plain"] * plain)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=tree, env=environment, text=True, **pipes)


def step(process: subprocess.Popen[str]) -> list[float]:
    assert process.stdin is not None and process.stdout is not None
    print(file=process.stdin, flush=True)
    found: list[float] = json.loads(process.stdout.readline())
    return found


def median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def compare(name: str, dtype: str, before: Path | None, rounds: int) -> str:
    """One row of the table."""
    arms = [start(ROOT, name, dtype, False), start(before or ROOT, name, dtype, before is None)]
    for process in arms:
        step(process)
    found = []
    for index in range(rounds):
        order = (0, 1) if index % 2 else (1, 0)
        taken = {side: step(arms[side]) for side in order}
        found.append((taken[0], taken[1]))
    for process in arms:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    losses = [pair[0][2] - pair[1][2] for pair in found]
    assert max(map(abs, losses)) < 0.05, f"the arms do not learn alike: {losses}"
    wall, cpu = (median([theirs[i] / ours[i] for ours, theirs in found]) for i in (0, 1))
    ours, theirs = (median([pair[side][1] for pair in found]) for side in (0, 1))
    peaks = " / ".join(f"{found[-1][side][3]:.0f}" for side in (0, 1))
    return f"| {name} {dtype} | {ours:.2f} / {theirs:.2f} | {cpu:.2f} | {wall:.2f} | {peaks} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of megapre, built in place")
    parser.add_argument("--jobs", nargs="*", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shares", action="store_true", help="print where a step's time goes instead")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        arm(args.arm, args.dtype, args.plain)
        return
    if args.shares:
        for name in args.jobs:
            print(shares(name, args.dtype), flush=True)
        return
    print("| job | CPU-s a step, this tree / the other | ratio of CPU-s | ratio of wall time | peak RSS, MiB |")
    print("|---|---|---|---|---|", flush=True)
    for name in args.jobs:
        print(compare(name, args.dtype, args.before, args.rounds), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.environ.get("PYTHONPATH", str(ROOT)).split(":")[0])
    main()
