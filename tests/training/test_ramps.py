"""Both ramps: the same windows and targets, the same losses under any layout, and bitwise resume at every step."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megapre.checkpoint import store
from megapre.config.check import check
from megapre.config.schema import Config
from megapre.data.loader import Loader
from megapre.verify.cells import Cell, parse
from megapre.verify.pool import RankPool
from tests.training.jobs import VOCAB, corpus, job, losses, run, same

SEED = random.SystemRandom().randrange(10**6)


def ramped(prefix: str, folder: Path, cell: Cell, dtype: str = "fp32") -> Config:
    """Batches 4 and 8, rows of 4, 8 and 16 tokens, over the first seven of ten steps; dropout is on."""
    config = job(prefix, folder, cell, steps=10, dtype=dtype)
    train = replace(config.train, batch_ramp=[4, 4, 20], sequence_ramp=[4, 30], microbatch=2)
    data = replace(config.data, reset_positions=True, reset_attention=True)
    schedule = replace(config.schedule, unit="samples", warmup=20, decay=60)
    return check(replace(config, train=train, data=data, schedule=schedule), cell.world)


def test_rows_are_the_windows_cut(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "text")
    config = ramped(prefix, tmp_path / "run", Cell())
    plain = replace(config, train=replace(config.train, batch_ramp=[], sequence_ramp=[], global_batch=1, microbatch=1))
    whole = Loader(plain, vocab_size=VOCAB, data_rank=0, data_size=1)
    loader = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1)
    lengths, consumed = [], 0
    for step in range(10):
        batch = loader.step_batch(step)
        lengths.append(batch.microbatches[0].tokens.shape[0])
        for m in batch.microbatches:
            rows = 16 // m.tokens.shape[0]
            assert m.tokens.shape[1] == 2 * rows and len(set(m.samples.tolist())) == 2 * rows
            for sample in range(2):
                window = whole.step_batch(consumed).microbatches[0]
                consumed += 1
                for name in ("tokens", "targets", "weights"):
                    found = getattr(m, name)[:, sample * rows : (sample + 1) * rows].T.reshape(-1)
                    assert torch.equal(found, getattr(window, name)[:, 0]), (step, name)
                for row in range(rows):
                    column = sample * rows + row
                    segments, positions = m.segments[:, column].tolist(), m.positions[:, column].tolist()
                    assert positions[0] == 0 and segments[0] == 0
                    for i in range(1, len(positions)):
                        new = segments[i] != segments[i - 1]
                        assert positions[i] == (0 if new else positions[i - 1] + 1)
    assert lengths == [4, 4, 4, 4, 8, 8, 8, 16, 16, 16]


nightly = pytest.mark.nightly


@pytest.mark.parametrize(
    "layout",
    ["1x2x1", *(pytest.param(name, marks=nightly) for name in ("2x1x2+sp+zero1", "1x2x2", "2x2x1+sp", "1x1x1+ring:2"))],
)
def test_every_layout_walks_the_same_ramp(layout: str, pool: RankPool, tmp_path: Path) -> None:
    """B81: the number of microbatches and their shape change between steps, with the reductions overlapped."""
    prefix, found = corpus(tmp_path / "text"), []
    for name in ("1x1x1", layout):
        cell = parse(name)
        config = ramped(prefix, tmp_path / name, cell, "fp64")
        config = replace(config, train=replace(config.train, microbatch=1))
        assert pool.run(cell.world, run, config) == [0] * cell.world
        found.append([float.fromhex(value) for value in losses(tmp_path / name).values()])
    assert len(found[0]) == 10 and found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("layout", [pytest.param("1x1x1", marks=nightly), "1x2x2+zero1"])
def test_resume_is_bitwise_at_every_step_of_the_ramps(layout: str, pool: RankPool, tmp_path: Path) -> None:
    cell = parse(layout)
    config = ramped(corpus(tmp_path / "text"), tmp_path / "whole", cell)
    assert pool.run(cell.world, run, config) == [0] * cell.world
    whole = tmp_path / "whole"
    expected = losses(whole)
    steps = range(1, 10) if cell.world == 1 else random.Random(SEED).sample(range(1, 10), 2)
    for step in steps:
        folder = tmp_path / f"from_{step}"
        shutil.copytree(whole / "checkpoints" / store.step_name(step), folder / "checkpoints" / store.step_name(step))
        again = replace(config, train=replace(config.train, run_dir=str(folder)))
        assert pool.run(cell.world, run, again) == [0] * cell.world
        assert losses(folder) == {s: v for s, v in expected.items() if s > step}, f"{step=} {SEED=}"
        same(whole / "checkpoints" / store.step_name(10), folder / "checkpoints" / store.step_name(10))
    assert store.read_state(whole / "checkpoints" / store.step_name(3))["samples"] == 12
