"""Continual pretraining: a BERT of Hugging Face goes on with new text, and what it forgets is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megapre.config.check import check
from megapre.config.load import load
from megapre.config.schema import Config
from megapre.data.check import check_data
from megapre.data.indexed import IndexedWriter, token_dtype
from megapre.data.loader import names_of
from megapre.data.sidecar import TokenizerRecord
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import VOCAB, corpus, job, run
from tools.convert_checkpoint import main as convert
from tools.forgetting import losses
from tools.forgetting import main as forgetting

LENGTH = 16


def other_text(prefix: Path) -> str:
    """Documents of a few tokens in a cycle."""
    with IndexedWriter(str(prefix), token_dtype(VOCAB), TokenizerRecord("NullTokenizer", "0" * 64, VOCAB, 0)) as writer:
        for first in range(60):
            writer.add_document(20 + (first + np.arange(40)) % 8)
    return str(prefix)


def validations(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("split") == "validation"]


def test_a_bert_goes_on_and_tells_the_loss_on_each_text(
    pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(4)
    shape = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(shape).save_pretrained(tmp_path / "hf")
    assert convert(["import", str(tmp_path / "hf"), "--job", str(tmp_path / "job.toml")]) == 0
    imported = load(str(tmp_path / "job.toml"), [])
    assert imported.data.objective == "masked"
    old, new = corpus(tmp_path / "general_text_document"), other_text(tmp_path / "manual_text_document")

    def continued(layout: str, name: str, paths: list[str], weights: list[float], steps: int) -> Config:
        cell = parse(layout)
        config = job(old, tmp_path / name, cell, steps=steps, interval=0)
        data = replace(config.data, paths=paths, weights=weights, objective="masked")
        train = replace(config.train, eval_first=True, eval_by_path=True, eval_interval=0, eval_samples=10)
        start = replace(config.checkpoint, load=imported.checkpoint.load)
        return check(replace(config, model=imported.model, data=data, train=train, checkpoint=start), cell.world)

    assert pool.run(4, run, continued("2x2x1+sp", "mixed", [old, new], [0.2, 0.8], 30)) == [0] * 4
    assert pool.run(2, run, continued("1x1x2", "alone", [new], [], 1)) == [0] * 2
    first, last = validations(tmp_path / "mixed")
    assert (first["step"], last["step"]) == (0, 30)
    # the same samples whatever the weights, the neighbours and the layout
    alone = validations(tmp_path / "alone")[0]
    assert first["loss_on/manual"] == pytest.approx(alone["loss_on/manual"], rel=1e-5)
    assert alone["loss"] == alone["loss_on/manual"] != first["loss"]
    found = losses(tmp_path / "mixed")
    assert list(found) == ["general", "manual"]
    assert found["manual"][1] < found["manual"][0] - 0.3, found
    capsys.readouterr()
    assert forgetting([str(tmp_path / "mixed")]) == 0
    before, after = found["manual"]
    assert f"| manual | {before:.3f} | {after:.3f} | {after - before:+.3f} |" in capsys.readouterr().out
    told = tmp_path / "mixed" / "metrics.jsonl"
    told.write_text("".join(line for line in told.read_text().splitlines(True) if '"step": 0' not in line))
    assert forgetting([str(tmp_path / "mixed")]) == 2
    assert "train.eval_first" in capsys.readouterr().err


def test_a_path_without_held_out_text_is_refused_by_name(tmp_path: Path) -> None:
    small = str(tmp_path / "small")
    with IndexedWriter(small, token_dtype(VOCAB), TokenizerRecord("NullTokenizer", "0" * 64, VOCAB, 0)) as writer:
        writer.add_document(np.ones(99, np.int64))
    config = job(corpus(tmp_path / "text"), tmp_path, parse("1x1x1"))
    config = replace(config, data=replace(config.data, paths=[*config.data.paths, small]))
    check_data(config)
    with pytest.raises(ValueError, match=rf"validation split of {small}"):
        check_data(replace(config, train=replace(config.train, eval_by_path=True)))


def test_names_of_paths() -> None:
    assert names_of(["data/a_text_document", "b.manifest.json"]) == ["a", "b"]
    assert names_of(["x/corpus_text_document", "y/corpus_text_document"]) == [
        "x/corpus_text_document", "y/corpus_text_document",
    ]  # fmt: skip
