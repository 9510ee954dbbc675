"""A run that is interrupted at any step ends bitwise where the uninterrupted run ends."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megapre.checkpoint import store
from megapre.config.schema import Config
from megapre.monitor.fingerprint import differences, fingerprint
from megapre.verify.cells import Cell, parse
from megapre.verify.pool import RankPool
from tests.training.jobs import corpus, job, losses, run, same

STEPS = 12
SEED = random.SystemRandom().randrange(10**6)


def resumed(config: Config, source: Path, step: int, folder: Path, **train: object) -> Config:
    """The job in a new run folder that holds the source's checkpoint of ``step``."""
    folder.mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    shutil.copytree(source / "checkpoints" / store.step_name(step), folder / "checkpoints" / store.step_name(step))
    return replace(config, train=replace(config.train, run_dir=str(folder), **train))


@pytest.mark.parametrize(
    ("layout", "dtype", "steps"),
    [
        ("1x1x1", "fp32", range(1, STEPS)),
        ("2x1x2+sp+zero1", "bf16", range(1, STEPS)),
        ("1x2x2+zero1", "fp16", random.Random(SEED).sample(range(1, STEPS), 3)),
        ("1x2x2", "fp32", random.Random(SEED + 1).sample(range(1, STEPS), 3)),
        ("1x2x2+zero3+offload", "bf16", random.Random(SEED + 2).sample(range(1, STEPS), 2)),
        pytest.param(
            "2x1x2+sp+zero3+offload-parameters", "fp16", random.Random(SEED + 3).sample(range(1, STEPS), 3),
            marks=pytest.mark.nightly,
        ),
        pytest.param("1x2x2+zero2+zb-h1", "bf16", range(1, STEPS), marks=pytest.mark.nightly),
    ],
    ids=[
        "1x1x1-fp32", "2x1x2+sp+zero1-bf16", "1x2x2+zero1-fp16", "1x2x2-fp32", "1x2x2+zero3+offload-bf16",
        "2x1x2+sp+zero3+offload-parameters-fp16", "1x2x2+zero2+zb-h1-bf16",
    ],
)  # fmt: skip
def test_resume_is_bitwise_at_every_step(
    layout: str, dtype: str, steps: range, pool: RankPool, tmp_path: Path
) -> None:
    cell = parse(layout)
    config = job(corpus(tmp_path / "text"), tmp_path / "whole", cell, dtype=dtype)
    assert pool.run(cell.world, run, config) == [0] * cell.world
    whole = Path(config.train.run_dir)
    expected, validation = losses(whole), losses(whole, "validation")
    assert len(expected) == STEPS and len(set(expected.values())) == STEPS
    for step in steps:
        again = resumed(config, whole, step, tmp_path / f"from_{step}")
        assert pool.run(cell.world, run, again) == [0] * cell.world
        folder = Path(again.train.run_dir)
        assert losses(folder) == {s: v for s, v in expected.items() if s > step}, f"{step=} {SEED=}"
        assert losses(folder, "validation") == {s: v for s, v in validation.items() if s > step}, f"{step=} {SEED=}"
        same(whole / "checkpoints" / store.step_name(STEPS), folder / "checkpoints" / store.step_name(STEPS))


def test_fp16_overflow_is_skipped_and_the_scale_recovers(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", Cell(), dtype="fp16")
    assert pool.run(1, run, config) == [0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("split") == "train"]
    skipped = [row["skipped"] for row in rows]
    assert skipped[0] == 1 and 0 in skipped
    scales = [row["loss_scale"] for row in rows]
    for before, after, skip in zip(scales, scales[1:], skipped):
        assert after == before / 2 if skip else after in (before, before * 2)


def test_raising_the_number_of_steps_changes_no_sample(pool: RankPool, tmp_path: Path) -> None:
    """A run prolonged on resume sees what a run of that length sees; only the learning rate may differ."""
    prefix = corpus(tmp_path / "text")
    config = job(prefix, tmp_path / "short", Cell(), steps=6)
    config = replace(config, schedule=replace(config.schedule, kind="constant"))
    assert pool.run(1, run, config) == [0]
    longer = resumed(config, tmp_path / "short", 6, tmp_path / "longer", steps=12)
    assert pool.run(1, run, longer) == [0]
    whole = replace(longer, train=replace(longer.train, run_dir=str(tmp_path / "whole")))
    assert pool.run(1, run, whole) == [0]
    assert {**losses(tmp_path / "short"), **losses(tmp_path / "longer")} == losses(tmp_path / "whole")


def test_another_data_size_changes_no_global_batch(pool: RankPool, tmp_path: Path) -> None:
    """Losses of DP 1 and DP 4 agree to rounding at every step."""
    prefix = corpus(tmp_path / "text")
    found = []
    for cell in (Cell(), Cell(data=4)):
        config = job(prefix, tmp_path / str(cell), cell, interval=0)
        assert pool.run(cell.world, run, config) == [0] * cell.world
        found.append([float.fromhex(v) for v in losses(tmp_path / str(cell)).values()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_resume_refuses_another_batch(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", Cell(), steps=2)
    assert pool.run(1, run, config) == [0]
    changed = replace(config, train=replace(config.train, global_batch=16, steps=4))
    with pytest.raises(Exception, match=r"train\.global_batch = 8, but the job has 16"):
        pool.run(1, run, changed)


def test_a_refused_change_can_be_allowed_by_its_key(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", Cell(), steps=2)
    assert pool.run(1, run, config) == [0]
    changed = replace(
        config,
        data=replace(config.data, seed=99),
        train=replace(config.train, steps=4, seed=7),
        checkpoint=replace(config.checkpoint, allow_changes=["data.seed"]),
    )
    with pytest.raises(Exception, match=r"train\.seed = 1, but the job has 7: set it back") as refusal:
        pool.run(1, run, changed)
    assert "data.seed" not in str(refusal.value).partition("ValueError")[2].partition("allow it")[0]
    allowed = replace(changed, checkpoint=replace(config.checkpoint, allow_changes=["data.seed", "train.seed"]))
    assert pool.run(1, run, allowed) == [0]
    state = store.read_state(tmp_path / "run" / "checkpoints" / store.step_name(4))
    assert {"megapre", "revision", "torch", "threads", "isa", "config"} <= state["environment"].keys()


def test_another_environment_is_named() -> None:
    here = fingerprint(Config())
    assert differences(here, here) == "" and differences({}, here) == ""
    assert differences({**here, "torch": "2.1", "config": "x"}, here) == f"torch 2.1 -> {here['torch']}"
