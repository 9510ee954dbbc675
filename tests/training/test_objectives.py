"""A few steps of every job of examples/objectives: its layout and one rank are asked, and lose, the same.

That each learns, `benchmarks/learning.py` shows.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megapre.checkpoint import store
from megapre.config.check import check, world_size
from megapre.config.load import load
from megapre.config.schema import Config
from megapre.data.pack import plan
from megapre.objectives.table import OBJECTIVES
from megapre.training.resume import refuse_changes
from megapre.verify.pool import RankPool
from tests.data.test_objective_data import SPLIT, write
from tests.training.jobs import losses, run, same
from tests.training.test_resume import resumed

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "objectives"
JOBS = sorted(path.stem for path in FOLDER.glob("*.toml"))
STEPS = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = write(tmp_path_factory.mktemp("text") / "a", documents=60, sentences=12)
    plan(prefix, 64, SPLIT, sentences=True)
    return prefix


def job(name: str, prefix: str, run_dir: Path, *changes: str) -> Config:
    """The example, narrower and short, on made-up text whose tokens tell their document."""
    small = [
        f'data.paths=["{prefix}"]', f"data.split={json.dumps(SPLIT)}", "data.tokenizer_model=", "model.vocab_size=400",
        "data.tokenizer_type=NullTokenizer", "model.hidden=32", f"train.steps={STEPS}", "train.global_batch=4",
        "train.microbatch=1", "train.eval_samples=4", "train.device=cpu", "train.threads=1", "schedule.warmup=0",
        f"train.run_dir={run_dir}", "monitor.interval=1", "checkpoint.resume=false",
    ]  # fmt: skip
    return check(load(FOLDER / f"{name}.toml", [*small, *changes]))


@pytest.mark.parametrize("name", JOBS)
def test_an_example_trains_alike_on_its_layout_and_on_one_rank(
    name: str, pair: str, pool: RankPool, tmp_path: Path
) -> None:
    one = job(name, pair, tmp_path / "one", "parallel.data=1", "parallel.tensor=1", "parallel.pipeline=1")
    laid_out = job(name, pair, tmp_path / "laid-out")
    assert world_size(laid_out) > 1
    assert pool.run(1, run, one) == [0]
    assert pool.run(world_size(laid_out), run, laid_out) == [0] * world_size(laid_out)
    for split in ("train", "validation"):
        found = [losses(tmp_path / folder, split) for folder in ("one", "laid-out")]
        a, b = ({step: float.fromhex(loss) for step, loss in rows.items()} for rows in found)
        assert a.keys() == b.keys() and len(a) >= 1
        assert all(abs(a[step] - b[step]) < 2e-4 * a[step] for step in a), (name, split, a, b)


@pytest.mark.parametrize("name", ["span_corruption"])
def test_a_resumed_example_ends_bitwise_where_it_would_have(
    name: str, pair: str, pool: RankPool, tmp_path: Path
) -> None:
    """Two tensors between stages, dropout in both stacks."""
    saved = ["model.dropout=0.1", "model.attention_dropout=0.1", "checkpoint.interval=1", "checkpoint.keep_last=9"]
    config = job(name, pair, tmp_path / "whole", *saved, "checkpoint.resume=true")
    ranks = world_size(config)
    assert pool.run(ranks, run, config) == [0] * ranks
    whole = Path(config.train.run_dir)
    again = resumed(config, whole, 2, tmp_path / "again")
    assert pool.run(ranks, run, again) == [0] * ranks
    assert losses(tmp_path / "again") == {s: v for s, v in losses(whole).items() if s > 2}
    last = Path("checkpoints") / store.step_name(STEPS)
    same(whole / last, tmp_path / "again" / last)


def test_every_objective_has_an_example() -> None:
    assert set(OBJECTIVES) == set(JOBS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask_unit", "word"), ("mask_span", 4.0), ("delete_probability", 0.1), ("permute_sentences", 1.0),
        ("rotate_documents", 1.0), ("fim_rate", 0.9), ("fim_spm_rate", 0.1), ("mask_token", 3), ("cls_token", 3),
        ("sep_token", 3), ("pad_token", 3), ("start_token", 3), ("sentinel_tokens", [3, 9]), ("fim_tokens", [1, 2, 3]),
    ],
)  # fmt: skip
def test_a_run_does_not_resume_with_another_corruption(key: str, value: object, tmp_path: Path) -> None:
    old, new = asdict(Config()), asdict(Config())
    refuse_changes(old, new, tmp_path)
    new["data"][key] = value
    with pytest.raises(ValueError, match=rf"data\.{key}"):
        refuse_changes(old, new, tmp_path)


def test_a_checkpoint_older_than_a_key_had_its_default(tmp_path: Path) -> None:
    old, new = asdict(Config()), asdict(Config())
    del old["data"]["fraction"], old["model"]["qk_norm"]
    refuse_changes(old, new, tmp_path)
    new["data"]["fraction"] = 0.5
    with pytest.raises(ValueError, match=r"data\.fraction = 1\.0, but the job has 0\.5"):
        refuse_changes(old, new, tmp_path)
