"""From a Hugging Face folder through a sharded run and back, by the commands that users type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from megapre.checkpoint import store
from megapre.config.check import check
from megapre.config.load import load
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import VOCAB, corpus, job, logical, losses, run
from tools.convert_checkpoint import main as convert


def gpt2(folder: Path) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(4)
    shape = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=16)
    model = transformers.GPT2LMHeadModel(shape)
    model.save_pretrained(folder)
    return model


def test_a_folder_is_trained_on_two_layouts_and_opens_again(
    pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2(tmp_path / "hf")
    (tmp_path / "base.toml").write_text("[optimizer]\nlr = 0.003\n")
    written = str(tmp_path / "job.toml")
    assert convert(["import", str(tmp_path / "hf"), "--job", written, "--base", str(tmp_path / "base.toml")]) == 0
    assert "GPT2LMHeadModel, 52 tensors" in capsys.readouterr().out
    imported = load(written, [])
    assert imported.optimizer.lr == 0.003 and imported.checkpoint.load == str(tmp_path / "hf")
    prefix = corpus(tmp_path / "text")
    first = {}
    for layout in ("1x1x1", "2x2x1+sp"):
        cell = parse(layout)
        config = job(prefix, tmp_path / layout, cell, steps=2, interval=2)
        start = replace(config.checkpoint, load=imported.checkpoint.load)
        config = check(replace(config, model=replace(imported.model, dropout=0.0), checkpoint=start), cell.world)
        assert pool.run(cell.world, run, config) == [0] * cell.world
        first[layout] = float.fromhex(losses(tmp_path / layout)[1])
    assert first["1x1x1"] == pytest.approx(first["2x2x1+sp"], abs=1e-5)
    assert first["1x1x1"] == pytest.approx(torch.log(torch.tensor(float(VOCAB))).item(), abs=0.2)
    step = tmp_path / "2x2x1+sp" / "checkpoints" / store.step_name(2)
    assert convert(["export", str(step), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert "GPT2LMHeadModel, fp32" in capsys.readouterr().out
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = logical(step)["weight/blocks.3.mlp.down.weight"].view(32, 128)
    assert torch.equal(opened.transformer.h[3].mlp.c_proj.weight.T, trained)
    assert convert(["export", str(step), str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_weights_only_begins_a_new_run_with_old_weights(pool: RankPool, tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "text")
    old = job(prefix, tmp_path / "old", parse("1x1x1"), steps=3, interval=3)
    assert pool.run(1, run, old) == [0]
    step = tmp_path / "old" / "checkpoints" / store.step_name(3)
    cell = parse("1x2x2+zero1")
    new = job(prefix, tmp_path / "new", cell, steps=1)
    # the learning rate of a first step of warm-up is small: what is saved is nearly what was loaded
    new = replace(new, checkpoint=replace(new.checkpoint, load=str(step), weights_only=True))
    new = replace(new, optimizer=replace(new.optimizer, lr=1e-9), data=replace(new.data, seed=99))
    assert pool.run(4, run, new) == [0] * 4
    saved = tmp_path / "new" / "checkpoints" / store.step_name(1)
    assert store.read_state(saved)["optimizer_steps"] == 1
    before, after = logical(step), logical(saved)
    for name in before:
        if name.startswith("weight/"):
            torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-8)
        else:
            assert not torch.allclose(before[name], after[name], rtol=1e-3, atol=0) or not before[name].any(), name
