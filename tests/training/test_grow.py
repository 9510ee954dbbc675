"""A larger model goes on from a smaller one's checkpoint, by the commands that users type, under any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megapre.checkpoint import store
from megapre.checkpoint.grow import write_grown
from megapre.config.check import check
from megapre.config.load import to_toml
from megapre.config.schema import Config
from megapre.hub.load import Import
from megapre.models.grow import growths
from megapre.models.spec import tensors
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.hub.test_train import gpt2
from tests.training.jobs import VOCAB, corpus, job, logical, run
from tools.convert_checkpoint import main as convert

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": dict(
        kv_heads=2, ffn_hidden=40, norm="rmsnorm", activation="swiglu", positions="rope", bias=False,
        tied_embeddings=False,
    ),
}  # fmt: skip


def first_loss(run_dir: Path) -> float:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(float(row["loss"]) for row in rows if row.get("split") == "train" and row["step"] == 1)


def starting(config: Config, load: Path, run_dir: Path, **changes: Any) -> Config:
    """The job with another model, from the weights of a checkpoint."""
    model = replace(config.model, **changes)
    start = replace(config.checkpoint, load=str(load), weights_only=True)
    return replace(config, model=model, checkpoint=start, train=replace(config.train, run_dir=str(run_dir)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_goes_on_where_the_smaller_model_left_it(
    family: str, pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = corpus(tmp_path / "text")
    settings = FAMILIES[family] | {"dropout": 0.0}
    old = job(prefix, tmp_path / "old", parse("1x2x1"), steps=4, interval=4, dtype="fp64")
    old = replace(old, model=replace(old.model, layers=2, **settings))
    assert pool.run(2, run, check(old, 2)) == [0] * 2
    step = tmp_path / "old" / "checkpoints" / store.step_name(4)
    alone = replace(job(prefix, tmp_path, parse("1x1x1"), steps=1, dtype="fp64"), model=old.model)
    assert pool.run(1, run, starting(alone, step, tmp_path / "alone")) == [0]
    wide = dict(layers=4, hidden=64, heads=8, ffn_hidden=96 if family == "llama" else 200)
    layout = parse("2x2x1+sp")
    large = replace(job(prefix, tmp_path, layout, steps=3, interval=3, dtype="fp64"), model=old.model)
    large = check(starting(large, tmp_path / "grown" / store.step_name(0), tmp_path / "new", **wide), 4)
    (tmp_path / "large.toml").write_text(to_toml(large))
    asked = ["grow", str(step), str(tmp_path / "grown"), str(tmp_path / "large.toml"), "--noise", "0.1"]
    assert convert(asked) == 0
    assert large.checkpoint.load in capsys.readouterr().out
    assert store.check(Path(large.checkpoint.load)) == []
    assert pool.run(4, run, large) == [0] * 4
    assert first_loss(tmp_path / "new") == pytest.approx(first_loss(tmp_path / "alone"), rel=1e-11)
    assert store.read_state(tmp_path / "new" / "checkpoints" / store.step_name(3))["optimizer_steps"] == 3
    assert convert(asked) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_folder_of_hugging_face_grows_in_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several files hold what one does; another vocabulary is refused."""
    gpt2(tmp_path / "hf")
    source = Import(tmp_path / "hf")
    config = check(Config(model=replace(source.model, hidden=64, heads=8)))
    (tmp_path / "job.toml").write_text(to_toml(config))
    job_file = str(tmp_path / "job.toml")
    assert convert(["grow", str(tmp_path / "hf"), str(tmp_path / "one"), job_file, "model.dropout=0.0"]) == 0
    plan = growths(source.model, config.model, VOCAB)
    several = write_grown(tmp_path / "several", plan, source.whole, config, VOCAB, shard_bytes=100_000)
    assert len(list(several.glob("*.safetensors"))) > 4 and store.check(several) == []
    one, other = logical(tmp_path / "one" / store.step_name(0)), logical(several)
    assert list(one) == [f"weight/{spec.name}" for spec in tensors(config.model, VOCAB)] and one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    capsys.readouterr()
    more = f"model.vocab_size={VOCAB + 1}"
    assert convert(["grow", str(tmp_path / "hf"), str(tmp_path / "two"), job_file, more]) == 2
    assert f"model.vocab_size = {VOCAB + 1}" in capsys.readouterr().err
