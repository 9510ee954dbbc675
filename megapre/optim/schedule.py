"""Learning rate as a pure function of the step. Torch-free."""

from __future__ import annotations

import math

from megapre.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """Rate for 0-based ``step``: linear warm-up to the peak, then the schedule's decay to its final share.

    cosine: final + (peak - final) (1 + cos(pi x)) / 2; linear: peak + (final - peak) x, x the share of the decay done.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return peak
    span = (schedule.decay or config.train.steps) - schedule.warmup
    done = min(1.0, (step - schedule.warmup) / span) if span > 0 else 1.0
    final = peak * schedule.min_lr_ratio
    if schedule.kind == "linear":
        return peak + (final - peak) * done
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2
