"""How far predictions are from published measurements, beside what a constant HFU and repeated rows reach.

``python benchmarks/planner/score.py [TABLE.csv] [--leave-out] [--detail FILE]``. TABLE may be a raw table of
published rows; rows of families that the constants were never fitted to are marked with a star.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from fit import fit, timed
from rows import RUNS, Run, read

from megapre.planner.constants import Constants, load
from megapre.planner.job import Job
from megapre.planner.memory import fullest
from megapre.planner.timing import predict

GIB = 2.0**30
Errors = dict[str, float]


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


def grouped(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by family."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.family].append(run)
    return sorted(groups.items())


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
    for family, group in [*grouped(runs), ("all", list(runs))]:
        ids = [run.id for run in group]
        line = f"{family:22}{len(ids):>5} |  {told(ours[i] for i in ids)} | {told(constant[i] for i in ids)} |"
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


def tau(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau of (predicted, measured) over the pairs that were measured apart; nan without any."""
    signs = [
        np.sign(a[0] - b[0]) * np.sign(a[1] - b[1])
        for a, b in itertools.combinations(pairs, 2)
        if abs(a[1] / b[1] - 1) > SAME and a[0] != b[0]
    ]
    return float(np.mean(signs)) if signs else float("nan")


def sweeps(runs: Sequence[Run]) -> dict[str, dict[tuple[object, ...], list[Run]]]:
    """Runs of one model, batch and number of devices that differ in their layout, by kind of sweep."""
    found: dict[str, dict[tuple[object, ...], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        job = run.job
        site = (run.family, job.shape, job.device.key, job.stack.dtype, job.layout.ranks, job.layout.global_batch)
        kind = "one node" if job.layout.ranks <= job.device.gpus_per_node else "many nodes"
        found[kind][site].append(run)
    return {k: {site: g for site, g in v.items() if len({run.job for run in g}) > 2} for k, v in found.items()}


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
                  f"{np.median(taus):.2f}; the chosen layout is {100 * np.median(losses):.1f}% (median), "
                  f"{100 * np.mean(losses):.1f}% (mean) slower than the measured best")  # fmt: skip


def left_out_errors(runs: Sequence[Run]) -> Errors:
    """Every family predicted by constants fitted to the others, from the priors on."""
    found: Errors = {}
    for family, group in grouped(timed(runs)):
        others = [run for run in timed(runs) if run.family != family]
        found |= step_errors(group, fit(others, rounds=1, inner=7))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", type=Path, default=RUNS)
    parser.add_argument("--leave-out", action="store_true", help="also fit without each family (minutes)")
    parser.add_argument("--detail", type=Path, help="write every run's error there")
    args = parser.parse_args()
    everything, constants = read(args.table), load()
    runs = timed(everything)
    untouched = [run for run in everything if run.seconds and run not in runs]
    print(f"{len(everything)} runs; times of {len(runs)} were fitted with {len(fields(Constants))} constants, of "
          f"{len(untouched)} never seen (other devices); no memory was fitted\n")  # fmt: skip
    ours = print_times(runs, constants, left_out_errors(runs) if args.leave_out else None)
    if untouched:
        print(f"never seen: {untouched[0].job.device.name}, n = {len(untouched)}: "
              f"{told(step_errors(untouched, constants).values())}")  # fmt: skip
    print_ranking(runs, ours)
    print_memory([run for run in everything if run.memory])
    if args.detail:
        worst = sorted(runs, key=lambda run: -abs(ours[run.id]))
        lines = [f"{r.id},{r.model},{r.seconds},{ours[r.id]:.4f},{' '.join(r.job.assumed)}" for r in worst]
        args.detail.write_text("\n".join(["id,model,seconds,error,assumed", *lines]) + "\n")


if __name__ == "__main__":
    main()
