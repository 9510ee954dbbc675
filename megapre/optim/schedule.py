"""Learning rate as a pure function of the step. Torch-free.

After a linear warm-up the rate is the peak times a factor; a new schedule is one function and one row of ``FACTORS``.
"""

from __future__ import annotations

import math

from megapre.config.ramp import clock
from megapre.config.schema import Config, ScheduleConfig


def learning_rate(config: Config, step: int) -> float:
    """Rate for 0-based ``step``: linear warm-up to the peak, then what ``schedule.kind`` says."""
    schedule, peak = config.schedule, config.optimizer.lr
    now = clock(config, step)
    if now < schedule.warmup:
        return peak * min(clock(config, step + 1), schedule.warmup) / schedule.warmup
    return peak * FACTORS[schedule.kind](schedule, now, schedule.decay or clock(config, config.train.steps))


def constant(schedule: ScheduleConfig, step: int, end: int) -> float:
    """1."""
    return 1.0


def linear(schedule: ScheduleConfig, step: int, end: int) -> float:
    """1 + (final - 1) x, x the share of the steps from warm-up to ``end`` that is done."""
    return 1 + (schedule.min_lr_ratio - 1) * _done(schedule.warmup, step, end)


def cosine(schedule: ScheduleConfig, step: int, end: int) -> float:
    """Final + (1 - final) (1 + cos(pi x)) / 2 (arXiv 1608.03983 without restarts), x as in ``linear``."""
    final = schedule.min_lr_ratio
    return final + (1 - final) * (1 + math.cos(math.pi * _done(schedule.warmup, step, end))) / 2


def warmup_stable_decay(schedule: ScheduleConfig, step: int, end: int) -> float:
    """1 until the last ``schedule.cooldown`` steps, then final + (1 - final) (1 - sqrt(x)), x their share that is done.

    WSD (arXiv 2404.06395) with the 1-sqrt cooldown of arXiv 2405.18392: a run can be prolonged, or cooled down from any
    of its checkpoints.
    """
    final = schedule.min_lr_ratio
    return final + (1 - final) * (1 - math.sqrt(_done(end - schedule.cooldown, step, end)))


def inverse_square_root(schedule: ScheduleConfig, step: int, end: int) -> float:
    """sqrt(warm-up / steps taken), never below final (arXiv 1706.03762, T5's pretraining)."""
    return max(schedule.min_lr_ratio, math.sqrt(schedule.warmup / (step + 1)))


def piecewise(schedule: ScheduleConfig, step: int, end: int) -> float:
    """1 before the first of ``schedule.milestones``, then the factor of the last one that is reached."""
    factor = 1.0
    for milestone, value in zip(schedule.milestones, schedule.factors):
        factor = value if step >= milestone else factor
    return factor


def _done(start: int, step: int, end: int) -> float:
    """Share of [start, end) that lies before ``step``, between 0 and 1."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))


FACTORS = {
    "constant": constant,
    "plateau": constant,  # times what plateau.py has seen
    "linear": linear,
    "cosine": cosine,
    "wsd": warmup_stable_decay,
    "inverse-sqrt": inverse_square_root,
    "piecewise": piecewise,
}
"""``schedule.kind`` -> factor of the peak at a step past the warm-up."""
