"""The ramps against a walk step by step, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megapre.config.check import ConfigError, check
from megapre.config.ramp import Steps, clock
from megapre.config.schema import Config, ModelConfig, ScheduleConfig, TrainConfig
from megapre.optim.schedule import learning_rate


def job(**train: object) -> Config:
    return Config(
        model=ModelConfig(sequence=64, vocab_size=100),
        train=TrainConfig(**{"global_batch": 32, "microbatch": 2, **train}),
    )


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_megatrons_walk(seed: int) -> None:
    """Megatron: batch = start + increment x floor(consumed / (samples / increments)), once a step."""
    rng = random.Random(seed)
    start, increment, count = rng.randrange(1, 9), rng.randrange(1, 9), rng.randrange(1, 6)
    final, samples = start + increment * count, count * rng.randrange(1, 200)
    steps, consumed = Steps(job(global_batch=final, batch_ramp=[start, increment, samples])), 0
    for number in range(400):
        batch = final if consumed >= samples else start + increment * int(consumed / (samples / count))
        found = steps.at(number)
        assert (found.first, found.samples) == (consumed, batch), f"{seed=} step {number}"
        assert steps.step_of(consumed) == steps.step_of(consumed + batch - 1) == number
        consumed += batch


def test_rows_double_until_the_sequence_is_whole() -> None:
    steps = Steps(job(sequence_ramp=[8, 300]))
    rows = [steps.at(step).rows for step in range(14)]
    assert rows == [8, 8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1, 1]
    assert [steps.at(step).first for step in range(3)] == [0, 32, 64]
    assert steps.row_counts() == [8, 4, 2, 1]


def test_rates_count_samples_or_tokens() -> None:
    """The same training by any unit when nothing ramps; by samples the ramp does not shift the schedule."""
    plain = replace(job(steps=100), schedule=ScheduleConfig(warmup=10, decay=80))
    for unit, scale in (("samples", 32), ("tokens", 32 * 64)):
        other = replace(plain, schedule=ScheduleConfig(unit=unit, warmup=10 * scale, decay=80 * scale))
        assert [learning_rate(other, s) for s in range(100)] == pytest.approx(
            [learning_rate(plain, s) for s in range(100)]
        )
    ramped = replace(
        job(steps=100, batch_ramp=[8, 8, 480]), schedule=ScheduleConfig(unit="samples", warmup=320, decay=2560)
    )
    for step in range(100):
        consumed = clock(ramped, step)
        if consumed % 32 == 0 and consumed >= 320:
            assert learning_rate(ramped, step) == pytest.approx(learning_rate(plain, consumed // 32))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_ramp": [8, 8]}, r"train\.batch_ramp must be \[start, increment, samples\]"),
        ({"batch_ramp": [8, 7, 100]}, r"train\.batch_ramp .* \(32 - 8\) / 7 = 3\.4"),
        ({"batch_ramp": [32, 8, 100]}, r"from below train\.global_batch \(32\)"),
        ({"batch_ramp": [7, 5, 100]}, r"multiple of train\.microbatch x parallel\.data = 2, but 7 is none"),
        ({"sequence_ramp": [8]}, r"train\.sequence_ramp must be \[start, samples\]"),
        ({"sequence_ramp": [12, 100]}, r"starts at 12 tokens, from which no doubling leads to model\.sequence \(64\)"),
        ({"sequence_ramp": [64, 100]}, "no doubling"),
    ],
)
def test_ramps_that_cannot_be_are_refused(train: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(job(**train), 1)
    assert "\n" not in str(caught.value)


def test_a_ring_cannot_cut_rows_that_are_too_short() -> None:
    config = job(sequence_ramp=[2, 100])
    with pytest.raises(ConfigError, match="must be a multiple of 4"):
        check(replace(config, parallel=replace(config.parallel, context=2)), 2)
