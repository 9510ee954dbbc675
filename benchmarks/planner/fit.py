"""Fit the timing model's constants to ``runs.csv`` and write ``megapre/planner/constants.toml``.

``python benchmarks/planner/fit.py [--rounds 3] [--dry]``. Robust least squares on log(predicted / measured) with a
prior: every constant is pulled to its starting value, which kernel measurements or data sheets suggest. Families
count by about the root of their size, so that a sweep of 144 runs does not drown four.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
from rows import Run, read

from megapre.planner.constants import FILE, Constants, to_toml
from megapre.planner.pipeline import Costs, pipeline_time
from megapre.planner.timing import predict

START = Constants()
PRIOR = 0.3
"""Standard deviation of a constant's logarithm around its start."""
MEASURED = {
    "gemm_ampere": 0.08, "gemm_hopper": 0.08, "gemm_fp8": 0.08, "flash_ampere": 0.08, "flash_hopper": 0.08,
    "link": 0.08, "nic": 0.15, "memory_ampere": 0.15, "memory_hopper": 0.15, "softmax": 0.1, "eager": 0.15,
    "moe": 0.15,
}  # fmt: skip
"""The same for those that kernel or network measurements give."""
SCALE = 0.05
"""Errors beyond this count less than their square."""
MOST = {
    "gemm_ampere": 1.0, "gemm_hopper": 1.0, "gemm_fp8": 1.0, "memory_ampere": 0.95, "memory_hopper": 0.95,
    "flash_ampere": 1.1, "flash_hopper": 1.1, "softmax": 0.95, "link": 1.0, "nic": 1.0, "tensor_overlap": 0.9,
    "data_overlap": 0.95, "shard_overlap": 0.95, "all_to_all": 1.0, "hop": 1.0, "moe": 2.0, "wave": 1.25,
}  # fmt: skip
"""No constant may pass what is physical: a share stays below 1."""
LEAST = {"eager": 1.0, "compiled": 1.0, "moe": 1.0}


def scored(run: Run) -> bool:
    """A measured time, on a device with constants of its own."""
    return bool(run.seconds) and run.job.device.generation in ("ampere", "hopper")


def timed(runs: Sequence[Run]) -> list[Run]:
    """Runs that the constants may see: those whose share of recomputation is no guess."""
    return [run for run in runs if scored(run) and "recompute_share" not in run.job.assumed]


class Frozen:
    """Pipelines simulated once: later calls scale the first result with the slowest stage, until `forget`."""

    def __init__(self) -> None:
        self._ratios: dict[object, float] = {}

    def __call__(self, job: object, costs: Costs) -> float:
        slowest = max(f + b for f, b in zip(costs.forward, costs.backward))
        key = id(job)
        if key not in self._ratios:
            self._ratios[key] = pipeline_time(job, costs) / slowest  # type: ignore[arg-type]
        return self._ratios[key] * slowest

    def forget(self) -> None:
        """Simulate anew, at the constants of the next call."""
        self._ratios.clear()


NAMES = [f.name for f in fields(Constants)]
STIFF = np.array([MEASURED.get(name, PRIOR) for name in NAMES]) ** -2.0


def unpack(x: np.ndarray) -> Constants:
    """Constants from the logarithms of their ratios to `START`, held to what is physical."""
    values = {}
    for name, change in zip(NAMES, x):
        value = getattr(START, name) * math.exp(change)
        values[name] = max(min(value, MOST.get(name, math.inf)), LEAST.get(name, 0.0))
    return Constants(**values)


class Problem:
    """Errors of runs as a function of the constants, and their slopes."""

    def __init__(self, runs: Sequence[Run], pipeline: Frozen) -> None:
        count = Counter(run.family for run in runs)
        weight = np.array([count[run.family] ** -0.45 for run in runs])
        self.weight = weight * len(runs) / weight.sum()
        self.target = np.log([run.seconds for run in runs])
        order = {job: index for index, job in enumerate(dict.fromkeys(run.job for run in runs))}
        self.jobs, self.place = list(order), np.array([order[run.job] for run in runs])
        self.pipeline = pipeline
        self.acts = [np.arange(len(self.jobs))] * len(NAMES)
        """For every constant the jobs that it acts on: a third of them on average."""

    def _logs(self, x: np.ndarray, which: Iterable[int]) -> np.ndarray:
        constants = unpack(x)
        return np.array([math.log(predict(self.jobs[i], constants, self.pipeline).step) for i in which])

    def errors(self, x: np.ndarray) -> np.ndarray:
        """log(predicted / measured) of every run."""
        return self._logs(x, range(len(self.jobs)))[self.place] - self.target

    def forget(self) -> None:
        """Simulate pipelines anew at the next call, and look again at which constant acts on which job."""
        self.pipeline.forget()
        self.acts = [np.arange(len(self.jobs))] * len(NAMES)

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """Derivatives of the errors, [runs, constants]."""
        base = self._logs(x, range(len(self.jobs)))
        made = np.zeros((len(self.jobs), len(NAMES)))
        for column, step in enumerate(1e-2 * np.eye(len(NAMES))):
            which = self.acts[column]
            made[which, column] = (self._logs(x + step, which) - base[which]) / 1e-2
            self.acts[column] = which[made[which, column] != 0.0]
        return made[self.place]

    def cost(self, error: np.ndarray, x: np.ndarray) -> float:
        """What the fit makes small."""
        robust = 2 * self.weight**2 * (np.sqrt(1 + (error / SCALE) ** 2) - 1)
        return float(robust.sum() + (x**2 @ STIFF))


def fit(
    runs: Sequence[Run], start: Constants = START, rounds: int = 3, inner: int = 6, pipeline: Frozen | None = None
) -> Constants:
    """The constants that explain ``runs`` best: Levenberg-Marquardt steps from ``start``.

    ``pipeline``: simulations of an earlier fit from the same start, for the first round.
    """
    problem = Problem(runs, pipeline or Frozen())
    x = np.array([math.log(getattr(start, name) / getattr(START, name)) for name in NAMES])
    for turn in range(rounds):
        if turn:
            problem.forget()
        damping = 1e-2
        error = problem.errors(x)
        for _ in range(inner):
            slope = problem.slopes(x)
            robust = problem.weight**2 / np.sqrt(1 + (error / SCALE) ** 2) / SCALE**2
            normal = (slope * robust[:, None]).T @ slope + np.diag(STIFF)
            pull = (slope * robust[:, None]).T @ error + x * STIFF
            before = problem.cost(error, x)
            for _ in range(6):
                step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), pull)
                tried = x + np.clip(step, -0.5, 0.5)
                after = problem.errors(tried)
                if problem.cost(after, tried) < before:
                    x, error, damping = tried, after, damping / 5
                    break
                damping *= 5
            else:
                break
    return unpack(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, do not write")
    args = parser.parse_args()
    runs = timed(read())
    constants = fit(runs, rounds=args.rounds)
    text = to_toml(constants, f"Written by benchmarks/planner/fit.py from {len(runs)} published runs.")
    if args.dry:
        print(text)
    else:
        FILE.write_text(text)
    for f in fields(constants):
        old, new = getattr(START, f.name), getattr(constants, f.name)
        print(f"{f.name:16} {old:10.4g} -> {new:10.4g}")


if __name__ == "__main__":
    main()
