"""Runs with experts: bitwise resume, and checkpoints that move between expert layouts and back."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from megapre.checkpoint import store
from megapre.config.check import check
from megapre.config.schema import Config
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.training.engine import build
from megapre.training.resume import restore
from megapre.training.trainer import HostSync
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import VOCAB, corpus, job, logical, losses, run, same
from tests.training.test_resume import resumed

SEED = random.SystemRandom().randrange(10**6)
STEPS = 6


def moe_job(prefix: str, folder: Path, layout: str, dtype: str = "fp32", steps: int = STEPS) -> Config:
    """Dense and sparse blocks, shared experts, biases, both losses, a capacity that binds, dropout."""
    cell = parse(layout)
    config = job(prefix, folder, parse("1x1x1"), steps=steps, dtype=dtype)
    model = replace(
        config.model, bias=False, experts=8, experts_per_token=2, expert_hidden=24, shared_experts=1, moe_every=2,
        capacity_factor=1.25, router_scores="sigmoid", router_bias=True, router_aux_loss=0.01, router_z_loss=1e-3,
    )  # fmt: skip
    config = replace(config, model=model, optimizer=replace(config.optimizer, router_bias_rate=0.02))
    return check(cell.apply(config), cell.world)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("2x1x2+ep:2+sp+zero1", "bf16"), pytest.param("1x2x2+ep:2", "fp32", marks=pytest.mark.nightly)],
)
def test_resume_with_experts_is_bitwise(layout: str, dtype: str, pool: RankPool, tmp_path: Path) -> None:
    config = moe_job(corpus(tmp_path / "text"), tmp_path / "whole", layout, dtype)
    world = parse(layout).world
    assert pool.run(world, run, config) == [0] * world
    whole = Path(config.train.run_dir)
    last = store.step_name(STEPS)
    biases = [v for name, v in logical(whole / "checkpoints" / last).items() if name.startswith("buffer/")]
    assert len(biases) == 2 and all(bool(bias.any()) for bias in biases)
    expected = losses(whole)
    for step in random.Random(SEED).sample(range(1, STEPS), 2):
        again = resumed(config, whole, step, tmp_path / f"from_{step}")
        assert pool.run(world, run, again) == [0] * world
        folder = Path(again.train.run_dir)
        assert losses(folder) == {s: v for s, v in expected.items() if s > step}, f"{step=} {SEED=}"
        same(whole / "checkpoints" / last, folder / "checkpoints" / last)


def move(ranks: Ranks, config: Config, source: str, target: str) -> bool:
    """Load ``source`` under the layout of ``config`` and save it to ``target``."""
    with connected(config, ranks) as (grid, device):
        engine = build(config, grid, device, VOCAB)
        state = restore(Path(source), config, engine.step)
        store.save(
            Path(target), state["step"], engine.step.pieces(share=True), state, rank=grid.world.rank,
            world=grid.world.size, sync=HostSync(grid.host),
        )  # fmt: skip
    return True


def test_checkpoints_move_between_expert_layouts_and_back(pool: RankPool, tmp_path: Path) -> None:
    """EP 1 to 2 with shared experts cut, to 4 under ZeRO-1, to 2 over a pipeline, and back: the same bits."""
    prefix = corpus(tmp_path / "text")
    first = moe_job(prefix, tmp_path / "run", "1x1x1", steps=2)
    assert pool.run(1, run, first) == [0]
    path = tmp_path / "run" / "checkpoints" / store.step_name(2)
    origin = path
    for index, layout in enumerate(("2x1x1+ep:2", "2x1x2+ep:2+etp:2+sp", "1x1x4+ep:4+zero1", "1x2x2+ep:2", "1x1x1")):
        config, folder = moe_job(prefix, tmp_path / "run", layout, steps=2), tmp_path / str(index)
        assert all(pool.run(parse(layout).world, move, config, str(path), str(folder)))
        path = folder / store.step_name(2)
        assert store.check(path) == []
        same(origin, path)
