"""What the optimizers keep, freeze, save and refuse."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megapre.checkpoint import store
from megapre.config.check import ConfigError, check
from megapre.config.schema import Config, OptimizerConfig, ParallelConfig
from megapre.data.loader import Counts
from megapre.optim.muon import COEFFICIENTS
from megapre.parallel.grid import single
from megapre.training.engine import build
from megapre.verify.cells import batches, every, parse
from megapre.verify.pool import RankPool
from tests.optim.test_layouts import job as small
from tests.training.jobs import corpus, job, logical, losses, run, same
from tests.training.test_reshard import loads_and_saves_all
from tests.training.test_resume import resumed

SEED = random.SystemRandom().randrange(10**6)
CPU = torch.device("cpu")
STATES = {
    "adamw": {"weight", "exp_avg", "exp_avg_sq"},
    "lion": {"weight", "exp_avg"},
    "muon": {"weight", "momentum", "exp_avg", "exp_avg_sq"},
    "adafactor": {"weight", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_column"},
}


@pytest.mark.parametrize("kind", ["lion", "muon", "adafactor"])
def test_state_loads_into_every_layout(kind: str, pool: RankPool, tmp_path: Path) -> None:
    """Bitwise, and every layout would save each element of it once."""
    cells = [cell for cell in every(8) if cell.world == 8]
    source = random.Random(SEED).choice(cells)
    config = replace(job(corpus(tmp_path / "text"), tmp_path / "run", source, steps=2, interval=2))
    config = replace(config, optimizer=OptimizerConfig(kind=kind, lr=1e-2))
    assert pool.run(source.world, run, config) == [0] * source.world
    path = tmp_path / "run" / "checkpoints" / store.step_name(2)
    truth = logical(path)
    assert {name.split("/")[0] for name in truth} == STATES[kind]
    assert all(
        bool(value.any()) for name, value in truth.items() if "exp_avg" in name and "attention.k.bias" not in name
    )
    for target in random.Random(SEED + 1).sample(cells, 4):
        loads_and_saves_all(path, config, target, truth, f"from {source}, {SEED=}")


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_resume_is_bitwise_with_a_plateau(kind: str, pool: RankPool, tmp_path: Path) -> None:
    cell = parse("2x1x2+sp+zero1")
    config = job(corpus(tmp_path / "text"), tmp_path / "whole", cell, dtype="bf16")
    schedule = replace(config.schedule, kind="plateau", patience=0, plateau_factor=0.5, min_lr_ratio=0.01)
    config = replace(config, optimizer=OptimizerConfig(kind=kind, lr=1.0), schedule=schedule)
    config = replace(config, train=replace(config.train, eval_interval=2))
    assert pool.run(cell.world, run, config) == [0] * cell.world
    whole = Path(config.train.run_dir)
    last = store.step_name(config.train.steps)
    assert store.read_state(whole / "checkpoints" / last)["plateau"]["factor"] < 1.0
    step = random.Random(SEED).randrange(3, config.train.steps)
    again = resumed(config, whole, step, tmp_path / "again")
    assert pool.run(cell.world, run, again) == [0] * cell.world
    assert losses(tmp_path / "again") == {s: v for s, v in losses(whole).items() if s > step}, f"{step=} {SEED=}"
    same(whole / "checkpoints" / last, tmp_path / "again" / "checkpoints" / last)


def test_frozen_tensors_stay_count_in_no_norm_and_cost_no_state() -> None:
    config, vocab_size = small("adamw")
    frozen = replace(config, optimizer=replace(config.optimizer, freeze=["embedding.*", "blocks.[01].*"]))
    engine = build(frozen, single(), CPU, vocab_size)
    names = {slot.spec.name for slot in engine.model.flat.layout.slots}
    still = {name for name in names if name.startswith(("embedding.", "blocks.0.", "blocks.1."))}
    before = {a.name: t.clone() for a, t in engine.step.optimizer.pieces(share=True)}
    assert {name for name in names if f"exp_avg/{name}" in before} == names - still
    result = engine.step(batches(config, vocab_size, 1)[0], Counts(50), 0, 1e-2)
    changed = {a.name for a, t in engine.step.optimizer.pieces(share=True) if not torch.equal(t, before[a.name])}
    assert {name.partition("/")[2] for name in changed if name.startswith("weight/")} == names - still
    whole = build(config, single(), CPU, vocab_size).step(batches(config, vocab_size, 1)[0], Counts(50), 0, 1e-2)
    assert 0 < float(result.grad_norm) < float(whole.grad_norm)


def test_a_skipped_step_changes_nothing() -> None:
    for kind in ("lion", "muon", "adafactor"):
        config, vocab_size = small(kind)
        engine = build(config, single(), CPU, vocab_size)
        engine.step(batches(config, vocab_size, 1)[0], Counts(50), 0, 1e-2)
        before = {a.name: t.clone() for a, t in engine.step.optimizer.pieces(share=True)}
        loss, rms = engine.step.compute_gradients(batches(config, vocab_size, 1)[0], Counts(50), 1)
        engine.model.flat.gradients.shards[0][3] = float("nan")
        assert float(engine.step.apply_gradients(loss, rms, 1e-2).skipped) == 1
        for address, held in engine.step.optimizer.pieces(share=True):
            assert torch.equal(held, before[address.name]), f"{kind}: {address.name}"


def test_muons_quintic_brings_singular_values_near_one() -> None:
    """What the five rounds are for: from 0.01 to 1 everything ends between 0.6 and 1.3 (Jordan et al.)."""
    x = torch.linspace(0.01, 1.0, 1000, dtype=torch.float64)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    assert 0.6 < float(x.min()) and float(x.max()) < 1.3


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        (["encoder.*"], r"optimizer\.freeze = 'encoder\.\*' fits none of the model's \d+ tensors"),
        (["*"], r"freezes all \d+ tensors: leave one to train"),
    ],
)
def test_a_useless_freeze_is_refused(freeze: list[str], told: str) -> None:
    config, vocab_size = small("adamw")
    with pytest.raises(ValueError, match=told):
        build(replace(config, optimizer=OptimizerConfig(freeze=freeze)), single(), CPU, vocab_size)


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_what_sums_over_ranks_is_not_offloaded(kind: str) -> None:
    job = Config(optimizer=OptimizerConfig(kind=kind), parallel=ParallelConfig(zero=1, offload="optimizer"))
    with pytest.raises(ConfigError, match=rf"optimizer\.kind = '{kind}' cannot sum over ranks"):
        check(job)
