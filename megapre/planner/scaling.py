"""How large a model to train: published scaling laws, and one's own fitted to small runs.

Parameters N exclude embeddings for Kaplan and include them for Chinchilla, as in the papers; D are tokens, C = 6 N D.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapre.config.check import ConfigError
from megapre.config.load import load

PETAFLOP_DAY = 8.64e19


@dataclass(frozen=True)
class Optimum:
    """The best model for a compute budget."""

    law: str
    parameters: float
    tokens: float
    loss: float
    """Predicted, nats per token; nan where the law gives none."""


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta (arXiv 2203.15556, eq. 2)."""

    name: str
    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, flops: float) -> Optimum:
        """Least loss under 6 N D = ``flops``: N = G (C/6)^(beta / (alpha + beta)), eq. 4 of the paper."""
        together = self.alpha + self.beta
        scale = (self.alpha * self.a / (self.beta * self.b)) ** (1 / together)
        parameters = scale * (flops / 6) ** (self.beta / together)
        tokens = flops / 6 / parameters
        return Optimum(self.name, parameters, tokens, self.loss(parameters, tokens))


CHINCHILLA = Law("Chinchilla", 1.69, 406.4, 410.7, 0.34, 0.28, "arXiv 2203.15556, approach 3")
REPLICATION = Law("Chinchilla, refitted", 1.8172, 482.01, 2085.43, 0.3478, 0.3658, "arXiv 2404.10102")


def chinchilla_20(flops: float) -> Optimum:
    """Twenty tokens a parameter, what approaches 1 and 2 of arXiv 2203.15556 come to."""
    parameters = math.sqrt(flops / 120)
    return Optimum("20 tokens a parameter", parameters, 20 * parameters, math.nan)


def kaplan(flops: float) -> Optimum:
    """N = 1.3e9 x C^0.73, C in PF-days (arXiv 2001.08361, section 6: N_opt and table 6)."""
    parameters = 1.3e9 * (flops / PETAFLOP_DAY) ** 0.73
    return Optimum("Kaplan", parameters, flops / 6 / parameters, math.nan)


LAWS: tuple[Callable[[float], Optimum], ...] = (
    chinchilla_20, CHINCHILLA.optimum, REPLICATION.optimum, kaplan,
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One small run."""

    parameters: float
    tokens: float
    loss: float


TAIL = 0.05
"""Share of a run's last records whose losses are averaged."""


def read_run(folder: Path, parameters: Callable[[Path], float]) -> Point:
    """A run folder's job and metrics as a point; ``parameters`` counts those of its ``job.toml``."""
    path = folder / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as metrics: {' '.join(str(error).split())}") from None
    records = [r for r in records if r.get("split") == "train" and isinstance(r.get("loss"), int | float)]
    if not records:
        raise ConfigError(f"{path} holds no training loss")
    job = load(folder / "job.toml")
    tail = records[-max(1, round(TAIL * len(records))) :]
    tokens = records[-1]["step"] * job.train.global_batch * job.model.sequence
    return Point(parameters(folder / "job.toml"), tokens, float(np.mean([record["loss"] for record in tail])))


def fit(points: Sequence[Point]) -> Law:
    """L(N, D) through the points of small runs: least squares of log loss over a grid of exponents and E.

    For given alpha, beta and E the rest is linear. Raises `ConfigError` for fewer than 5 runs, or runs that do not
    vary both N and D.
    """
    if len(points) < 5:
        raise ConfigError(f"a scaling law has 5 unknowns but only {len(points)} runs were given: give at least 5")
    n, d, loss = (np.array([getattr(p, name) for p in points]) for name in ("parameters", "tokens", "loss"))
    if len(set(n)) < 2 or len(set(d)) < 2:
        raise ConfigError("a scaling law needs runs of at least 2 model sizes and 2 numbers of tokens")
    best: tuple[float, Law] | None = None
    exponents = np.arange(0.10, 0.781, 0.04)
    for floor in np.linspace(0.0, 0.98 * loss.min(), 60):
        for alpha in exponents:
            for beta in exponents:
                columns = np.stack([n**-alpha, d**-beta], axis=1) / (loss - floor)[:, None]
                (a, b), *_ = np.linalg.lstsq(columns, np.ones(len(loss)), rcond=None)
                if a <= 0 or b <= 0:
                    continue
                error = float(np.square(np.log((floor + a * n**-alpha + b * d**-beta) / loss)).sum())
                if best is None or error < best[0]:
                    law = Law("yours", float(floor), float(a), float(b), float(alpha), float(beta), "given runs")
                    best = (error, law)
    if best is None:
        raise ConfigError("no scaling law with falling loss fits these runs: give longer or larger ones")
    return best[1]
