"""Learning rates against the closed forms."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch

from megapre.config.check import ConfigError, check
from megapre.config.schema import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from megapre.optim.plateau import Plateau
from megapre.optim.schedule import learning_rate


def job(kind: str, **schedule: object) -> Config:
    return Config(
        optimizer=OptimizerConfig(lr=2.0),
        schedule=ScheduleConfig(kind=kind, warmup=4, min_lr_ratio=0.1, **schedule),  # type: ignore[arg-type]
        train=TrainConfig(steps=24),
    )


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse-sqrt", "piecewise", "plateau", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    assert [learning_rate(job(kind), step) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_decay() -> None:
    assert learning_rate(job("linear"), 14) == pytest.approx(1.1)
    assert learning_rate(job("cosine"), 14) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 2)) / 2)
    for kind in ("linear", "cosine"):
        assert learning_rate(job(kind), 24) == pytest.approx(0.2)
        assert learning_rate(job(kind, decay=14), 14) == learning_rate(job(kind, decay=14), 1000) == pytest.approx(0.2)
    assert learning_rate(job("constant"), 1000) == 2.0


def test_wsd_is_stable_then_cools_down_as_one_minus_a_square_root() -> None:
    rates = [learning_rate(job("wsd", cooldown=16), step) for step in range(30)]
    assert rates[4:8] == [2.0] * 4
    for step in range(8, 24):
        assert rates[step] == pytest.approx(0.2 + 1.8 * (1 - math.sqrt((step - 8) / 16)))
    assert rates[24:] == pytest.approx([0.2] * 6)
    assert learning_rate(job("wsd", cooldown=2, decay=10), 8) == pytest.approx(2.0)
    assert learning_rate(job("wsd", cooldown=2, decay=10), 9) == pytest.approx(0.2 + 1.8 * (1 - math.sqrt(0.5)))


def test_inverse_square_root_is_that_of_the_transformer() -> None:
    """Vaswani et al.: rate ~ min(n^-1/2, n warm-up^-3/2) for the n-th step, so that both meet at the peak."""
    for step in range(24):
        n = step + 1
        assert learning_rate(job("inverse-sqrt"), step) == pytest.approx(2.0 * 2 * min(n**-0.5, n * 4**-1.5))
    assert learning_rate(job("inverse-sqrt"), 10**6) == pytest.approx(0.2)


def test_piecewise_is_constant_between_milestones() -> None:
    piecewise = job("piecewise", milestones=[6, 10], factors=[0.5, 0.1])
    assert [learning_rate(piecewise, step) for step in (4, 5, 6, 9, 10, 99)] == [2.0, 2.0, 1.0, 1.0, 0.2, 0.2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "wsd"}, "schedule.cooldown between 1 and 20"),
        ({"kind": "wsd", "cooldown": 21}, "schedule.cooldown between 1 and 20"),
        ({"kind": "cosine", "cooldown": 2}, "belongs to schedule.kind = 'wsd'"),
        ({"kind": "linear", "milestones": [5], "factors": [0.5]}, "belong to schedule.kind = 'piecewise'"),
        ({"kind": "inverse-sqrt", "warmup": 0}, "needs schedule.warmup of at least 1"),
        ({"kind": "piecewise"}, "0 for 0"),
        ({"kind": "piecewise", "milestones": [5, 9], "factors": [0.5]}, "1 for 2"),
        ({"kind": "piecewise", "milestones": [9, 5], "factors": [0.5, 0.1]}, "must rise"),
        ({"kind": "piecewise", "milestones": [2], "factors": [0.5]}, "must rise from schedule.warmup (4)"),
        ({"kind": "piecewise", "milestones": [5], "factors": [-0.5]}, "at least 0, not -0.5"),
    ],
)
def test_a_schedule_that_is_not_described_is_refused(settings: dict[str, object], sentence: str) -> None:
    config = job("constant")
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        check(replace(config, schedule=replace(config.schedule, **settings)))  # type: ignore[arg-type]


def test_plateau_falls_when_torchs_does_and_goes_on_from_its_state() -> None:
    seed = random.SystemRandom().randrange(10**6)
    losses = [random.Random(seed + n).choice([1.0, 2.0, 3.0 - n / 20]) for n in range(40)]
    schedule = ScheduleConfig(kind="plateau", patience=2, plateau_factor=0.5, min_lr_ratio=0.1)
    weight = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(weight, factor=0.5, patience=2, threshold=0.0, min_lr=0.1)
    ours = Plateau(schedule, {})
    for loss in losses:
        theirs.step(loss)
        ours.observe(loss)
        ours = Plateau(schedule, json.loads(json.dumps(ours.state())))
        assert ours.factor == pytest.approx(weight.param_groups[0]["lr"]), f"{seed=}"
    assert ours.factor == pytest.approx(0.1)


def test_only_plateau_follows_the_validation_loss() -> None:
    ours = Plateau(ScheduleConfig(kind="cosine", patience=0), {})
    for loss in (1.0, 2.0, 3.0):
        ours.observe(loss)
    assert ours.factor == 1.0


def test_plateau_needs_validation() -> None:
    with pytest.raises(ConfigError, match=r"'plateau' follows the validation loss: set train\.eval_interval"):
        check(replace(job("plateau"), train=TrainConfig(eval_interval=0)))
