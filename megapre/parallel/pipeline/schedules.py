"""Pipeline schedules: pure functions from (ranks, chunks, microbatches) to every rank's compute actions.

A schedule is a function and a row of ``SCHEDULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megapre.config.schema import ParallelConfig
from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, WEIGHT, Action, Compute, with_messages


def gpipe(rank: int, ranks: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """All forwards, then all backwards (arXiv 1811.06965). Keeps every microbatch's activations."""
    yield from (Compute(FORWARD, rank, m) for m in range(microbatches))
    yield from (Compute(BACKWARD, rank, m) for m in range(microbatches))


def one_forward_one_backward(rank: int, ranks: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): at most ``ranks - rank`` microbatches in flight."""
    warmup = min(ranks - 1 - rank, microbatches)
    yield from (Compute(FORWARD, rank, m) for m in range(warmup))
    for m in range(warmup, microbatches):
        yield Compute(FORWARD, rank, m)
        yield Compute(BACKWARD, rank, m - warmup)
    yield from (Compute(BACKWARD, rank, m) for m in range(microbatches - warmup, microbatches))


def interleaved(rank: int, ranks: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """Interleaved 1F1B (arXiv 2104.04473): stage c x ranks + rank is chunk c of a rank; the bubble shrinks by chunks.

    Microbatches go in groups of ``ranks`` through one chunk after the other, so their number is a multiple of it.
    """

    def unit(kind: str, n: int) -> Compute:
        group, place = divmod(n, ranks * chunks)
        chunk = place // ranks if kind == FORWARD else chunks - 1 - place // ranks
        return Compute(kind, chunk * ranks + rank, group * ranks + place % ranks)

    units = microbatches * chunks
    warmup = min(units, 2 * (ranks - 1 - rank) + (chunks - 1) * ranks)
    yield from (unit(FORWARD, n) for n in range(warmup))
    for n in range(warmup, units):
        yield unit(FORWARD, n)
        yield unit(BACKWARD, n - warmup)
    yield from (unit(BACKWARD, n) for n in range(units - warmup, units))


def zero_bubble_h1(rank: int, ranks: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """ZB-H1 (arXiv 2401.10241): 1F1B whose weight gradients come ``rank`` backwards late and fill the bubble.

    With equal costs and enough microbatches the bubble is ranks - 1 units, a third of 1F1B's, in 1F1B's memory.
    """
    warmup = min(ranks - 1 - rank, microbatches)
    yield from (Compute(FORWARD, rank, m) for m in range(warmup))
    for m in range(microbatches):
        if m + warmup < microbatches:
            yield Compute(FORWARD, rank, m + warmup)
        yield Compute(BACKWARD, rank, m)
        if m >= rank:
            yield Compute(WEIGHT, rank, m - rank)
    yield from (Compute(WEIGHT, rank, m) for m in range(max(0, microbatches - rank), microbatches))


def forward_only(rank: int, ranks: int, chunks: int, microbatches: int, owners: tuple[int, ...]) -> Iterator[Compute]:
    """Forwards alone, for validation: each microbatch through the rank's stages, in the order of the model."""
    mine = [stage for stage, owner in enumerate(owners) if owner == rank]
    yield from (Compute(FORWARD, stage, m) for m in range(microbatches) for stage in mine)


def zero_bubble_v(ranks: int, chunks: int, microbatches: int) -> list[list[Compute]]:
    """ZB-V (arXiv 2401.10241): two stages a rank in a V, by greedy list scheduling with equal costs of F, B and W.

    At each tick a rank runs a backward that is ready, else a forward if it holds fewer than 2 x ranks
    microbatch-stages (1F1B's memory), else a weight gradient: W fills the bubbles, since nobody waits for it.
    """
    owners, limit = in_v(ranks, chunks), 2 * ranks
    last = len(owners) - 1
    finished: dict[tuple[str, int, int], int] = {}
    held = [0] * ranks
    plans: list[list[Compute]] = [[] for _ in range(ranks)]
    waiting: list[list[Compute]] = [[] for _ in range(ranks)]
    next_forward = [0] * len(owners)
    next_backward = [0] * len(owners)
    total = 3 * microbatches * len(owners)
    tick = 0

    def ready(kind: str, stage: int, microbatch: int) -> bool:
        if microbatch >= microbatches:
            return False
        before = (FORWARD, stage - 1, microbatch) if kind == FORWARD else (BACKWARD, stage + 1, microbatch)
        if kind == FORWARD and stage == 0:
            return True
        if kind == BACKWARD and stage == last:
            before = (FORWARD, stage, microbatch)
        own_forward = kind == FORWARD or finished.get((FORWARD, stage, microbatch), tick + 1) <= tick
        return own_forward and finished.get(before, tick + 1) <= tick

    def choose(rank: int) -> Compute | None:
        mine = [stage for stage, owner in enumerate(owners) if owner == rank]
        for stage in reversed(mine):
            if ready(BACKWARD, stage, next_backward[stage]):
                return Compute(BACKWARD, stage, next_backward[stage])
        for stage in reversed(mine):
            # A later stage frees what earlier ones hold, so the last free places are kept for it.
            spare = sum(other > stage for other in mine)
            if held[rank] + spare < limit and ready(FORWARD, stage, next_forward[stage]):
                return Compute(FORWARD, stage, next_forward[stage])
        return waiting[rank][0] if waiting[rank] else None

    while sum(map(len, plans)) < total:
        assert tick < 4 * total, "the greedy schedule makes no progress"
        for rank, action in enumerate([choose(rank) for rank in range(ranks)]):
            if action is None:
                continue
            plans[rank].append(action)
            finished[action.kind, action.stage, action.microbatch] = tick + 1
            if action.kind == FORWARD:
                next_forward[action.stage] += 1
                held[rank] += 1
            elif action.kind == BACKWARD:
                next_backward[action.stage] += 1
                waiting[rank].append(Compute(WEIGHT, action.stage, action.microbatch))
            else:
                waiting[rank].pop(0)
                held[rank] -= 1
        tick += 1
    return plans


def in_order(ranks: int, chunks: int) -> tuple[int, ...]:
    """Owner of each stage: round and round."""
    return tuple(range(ranks)) * chunks


def in_v(ranks: int, chunks: int) -> tuple[int, ...]:
    """Owner of each stage: down the ranks and up again, so that the first rank holds first and last stage."""
    return tuple(range(ranks)) + tuple(reversed(range(ranks)))


@dataclass(frozen=True)
class Schedule:
    """A way to order a step's work."""

    generate: Callable[[int, int, int], list[list[Compute]]]
    """(ranks, chunks, microbatches) -> every rank's compute actions."""
    owners: Callable[[int, int], tuple[int, ...]] = in_order
    """(ranks, chunks) -> rank of each stage. Which chunks and microbatches fit is in ``config/check.py``."""


def _each(
    generator: Callable[[int, int, int, int], Iterator[Compute]], ranks: int, chunks: int, microbatches: int
) -> list[list[Compute]]:
    return [list(generator(rank, ranks, chunks, microbatches)) for rank in range(ranks)]


SCHEDULES = {
    "gpipe": Schedule(partial(_each, gpipe)),
    "1f1b": Schedule(partial(_each, one_forward_one_backward)),
    "interleaved": Schedule(partial(_each, interleaved)),
    "zb-h1": Schedule(partial(_each, zero_bubble_h1)),
    "zb-v": Schedule(zero_bubble_v, in_v),
}


def stage_owners(parallel: ParallelConfig) -> tuple[int, ...]:
    """The pipeline rank that holds each stage."""
    return SCHEDULES[parallel.schedule].owners(parallel.pipeline, parallel.chunks)


def plans(name: str, ranks: int, chunks: int, microbatches: int, *, training: bool = True) -> list[list[Action]]:
    """Every rank's whole schedule, messages included; forwards alone when not ``training``."""
    schedule = SCHEDULES[name]
    owners = schedule.owners(ranks, chunks)
    if training:
        compute = schedule.generate(ranks, chunks, microbatches)
    else:
        compute = [list(forward_only(rank, ranks, chunks, microbatches, owners)) for rank in range(ranks)]
    return with_messages(compute, owners)
