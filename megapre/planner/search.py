"""All layouts of a job on a number of devices, ranked by predicted step time.

Every candidate is a job file that ``config/check.py`` accepts. Those that do not fit are dropped; a closed form of
the pipeline ranks the rest, and the best are simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megapre.config.check import ConfigError, check
from megapre.config.schema import Config
from megapre.planner.constants import Constants
from megapre.planner.hardware import Device
from megapre.planner.job import Job, from_config
from megapre.planner.memory import GIB, Memory, fullest
from megapre.planner.pipeline import Costs, owners
from megapre.planner.timing import Time, predict

SIMULATED = 24
"""Candidates whose schedule is simulated."""
MICROBATCHES = (1, 2, 4, 8, 16)
CONTEXTS = (1, 2, 4, 8, 16)
SHORTEST = 4096
"""Tokens of a sequence below which no context-parallel rank is worth trying."""


@dataclass(frozen=True)
class Candidate:
    """A layout with its prediction."""

    config: Config
    job: Job
    time: Time
    memory: Memory


@dataclass(frozen=True)
class Found:
    """What a search looked at."""

    best: list[Candidate]
    """Fastest first."""
    tried: int
    """Layouts that the rules allow."""
    fitting: int
    smallest: tuple[Job, Memory] | None
    """The layout that needs least memory, when none fits."""


def closed_form(job: Job, costs: Costs) -> float:
    """The pipeline's time if all stages took as long as the slowest: (m + (p - 1) / chunks) microbatches."""
    layout = job.layout
    ranks = [0.0] * layout.pipeline
    for owner, f, b in zip(owners(layout), costs.forward, costs.backward):
        ranks[owner] += f + b
    saved = 3 if layout.schedule.startswith("zb") else layout.chunks
    return max(ranks) * (layout.microbatches + (layout.pipeline - 1) / saved)


def search(config: Config, device: Device, gpus: int, vocab: int, constants: Constants, keep: int = 10) -> Found:
    """The fastest ``keep`` layouts of ``config`` on ``gpus`` devices."""
    rough: list[tuple[float, Config, Job]] = []
    tried = fitting = 0
    smallest: tuple[Job, Memory] | None = None
    for policies in _layouts(config, device, gpus):
        for candidate in policies:  # from the fastest policy to the one that saves most
            tried += 1
            job = from_config(candidate, device, vocab)
            need = fullest(job)
            if smallest is None or need.total < smallest[1].total:
                smallest = (job, need)
            if need.total <= device.memory:
                fitting += 1
                rough.append((predict(job, constants, closed_form).step, candidate, job))
                break
    rough.sort(key=lambda entry: entry[0])
    best = [Candidate(candidate, job, predict(job, constants), fullest(job)) for _, candidate, job in rough[:SIMULATED]]
    best.sort(key=lambda candidate: candidate.time.step)
    return Found(best[:keep], tried, fitting, smallest)


def _layouts(config: Config, device: Device, gpus: int) -> Iterator[list[Config]]:
    """Groups of candidates that differ in recomputation alone."""
    model, train = config.model, config.train
    for tensor in _divisors(gpus, device.gpus_per_node):
        for pipeline in _divisors(gpus // tensor, model.layers):
            for context in CONTEXTS:
                left = gpus // tensor // pipeline
                if left % context or (context > 1 and model.sequence < SHORTEST * context):
                    continue
                data = left // context
                for microbatch in MICROBATCHES:
                    if train.global_batch % (microbatch * data):
                        continue
                    count = train.global_batch // (microbatch * data)
                    for schedule, chunks in _schedules(pipeline, model.layers, count):
                        for zero in (1, 3) if data * context > 1 else (0,):
                            if zero == 3 and pipeline > 1:
                                continue  # gathers every microbatch's weights again
                            for expert in _experts(model.experts, data * context * tensor):
                                made = _policies(
                                    config, tensor, pipeline, data, context, microbatch, schedule, chunks, zero, expert
                                )
                                if made:
                                    yield made


def _experts(experts: int, ranks: int) -> list[int]:
    """Expert-parallel sizes: those that deal out experts and ranks evenly."""
    return [size for size in _divisors(ranks, experts) if experts % size == 0] if experts else [1]


def _schedules(pipeline: int, layers: int, microbatches: int) -> Iterator[tuple[str, int]]:
    if pipeline == 1:
        yield "1f1b", 1
        return
    yield "1f1b", 1
    yield "zb-h1", 1
    if layers % (2 * pipeline) == 0:
        yield "zb-v", 2
    if microbatches % pipeline == 0:
        for chunks in (2, 3, 4, 5, 6, 8, 10):
            if layers % (pipeline * chunks) == 0:
                yield "interleaved", chunks


def _policies(
    config: Config, tensor: int, pipeline: int, data: int, context: int, microbatch: int, schedule: str, chunks: int,
    zero: int, expert: int,
) -> list[Config]:  # fmt: skip
    """The layout under every recompute policy; empty when the rules refuse it."""
    parallel = replace(
        config.parallel,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=context,
        sequence=tensor > 1,
        schedule=schedule,
        chunks=chunks,
        zero=zero,
        layers_per_stage=[],
        recompute="none",
        recompute_layers=0,
        expert=expert,
        expert_tensor=1,
    )
    base = replace(config, parallel=parallel, train=replace(config.train, microbatch=microbatch))
    try:
        base = check(base, tensor * pipeline * data * context)
    except ConfigError:
        return []
    return [replace(base, parallel=replace(base.parallel, recompute=how)) for how in ("none", "selective", "full")]


def _divisors(number: int, largest: int) -> list[int]:
    return [n for n in range(1, min(number, largest) + 1) if number % n == 0]


def refusal(device: Device, gpus: int, job: Job, need: Memory) -> str:
    """Why nothing fits, with the arithmetic of the layout that needs least."""
    parts = " + ".join(f"{size / GIB:.1f} {kind}" for kind, size in need.kinds().items() if size / GIB >= 0.05)
    layout = job.layout
    return (
        f"no layout on {gpus} x {device.name} fits: the smallest (tensor {layout.tensor}, pipeline {layout.pipeline}, "
        f"data {layout.data}, context {layout.context}, zero {layout.zero}, recompute {layout.recompute}) needs "
        f"{parts} = {need.total / GIB:.1f} GiB of {device.memory / GIB:.0f} GiB: raise --gpus or shrink the model"
    )
