"""Learning rates against the closed forms."""

from __future__ import annotations

import math

import pytest

from megapre.config.schema import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from megapre.optim.schedule import learning_rate


def job(kind: str, **schedule: float) -> Config:
    return Config(
        optimizer=OptimizerConfig(lr=2.0),
        schedule=ScheduleConfig(kind=kind, warmup=4, min_lr_ratio=0.1, **schedule),  # type: ignore[arg-type]
        train=TrainConfig(steps=24),
    )


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    assert [learning_rate(job(kind), step) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_decay() -> None:
    assert learning_rate(job("linear"), 14) == pytest.approx(1.1)
    assert learning_rate(job("cosine"), 14) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 2)) / 2)
    for kind in ("linear", "cosine"):
        assert learning_rate(job(kind), 24) == pytest.approx(0.2)
        assert learning_rate(job(kind, decay=14), 14) == learning_rate(job(kind, decay=14), 1000) == pytest.approx(0.2)
    assert learning_rate(job("constant"), 1000) == 2.0
