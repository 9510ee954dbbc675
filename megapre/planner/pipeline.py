"""The time of a pipeline schedule, from the generators and the simulator that the engine itself uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megapre.parallel.pipeline.actions import Action, Compute, with_messages
from megapre.parallel.pipeline.schedules import SCHEDULES, in_order, plans
from megapre.parallel.pipeline.simulate import Prediction, simulate
from megapre.planner.job import Job, Layout, Shape

SPLIT = ("zb-h1", "zb-h2", "zb-v")
"""Schedules whose weight gradients are actions of their own."""


@dataclass(frozen=True)
class Costs:
    """Seconds of F and B (weight gradients included) on every stage, of the W part of B, of a message on its way."""

    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float]
    latency: float


def stage_layers(shape: Shape, layout: Layout) -> tuple[int, ...]:
    """Blocks of every stage.

    Where the model was cut as if embedding and head were blocks (L + 2 divides, L does not), the end stages have one
    fewer, as such models are built; else as evenly as possible, the middle first.
    """
    if layout.layers_per_stage:
        return layout.layers_per_stage
    return _spread(shape.layers, layout.stages)


@lru_cache(maxsize=10_000)
def _spread(layers: int, stages: int) -> tuple[int, ...]:
    if stages > 2 and layers % stages and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return (each - 1, *[each] * (stages - 2), each - 1)
    counts = [layers // stages] * stages
    order = sorted(range(stages), key=lambda s: (s in (0, stages - 1), s == stages - 1))
    for stage in order[: layers % stages]:
        counts[stage] += 1
    return tuple(counts)


def owners(layout: Layout) -> tuple[int, ...]:
    """Pipeline rank of each stage."""
    known = SCHEDULES.get(layout.schedule)
    return (known.owners if known else in_order)(layout.pipeline, layout.chunks)


def zero_bubble_h2(ranks: int, microbatches: int) -> list[list[Compute]]:
    """ZB-H2 (arXiv 2401.10241): enough forwards in flight that no rank waits, in twice 1F1B's memory.

    Not a schedule of the engine: its gain over ZB-H1 needs an optimizer step that ranks enter at different times.
    """
    made = []
    for rank in range(ranks):
        warmup = min(2 * (ranks - rank) - 1, microbatches)
        actions = [Compute("F", rank, m) for m in range(warmup)]
        written = 0
        for m in range(microbatches):
            actions.append(Compute("B", rank, m))
            if m >= 2 * rank:
                actions.append(Compute("W", rank, written))
                written += 1
            if m + warmup < microbatches:
                actions.append(Compute("F", rank, m + warmup))
        actions += [Compute("W", rank, m) for m in range(written, microbatches)]
        made.append(actions)
    return made


@lru_cache(maxsize=256)
def _plans(name: str, ranks: int, chunks: int, microbatches: int) -> list[list[Action]]:
    if name == "zb-h2":
        return with_messages(zero_bubble_h2(ranks, microbatches), in_order(ranks, 1), ahead=2 * ranks)
    return plans(name, ranks, chunks, microbatches)


def run(layout: Layout, costs: Costs, microbatches: int) -> Prediction:
    """Simulate ``microbatches`` of the schedule."""
    split = layout.schedule in SPLIT
    backward = [b - w for b, w in zip(costs.backward, costs.weight)] if split else costs.backward
    made = _plans(layout.schedule, layout.pipeline, layout.chunks, microbatches)
    return simulate(made, costs.forward, backward, costs.weight, costs.latency)


def pipeline_time(job: Job, costs: Costs) -> float:
    """Seconds from the first forward to the last backward.

    A schedule repeats itself, so beyond four rounds of microbatches the rest is a multiple of one round. Under ZB-H2
    steps overlap: a step lasts as long as one rank's part of it.
    """
    layout = job.layout
    ranks, wanted = layout.pipeline, layout.microbatches
    if ranks == 1 and layout.chunks == 1:
        return wanted * (costs.forward[0] + costs.backward[0])
    step = ranks if layout.schedule == "interleaved" else 1
    if wanted <= 4 * ranks and wanted % step == 0:
        return _length(layout, run(layout, costs, wanted))
    few, many = 2 * ranks, 3 * ranks
    short, long = (_length(layout, run(layout, costs, count)) for count in (few, many))
    return long + (wanted - many) * (long - short) / (many - few)


def _length(layout: Layout, made: Prediction) -> float:
    if layout.schedule != "zb-h2":
        return made.time
    return max(spans[-1][1] - spans[0][0] for spans in made.spans)
