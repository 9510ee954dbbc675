"""Fit the timing model's constants to ``runs.csv`` and write ``megapre/planner/constants.toml``.

``python benchmarks/planner/fit.py [--rounds 3] [--dry]``. Robust least squares on log(predicted / measured) with a
prior: every constant is pulled to its starting value, which kernel measurements or data sheets suggest. Families
count by about the root of their size, so that a sweep of 144 runs does not drown four.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from rows import Run, read

from megapre.planner.constants import FILE, Constants, to_toml
from megapre.planner.pipeline import Costs, pipeline_time
from megapre.planner.timing import predict

START = Constants()
PRIOR = 0.25
"""Standard deviation of a constant's logarithm around its start."""
SCALE = 0.05
"""Errors beyond this count less than their square."""
MOST = {
    "gemm_ampere": 1.0, "gemm_hopper": 1.0, "gemm_fp8": 1.0, "memory_ampere": 0.95, "memory_hopper": 0.95,
    "flash_ampere": 1.1, "flash_hopper": 1.1, "softmax": 0.95, "link": 1.0, "nic": 1.0, "tensor_overlap": 0.9,
    "data_overlap": 0.95, "shard_overlap": 0.95, "all_to_all": 1.0, "hop": 1.0, "moe": 3.0, "wave": 1.25,
}  # fmt: skip
"""No constant may pass what is physical: a share stays below 1."""
LEAST = {"eager": 1.0, "compiled": 1.0, "moe": 1.0, "moe_fp8": 1.0}


def timed(runs: Sequence[Run]) -> list[Run]:
    """Runs that the constants may see: a measured time, on a device with constants of its own."""
    return [run for run in runs if run.seconds and run.job.device.generation in ("ampere", "hopper")]


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


def fit(runs: Sequence[Run], start: Constants = START, rounds: int = 3, inner: int = 5) -> Constants:
    """The constants that explain ``runs`` best."""
    names = [f.name for f in fields(Constants)]
    count = Counter(run.family for run in runs)
    weight = np.array([count[run.family] ** -0.45 for run in runs])
    weight *= len(runs) / weight.sum()
    target = np.log([run.seconds for run in runs])
    jobs = {}
    for run in runs:
        jobs.setdefault(run.job, run.job)
    pipeline = Frozen()

    def unpack(x: np.ndarray) -> Constants:
        values = {}
        for name, change in zip(names, x):
            value = getattr(START, name) * math.exp(change)
            values[name] = max(min(value, MOST.get(name, math.inf)), LEAST.get(name, 0.0))
        return Constants(**values)

    def errors(x: np.ndarray) -> np.ndarray:
        constants = unpack(x)
        made = {job: math.log(predict(job, constants, pipeline).step) for job in jobs}
        return np.array([made[run.job] for run in runs]) - target

    x = np.array([math.log(getattr(start, name) / getattr(START, name)) for name in names])
    for _ in range(rounds):
        pipeline.forget()
        damping = 1e-2
        error = errors(x)
        for _ in range(inner):
            slopes = np.stack([(errors(x + step) - error) / 1e-2 for step in 1e-2 * np.eye(len(x))], axis=1)
            robust = weight**2 / np.sqrt(1 + (error / SCALE) ** 2) / SCALE**2
            normal = (slopes * robust[:, None]).T @ slopes + np.eye(len(x)) / PRIOR**2
            pull = (slopes * robust[:, None]).T @ error + x / PRIOR**2
            before = _cost(error, weight, x)
            for _ in range(6):
                step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), pull)
                tried = x + np.clip(step, -0.5, 0.5)
                after = errors(tried)
                if _cost(after, weight, tried) < before:
                    x, error, damping = tried, after, damping / 5
                    break
                damping *= 5
            else:
                break
    return unpack(x)


def _cost(error: np.ndarray, weight: np.ndarray, x: np.ndarray) -> float:
    robust = 2 * weight**2 * (np.sqrt(1 + (error / SCALE) ** 2) - 1)
    return float(robust.sum() + (x**2).sum() / PRIOR**2)


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
