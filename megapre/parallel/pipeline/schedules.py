"""Pipeline schedules: pure generators of one stage's compute actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, Action, Compute, with_messages


def gpipe(stage: int, stages: int, microbatches: int) -> Iterator[Compute]:
    """All forwards, then all backwards (arXiv 1811.06965). Keeps every microbatch's activations."""
    yield from (Compute(FORWARD, m) for m in range(microbatches))
    yield from (Compute(BACKWARD, m) for m in range(microbatches))


def one_forward_one_backward(stage: int, stages: int, microbatches: int) -> Iterator[Compute]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): at most ``stages - stage`` microbatches in flight."""
    warmup = min(stages - 1 - stage, microbatches)
    yield from (Compute(FORWARD, m) for m in range(warmup))
    for m in range(warmup, microbatches):
        yield Compute(FORWARD, m)
        yield Compute(BACKWARD, m - warmup)
    yield from (Compute(BACKWARD, m) for m in range(microbatches - warmup, microbatches))


def forward_only(stage: int, stages: int, microbatches: int) -> Iterator[Compute]:
    """Forwards alone, for validation."""
    yield from (Compute(FORWARD, m) for m in range(microbatches))


SCHEDULES: dict[str, Callable[[int, int, int], Iterator[Compute]]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "forward": forward_only,
}


def plan(name: str, stage: int, stages: int, microbatches: int) -> list[Action]:
    """One stage's whole schedule, messages included."""
    return with_messages(SCHEDULES[name](stage, stages, microbatches), stage, stages)
