"""C++ kernels against torch eager and torch.compile, forward + backward, on this machine's CPU.

    python benchmarks/kernels/run.py [--ops rms_norm swiglu ...] [--rounds 9] [--clock wall|cpu] [--write]

Every op has a process of its own, where all its versions run with the same allocator settings and threads, one after
the other in every round, each round starting with another one; a ratio is the median of the rounds' ratios, with its
quartiles. Before an op is timed, its value and gradients are compared with the formula in fp64: where ours is red, no
speed is printed and the exit code is 1. ``--write`` puts the table into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Fresh pages for every large temporary would hide the arithmetic; every version gets the same settings.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
GOALS = {"rms_norm": 2.5, "cross_entropy": 3.5, "linear_cross_entropy": 1.5, "swiglu": 1.0,
         "attention_256": 2.0, "attention_1024": 2.0, "attention_4096": 2.0, "attention_1024_fp32": 1.0}  # fmt: skip
"""Least ratio to torch.compile that the project promises."""
MEMORY_GOAL = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds, for a busy machine")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        from benchmarks.kernels import cases

        print(cases.peak(args.peak))
        return 0
    environment = {**ALLOCATOR, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if any(os.environ.get(key) != value for key, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})
    from benchmarks.kernels import cases

    if args.one:
        return one(args.one, args.rounds, args.clock)
    rows, failed = [], False
    for name in args.ops or list(cases.CASES):
        command = [sys.executable, __file__, "--one", name, "--rounds", str(args.rounds), "--clock", args.clock]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout.strip(), flush=True)
        failed |= done.returncode != 0
        rows += [line for line in done.stdout.splitlines() if line.startswith("|")]
    table = "\n".join(heading(args.clock) + rows)
    if "linear_cross_entropy" in (args.ops or cases.CASES):
        table += "\n\n" + memory()
    print("\n" + table)
    if args.write and not failed:
        from benchmarks.kernels import docs

        docs.write("benchmarks/kernels/run.py", table)
    return int(failed)


def one(name: str, rounds: int, clock: str) -> int:
    """Check and time one op; prints its row, or why there is none."""
    from benchmarks.kernels import cases, setting, timing

    case = cases.CASES[name](setting.on_cpu())
    errors = case.errors()
    if not errors["megapre"] <= case.tolerance:
        print(f"{name}: error {errors['megapre']:.1e} against fp64, tolerance {case.tolerance:.1e}: not timed")
        return 1
    print(row(name, case, timing.interleaved(case, rounds, timing.CLOCKS[clock]), errors))
    return 0


def row(name: str, case, times: dict[str, list[float]], errors: dict[str, float]) -> str:
    from benchmarks.kernels.timing import median, ratio

    cells = [name, case.shape, f"{1e3 * median(times['megapre']):.2f}"]
    cells += [ratio(times, arm, "megapre") for arm in ("eager", "compile")]
    goal = "-"
    if name in GOALS:
        reached = median([b / a for a, b in zip(times["megapre"], times["compile"])]) >= GOALS[name]
        goal = f"{GOALS[name]:.1f} {'reached' if reached else 'missed'}"
    cells += [goal, " / ".join(f"{errors[arm]:.0e}" for arm in ("megapre", "eager", "compile") if arm in errors)]
    return "| " + " | ".join(cells) + " |"


def heading(clock: str) -> list[str]:
    import torch

    from megapre.random import native

    native.load()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    seconds = {"cpu": "CPU seconds", "wall": "wall time"}[clock]
    return [
        f"{model}, {torch.get_num_threads()} thread(s), {torch.ops.megapre.cpu_variant()}, torch {torch.__version__}. "
        f"Ratios above 1 mean that ours is faster; quartiles in brackets; {seconds}.",
        "",
        "| op | shape | ms | x eager | x compile | goal | error ours / eager / compile |",
        "|---|---|---|---|---|---|---|",
    ]


def memory() -> str:
    """Peak memory of linear + cross-entropy beyond its inputs and results, each version in its own process."""
    peaks = {}
    # Freed memory must go back at once here, or the count would start at the peak of the warm-up.
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    for arm in ("megapre", "eager", "compile"):
        command = [sys.executable, __file__, "--peak", arm]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[arm] = int(done.stdout.split()[-1])
    least = min(peaks["eager"], peaks["compile"]) / peaks["megapre"]
    told = ", ".join(f"{arm} {size / 2**20:.0f} MiB" for arm, size in peaks.items())
    verdict = "reached" if least >= MEMORY_GOAL else "missed"
    return (
        f"linear_cross_entropy, peak memory of forward + backward beyond inputs and results: {told}; "
        f"{least:.1f} times less than the better of the two, goal {MEMORY_GOAL:.0f} {verdict}."
    )


if __name__ == "__main__":
    sys.exit(main())
