"""Every instrument does what it is for: it stays silent on a right layout and speaks on a wrong one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megapre.config.check import check
from megapre.config.schema import Config, OptimizerConfig
from megapre.data.loader import Counts
from megapre.parallel.comm import Axis
from megapre.parallel.grid import Grid
from megapre.training.engine import build
from megapre.verify import run, threads
from megapre.verify.cells import batches, parse, scaled_down, share
from megapre.verify.instruments import INSTRUMENTS, FifoAxis, counted, flipped, poison_gaps, poisoned

SEED = random.SystemRandom().randrange(10**6)
SMALL, VOCAB = scaled_down(Config(optimizer=OptimizerConfig(lr=3e-3)))


def job(layout: str) -> tuple[Config, int]:
    cell = parse(layout)
    return check(cell.apply(SMALL), cell.world), cell.world


def one_step(grid: Grid, device: torch.device, config: Config, spoil: bool) -> torch.Tensor:
    """Weights after a step; with ``spoil`` the gaps of the flat buffers hold NaN."""
    engine = build(config, grid, device, VOCAB)
    flat = engine.model.flat
    batch = share(batches(config, VOCAB, 1)[0], grid.data.rank, grid.data.size, 1)
    for index, bucket in enumerate(flat.layout.buckets):
        with flat.weights.whole(index) as whole:
            if spoil:
                poison_gaps(bucket, whole)
    loss, rms = engine.step.compute_gradients(batch, Counts(50), 0)
    if spoil and not config.parallel.zero:  # a shard of ZeRO may begin inside a tensor
        for bucket, shard in zip(flat.layout.buckets, flat.gradients.shards):
            poison_gaps(bucket, shard)
    engine.step.apply_gradients(loss, rms, 1e-3)
    kept = []
    for index, bucket in enumerate(flat.layout.buckets):
        with flat.weights.whole(index) as whole:
            kept += [whole[bucket.place(slot)].clone() for slot in bucket.slots]
    return torch.cat(kept)


@pytest.mark.parametrize("layout", ["2x2x1+sp", "1x1x2+zero1", "1x1x2+zero3", "1x2x1+ring:2", "1x1x1+ulysses:2"])
def test_nobody_reads_memory_that_nobody_wrote(layout: str) -> None:
    """B65, B76: freed, received-into and padding memory holds NaN, and not a bit of the weights changes."""
    config, world = job(layout)
    clean = threads.run(config, world, one_step, config, False)
    with poisoned():
        assert torch.empty(3).isnan().all()
        dirty = threads.run(config, world, one_step, config, True)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


def flip_once(wanted: str, victim: int, world_rank: int) -> Callable[[str, int, int], tuple[int, int] | None]:
    """Flip one high bit of one element of the first ``wanted`` on rank ``victim``."""
    left = [wanted] if world_rank == victim else []
    draw = random.Random(SEED)

    def flip(kind: str, call: int, elements: int) -> tuple[int, int] | None:
        if kind in left and elements > 100:
            left.remove(kind)
            return draw.randrange(elements), 54  # an exponent bit of fp64
        return None

    return flip


def with_a_flip(
    grid: Grid, device: torch.device, jobs: list[run.Job], wanted: str, victim: int
) -> list[run.Report]:
    return run.compare(flipped(grid, flip_once(wanted, victim, grid.world.rank)), device, jobs, VOCAB)


@pytest.mark.parametrize(
    ("layout", "kind", "rank", "noticed"),
    [
        ("2x1x1", "tensor/all_reduce", 1, "gradient/"),
        ("1x2x1", "pipeline/recv", 1, "gradient/"),
        ("1x1x2", "data/all_reduce", 1, "gradient/"),
        ("1x1x2+zero1", "data/all_gather", 1, "replicas"),
        ("1x1x1+ring:2", "context/exchange", 0, "gradient/"),  # rank 1 may not read half of what it gets
    ],
)
def test_a_flipped_bit_in_any_collective_is_noticed(
    layout: str, kind: str, rank: int, noticed: str, tmp_path: Path
) -> None:
    config, world = job(layout)
    exact = run.arm_a(config)
    prover = run.Prover(SMALL, VOCAB, None, tmp_path)
    jobs = [(check(exact, world), prover._truth(run.arm_a(SMALL)), False)]
    for victim in (-1, rank):
        (report,) = threads.run(config, world, with_a_flip, jobs, kind, victim)[0]
        wrong = [name for name, error in report.errors.items() if not error <= run.EXACT]
        assert any(name.startswith(noticed) for name in wrong) == (victim >= 0), f"{victim=} {wrong} {SEED=}"


def read_early(grid: Grid, device: torch.device) -> tuple[bool, float]:
    tensor = torch.ones(4)
    work = grid.data.all_reduce(tensor)
    early = bool(tensor.isnan().all())
    work.wait()
    return early, float(tensor[0])


@pytest.mark.parametrize("name", ["fifo", "delay"])
def test_what_is_read_before_wait_is_poison(name: str) -> None:
    config, world = job("1x1x2")
    made: Callable[[Axis, int], Axis] = INSTRUMENTS[name]
    found = threads.run(
        config, world, lambda grid, device: read_early(replace(grid, data=made(grid.data, SEED)), device), turns=False
    )
    assert found == [(True, 2.0)] * 2


def test_instruments_stand_around_each_other() -> None:
    counts: list[dict[str, int]] = [{}, {}]
    config, world = job("1x1x2")

    def both(grid: Grid, device: torch.device) -> float:
        inner = replace(grid, data=FifoAxis(grid.data))
        tensor = torch.ones(8)
        counted(inner, counts[grid.data.rank]).data.all_reduce(tensor).wait()
        return float(tensor.sum())

    assert threads.run(config, world, both, turns=False) == [16.0] * 2
    assert counts == [{"data/all_reduce": 32}] * 2


def test_threads_refuse_calls_that_do_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PATIENCE", 0.5)
    config, world = job("2x1x1")

    def crossed(grid: Grid, device: torch.device) -> None:
        if grid.tensor.rank:
            grid.tensor.all_gather(torch.zeros(8), torch.zeros(4)).wait()
        else:
            grid.tensor.all_reduce(torch.zeros(4)).wait()

    with pytest.raises(threads.Mismatch, match="calls all_"):
        threads.run(config, world, crossed)

    def alone(grid: Grid, device: torch.device) -> None:
        if not grid.tensor.rank:
            grid.tensor.all_reduce(torch.zeros(4)).wait()

    with pytest.raises(threads.Mismatch, match="not all ranks came"):
        threads.run(config, world, alone)
