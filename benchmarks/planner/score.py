"""How far predictions are from published measurements, beside what a constant HFU and repeated rows reach.

``python benchmarks/planner/score.py [TABLE.csv] [--leave-out] [--detail FILE]``. TABLE may be a raw table of
published rows; families that the constants were never fitted to are marked with a star.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from fit import Frozen, fit, scored, timed
from rows import RUNS, Run, read

from megapre.planner import hardware
from megapre.planner.constants import Constants, load
from megapre.planner.job import Job, Layout, Shape, Stack
from megapre.planner.memory import fullest
from megapre.planner.pipeline import Costs, pipeline_time
from megapre.planner.timing import predict

GIB = 2.0**30
Errors = dict[str, float]
SHAPE = Shape(64, 1024, 8, 8, 128, 4096, 32000, 2048)
"""Any model: for schedules whose stages' costs are given."""


def step_errors(runs: Iterable[Run], constants: Constants) -> Errors:
    """id -> predicted / measured - 1."""
    made: dict[Job, float] = {}
    for run in runs:
        if run.job not in made:
            made[run.job] = predict(run.job, constants).step
    return {run.id: made[run.job] / run.seconds - 1 for run in runs}


def hardware_flops(job: Job) -> float:
    """FLOPs that the devices execute, recomputation included, per device and second of peak."""
    again = 4 / 3 if job.layout.recompute == "full" else 1.0
    peak = job.device.peak["fp8" if job.stack.dtype == "fp8" else "bf16"]
    attention = 1.0 if job.stack.attention == "unfused" else 0.5
    return job.shape.model_flops(job.tokens, attention) * again / (peak * job.layout.ranks)


def naive(runs: Sequence[Run]) -> Errors:
    """The same with one HFU per family, the median of the very rows it is scored on."""
    found = {}
    for _, group in grouped(runs):
        utilisation = np.median([hardware_flops(run.job) / run.seconds for run in group])
        found |= {run.id: hardware_flops(run.job) / utilisation / run.seconds - 1 for run in group}
    return found


def by(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Runs in groups of one key."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups


def grouped(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by family."""
    return sorted(by(runs, lambda run: run.family).items())


def noise(runs: Sequence[Run]) -> np.ndarray:
    """Distances of runs with the same description from their median: what no model of the description can beat."""
    groups: dict[tuple[str, Job], list[float]] = defaultdict(list)
    for run in runs:
        groups[run.family, run.job].append(run.seconds)
    return np.array(
        [abs(s / np.median(group) - 1) for group in groups.values() if len(group) > 1 for s in group] or [0.0]
    )


def told(errors: Iterable[float]) -> str:
    """Median, mean and 90th percentile in percent."""
    size = 100 * np.abs(np.fromiter(errors, float))
    return f"{np.median(size):6.1f} {size.mean():6.1f} {np.quantile(size, 0.9):6.1f}"


def print_times(runs: Sequence[Run], constants: Constants, left_out: Errors | None) -> Errors:
    """The table by family."""
    ours, constant = step_errors(runs, constants), naive(runs)
    print(f"{'step time, % error':22}{'n':>5} | {'ours: median mean p90':>21} | {'constant HFU':>20} |"
          f"{' left out: median mean p90' if left_out else ''}")  # fmt: skip
    fitted = {run.family for run in timed(read())}
    for family, group in [*grouped(runs), ("all", list(runs))]:
        ids = [run.id for run in group]
        star = "" if family in fitted or family == "all" else " *"
        line = f"{family + star:22}{len(ids):>5} |  {told(ours[i] for i in ids)} | {told(constant[i] for i in ids)} |"
        known = [left_out[i] for i in ids if i in left_out] if left_out else []
        print(line + (f"  {told(known)}" if known else ""))
    floor = noise(runs)
    print(f"noise floor: {len(floor)} runs share their description with another; {told(floor)}")
    return ours


def print_memory(runs: Sequence[Run]) -> None:
    """Peak memory by family."""
    errors = {run.id: fullest(run.job).total / GIB / run.memory - 1 for run in runs}
    print(f"\n{'memory, % error':22}{'n':>5} |  median  mean   p90")
    for family, group in [*grouped(runs), ("all", list(runs))]:
        print(f"{family:22}{len(group):>5} |  {told(errors[run.id] for run in group)}")


SAME = 0.02
"""Measured times closer than this have no order: runs of one description differ by as much."""


def tau(pairs: Sequence[tuple[float, float]], same: float = SAME) -> float:
    """Kendall's tau of (predicted, measured) over the pairs that were measured apart; nan without any."""
    signs = [
        np.sign(a[0] - b[0]) * np.sign(a[1] - b[1])
        for a, b in itertools.combinations(pairs, 2)
        if abs(a[1] / b[1] - 1) > same and a[0] != b[0]
    ]
    return float(np.mean(signs)) if signs else float("nan")


GAP = 4
"""Lines of a page between two of its tables, at least."""


def tables(runs: Sequence[Run]) -> dict[str, tuple[str, int]]:
    """id -> the table that a run was printed in: a page, and the first line of a block of lines close together.

    A page may tell months of work: its tables differ in the software's age, rows of one table do not.
    """
    lines: dict[str, set[int]] = defaultdict(set)
    split = {run.id: re.fullmatch(r"(.*):(\d+)", run.source) for run in runs}
    for match in split.values():
        if match:
            lines[match[1]].add(int(match[2]))
    starts: dict[tuple[str, int], int] = {}
    for page, numbers in lines.items():
        first = last = -GAP
        for number in sorted(numbers):
            first = first if number - last < GAP else number
            starts[page, number] = first
            last = number
    return {run: (match[1], starts[match[1], int(match[2])]) if match else ("", 0) for run, match in split.items()}


def sweeps(runs: Sequence[Run]) -> dict[str, dict[tuple[object, ...], list[Run]]]:
    """Runs of one model, batch, number of devices and table that differ in their layout, by kind of sweep."""
    found: dict[str, dict[tuple[object, ...], list[Run]]] = defaultdict(lambda: defaultdict(list))
    table = tables([run for run in runs if run.job.layout.ranks > run.job.device.gpus_per_node])
    for run in runs:
        job = run.job
        site = (
            run.family, table.get(run.id), job.shape, job.device.key, job.stack.dtype, job.layout.ranks,
            job.layout.global_batch,
        )  # fmt: skip
        kind = "one node" if job.layout.ranks <= job.device.gpus_per_node else "many nodes"
        found[kind][site].append(run)
        alike = replace(job.layout, schedule="", chunks=1)
        found["pipeline schedules"][(*site, job.stack, alike)].append(run)
    least = {"pipeline schedules": 2}
    return {
        kind: {site: group for site, group in groups.items() if len({run.job for run in group}) >= least.get(kind, 3)}
        for kind, groups in found.items()
    }  # runs of one stack, layout and batch that are different jobs differ in their schedule


def print_ranking(runs: Sequence[Run], ours: Errors) -> None:
    """How well layouts of one model are ordered, and what the chosen one costs."""
    for kind, groups in sweeps(runs).items():
        taus, losses = [], []
        for group in groups.values():
            pairs = [(run.seconds * (1 + ours[run.id]), run.seconds) for run in group]
            taus += [found for found in [tau(pairs)] if found == found]
            losses.append(min(pairs)[1] / min(measured for _, measured in pairs) - 1)
        if taus:
            count = sum(len(group) for group in groups.values())
            print(f"ranking, {kind}: {len(taus)} sweeps of {count} runs, Kendall tau mean {np.mean(taus):.2f} median "
                  f"{np.median(taus):.2f};\n  the chosen layout is {100 * np.median(losses):.1f}% (median), "
                  f"{100 * np.mean(losses):.1f}% (mean) slower than the measured best")  # fmt: skip


BUBBLES: dict[str, Callable[[int, int, int], float]] = {
    "gpipe": lambda p, m, v: (p - 1) / m,
    "1f1b": lambda p, m, v: (p - 1) / m,
    "interleaved": lambda p, m, v: (p - 1) / (v * m),
    "zb-h1": lambda p, m, v: (p - 1) / (3 * m),
    "zb-h2": lambda p, m, v: 0.0,
    "zb-v": lambda p, m, v: 0.0,
}
"""Published bubble over ideal time where F, B and W take as long: arXiv 2104.04473 section 2.2, 2401.10241 and the
table of its repository (ZB-V)."""


def print_schedules() -> None:
    """Simulated against published bubbles, and the order of schedules for one pipeline."""
    gaps, taus = [], []
    device = hardware.load("h100")
    for ranks, rounds in itertools.product((4, 8, 16), (2, 4, 8)):
        microbatches = ranks * rounds
        pairs = []
        for schedule, chunks in (*((name, 2 if name == "zb-v" else 1) for name in BUBBLES if name != "interleaved"),
                                 ("interleaved", 2), ("interleaved", 4)):  # fmt: skip
            layout = Layout(pipeline=ranks, chunks=chunks, schedule=schedule, global_batch=microbatches)
            stages = layout.stages
            costs = Costs([1 / chunks] * stages, [2 / chunks] * stages, [1 / chunks] * stages, 0.0)
            made = pipeline_time(Job(SHAPE, layout, Stack(), device), costs) / (3 * microbatches) - 1
            published = BUBBLES[schedule](ranks, microbatches, chunks)
            gaps.append(abs(made - published))
            pairs.append((1 + made, 1 + published))
        taus.append(tau(pairs, same=1e-3))
    print(f"pipeline schedules against their papers' bubbles: {len(taus)} pipelines of {len(pairs)} schedules, Kendall "
          f"tau mean {np.mean(taus):.2f} lowest {min(taus):.2f};\n  bubbles differ by {np.mean(gaps):.3f} of the ideal "
          "time (mean)")  # fmt: skip


def left_out_errors(runs: Sequence[Run]) -> Errors:
    """Every family predicted by constants fitted to the others, from the priors on."""
    found: Errors = {}
    pipeline = Frozen()
    for family, group in grouped(runs):
        others = [run for run in timed(runs) if run.family != family]
        found |= step_errors(group, fit(others, rounds=1, inner=7, pipeline=pipeline))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", type=Path, default=RUNS)
    parser.add_argument("--leave-out", action="store_true", help="also fit without each family (minutes of CPU time)")
    parser.add_argument("--detail", type=Path, help="write every run's error there")
    args = parser.parse_args()
    everything, constants = read(args.table), load()
    seen = {run.id for run in timed(read())}
    runs = [run for run in everything if scored(run)]
    known = {run.id for run in runs}
    untouched = [run for run in everything if run.seconds and run.id not in known]
    fitted = sum(run.id in seen for run in runs)
    print(f"{len(everything)} runs; {len(fields(Constants))} constants were fitted to the times of {fitted} of them\n"
          f"and tested on {len(runs) - fitted} more, and on {len(untouched)} of devices without constants of their "
          "own; no memory was fitted\n")  # fmt: skip
    ours = print_times(runs, constants, left_out_errors(runs) if args.leave_out else None) if runs else {}
    for name, group in sorted(by(untouched, lambda run: run.job.device.name).items()):
        print(f"never fitted: {name}, n = {len(group)}: {told(step_errors(group, constants).values())}")
    print_ranking(runs, ours)
    print_schedules()
    if any(run.memory for run in everything):
        print_memory([run for run in everything if run.memory])
    if args.detail:
        worst = sorted(runs, key=lambda run: -abs(ours[run.id]))
        lines = [f"{r.id},{r.model},{r.seconds},{ours[r.id]:.4f},{' '.join(r.job.assumed)}" for r in worst]
        args.detail.write_text("\n".join(["id,model,seconds,error,assumed", *lines]) + "\n")


if __name__ == "__main__":
    main()
