"""The executor hands on tuples of tensors: values, gradients and memory are those of one graph over all layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from megapre.config.schema import Config, ModelConfig, ParallelConfig
from megapre.parallel.grid import Grid
from megapre.parallel.pipeline.executor import Carried, Executor, StageLayers
from megapre.parallel.pipeline.schedules import plans, stage_owners
from megapre.parallel.tensor import sink
from megapre.parallel.weight_queue import WeightQueue
from megapre.verify import threads

SEED = random.SystemRandom().randrange(10**6)
WIDTH, BATCH, MICROBATCHES = 5, 3, 4
PART = 5
"""A layer that makes a part of the loss."""
SHAPES = {"source": (7, BATCH, WIDTH), "target": (4, BATCH, WIDTH), "marks": (4, BATCH, 1)}


@dataclass
class Feed:
    """One microbatch: a source and a target stream, and whole numbers that have no gradient."""

    source: Tensor
    target: Tensor
    marks: Tensor


class Both(nn.Module):
    """Begins both streams, and the marks that only the last layers read."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        return feed.source * sink(self.weight), feed.target * sink(self.weight), feed.marks.clone()


class Encode(Both):
    """Works on the source; the others pass."""

    def forward(self, feed: Feed, x: Tensor, y: Tensor, marks: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(x * sink(self.weight)) + x, y, marks


class Decode(Both):
    """Works on the target with the source, which passes as it is; only every second one reads it."""

    def __init__(self, weight: Tensor, reads: bool) -> None:
        super().__init__(weight)
        self.reads = reads

    def forward(self, feed: Feed, x: Tensor, y: Tensor, marks: Tensor) -> tuple[Tensor, ...]:
        read = torch.einsum("sbw,tbw->sbw", y, x) if self.reads else y
        return x, y + torch.sin(read * sink(self.weight)) * marks, marks

    def loss(self, feed: Feed, x: Tensor, y: Tensor, marks: Tensor) -> tuple[Tensor, ...]:
        """Another part of the loss, of what the layer takes."""
        return ((torch.cos(y * sink(self.weight)) * marks).sum() + x.square().sum(),)


class Last(Both):
    """The loss."""

    def forward(self, feed: Feed, x: Tensor, y: Tensor, marks: Tensor) -> tuple[Tensor, ...]:
        return ((y * sink(self.weight)).square().sum(),)


def layers(seed: int) -> list[Both]:
    """Ten layers; blocks 4 and 8 read no source, so the last stage of many gives no gradient of it."""
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.randn(WIDTH, generator=generator, dtype=torch.float64)) for _ in range(10)]
    middle = [Encode(w) if n < 4 else Decode(w, n not in (4, 8)) for n, w in enumerate(weights[1:9], 1)]
    return [Both(weights[0]), *middle, Last(weights[9])]


def feeds(seed: int) -> list[Feed]:
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(name: str) -> Tensor:
        return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)

    return [
        Feed(draw("source"), draw("target"), torch.randint(1, 4, SHAPES["marks"], generator=generator))
        for _ in range(MICROBATCHES)
    ]


def carried(number: int) -> tuple[Carried, ...]:
    if not number:
        return ()
    wide = [Carried(SHAPES[name], torch.float64) for name in ("source", "target")]
    return (*wide, Carried(SHAPES["marks"], torch.int64, gradient=False))


class Everywhere:
    """Weights and gradients that are always there."""

    def begin(self, visits: Sequence[int]) -> None: ...

    def enter(self, layer: int) -> None: ...

    def leave(self, layer: int) -> None: ...

    def open(self, layer: int) -> None: ...

    def close(self, layer: int, last: bool) -> None: ...


def truth() -> tuple[list[Tensor], list[Tensor]]:
    """Losses of the microbatches and gradients of all weights, from one graph; layer 5 makes a part of each loss."""
    weights = [layer.weight.detach().requires_grad_() for layer in layers(SEED)]
    losses = []
    for feed in feeds(SEED):
        x, y = feed.source * weights[0], feed.target * weights[0]
        for n in range(1, 4):
            x = torch.tanh(x * weights[n]) + x
        part = torch.zeros((), dtype=torch.float64)
        for n in range(4, 9):
            if n == PART:
                part = (torch.cos(y * weights[n]) * feed.marks).sum() + x.square().sum()
            read = y if n in (4, 8) else y * x.sum(0)
            y = y + torch.sin(read * weights[n]) * feed.marks
        losses += [part, (y * weights[9]).square().sum()]
    torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses], [w.grad for w in weights if w.grad is not None]


def work(
    grid: Grid, device: torch.device, parallel: ParallelConfig, recomputed: bool, training: bool
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """One rank's run: its results and its gradients by layer."""
    every, queue, owners = layers(SEED), WeightQueue(), stage_owners(parallel)
    for layer in every:
        layer.weight.main_grad, layer.weight.queue = torch.zeros_like(layer.weight), queue
    bounds = [round(i * len(every) / len(owners)) for i in range(len(owners) + 1)]
    stages = {
        stage: StageLayers(
            range(bounds[stage], bounds[stage + 1]),
            every[bounds[stage] : bounds[stage + 1]],
            frozenset(range(1, 9)) if recomputed else frozenset(),
            {PART: every[PART].loss} if PART in range(bounds[stage], bounds[stage + 1]) else {},
        )
        for stage, owner in enumerate(owners)
        if owner == grid.pipeline.rank
    }
    executor = Executor(stages, len(owners), grid, queue, device)
    plan = plans(parallel.schedule, parallel.pipeline, parallel.chunks, MICROBATCHES, training=training)
    results = executor.run(plan[grid.pipeline.rank], feeds(SEED), carried, Everywhere())
    held = [number for stage in stages.values() for number in stage.numbers]
    return results, {number: every[number].weight.main_grad for number in held}


CASES = [("1f1b", 1, 1), ("1f1b", 2, 1), ("1f1b", 4, 1), ("gpipe", 3, 1), ("interleaved", 2, 2), ("interleaved", 2, 4)]
CASES += [("zb-h1", 3, 1), ("zb-v", 2, 2), ("zb-v", 4, 2)]


@pytest.mark.parametrize(("schedule", "pipeline", "chunks"), CASES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_tuple_of_tensors_goes_through_any_schedule(
    schedule: str, pipeline: int, chunks: int, recomputed: bool
) -> None:
    """A tensor that passes unchanged is still there for backward, and its gradient is the sum of all who read it.

    Losses of layers before the last count in value and gradient.
    """
    parallel = ParallelConfig(pipeline=pipeline, schedule=schedule, chunks=chunks, data=1)
    config = Config(model=ModelConfig(layers=8), parallel=parallel)  # only its grid is used
    losses, gradients = truth()
    every = threads.run(config, pipeline, work, parallel, recomputed, True)
    found = [result for results, _ in every for result in results]
    torch.testing.assert_close(torch.stack(sorted(found)), torch.stack(sorted(losses)), msg=f"seed {SEED}")
    mine = {number: gradient for _, held in every for number, gradient in held.items()}
    for number, gradient in enumerate(gradients):
        torch.testing.assert_close(mine[number], gradient, msg=f"seed {SEED}, layer {number}")
    every = threads.run(config, pipeline, work, parallel, recomputed, False)
    found = [result for results, _ in every for result in results]
    torch.testing.assert_close(torch.stack(sorted(found)), torch.stack(sorted(losses)), msg=f"seed {SEED}")
