from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megapre.config.schema import Config
from megapre.data.check import check_data
from tests.data.corpora import VOCAB, job, with_train, write_pair


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "a", [40] * 20)


def with_vocab(config: Config, size: int) -> Config:
    return replace(config, model=replace(config.model, vocab_size=size))


def edit(pair: str, **changes: Any) -> None:
    """Change the tokenizer's entry of a sidecar."""
    path = Path(pair + ".json")
    content = json.loads(path.read_text())
    content["tokenizer"].update(changes)
    path.write_text(json.dumps(content))


def refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_data(config)
    assert "\n" not in str(caught.value)


def test_the_vocabulary_comes_from_the_job_or_the_tokenizer(pair):
    assert check_data(job([pair])) == VOCAB
    assert check_data(with_vocab(job([pair]), 1024)) == 1024
    refused(with_vocab(job([pair]), VOCAB - 1), rf"model\.vocab_size = 999 .* 1000 ids .*{pair}")


def test_without_a_record_the_job_must_say(pair):
    os.remove(pair + ".json")
    with pytest.warns(UserWarning, match="missing"):
        refused(job([pair]), r"model\.vocab_size = 0")
    with pytest.warns(UserWarning):
        assert check_data(with_vocab(job([pair]), VOCAB)) == VOCAB
    with pytest.warns(UserWarning):
        refused(with_vocab(job([pair]), 500), r"token id \d+, outside the 500 ids .*model\.vocab_size")


def test_files(pair):
    refused(job([]), r"data\.paths is empty")
    refused(job([pair + "x"]), r"x\.bin does not exist; data\.paths")
    os.truncate(pair + ".bin", 1000)
    refused(job([pair]), r"\.bin has 1000 bytes where .* 1600")


def test_tokenizers_must_agree(tmp_path, pair):
    model = tmp_path / "tokenizer.json"
    model.write_text("{}")
    refused(job([pair], tokenizer_model=str(model)), r"sha256 000000000000 .*data\.tokenizer_model")
    refused(job([pair], tokenizer_model=str(tmp_path / "none")), r"data\.tokenizer_model = .* does not exist")
    other = write_pair(tmp_path / "b", [40] * 20)
    assert check_data(job([pair, other])) == VOCAB
    edit(other, digest="1" * 64)
    refused(job([pair, other]), r"sha256 111111111111 .* 000000000000")
    edit(other, digest=None)
    assert check_data(job([pair, other])) == VOCAB


def test_settings(pair):
    refused(job([pair], objective="span"), r"data\.objective = 'span' .* causal, infill")
    refused(job([pair], mask_token=VOCAB), r"data\.mask_token = 1000")
    refused(job([pair], weights=[1.0, 2.0]), r"data\.weights has 2 shares for the 1 prefixes")
    refused(job([pair, pair], weights=[1.0, 1e-9]), r"data\.weights\[1\].* rounds to 0")
    refused(job([pair], sequence=800), r"800 tokens .* 801 .*model\.sequence")
    refused(job([pair], split=[0.0, 1.0, 0.0]), r"has 0 tokens .*data\.split")
    edit(pair, eod=None)
    refused(job([pair], eod_mask_loss=True), r"data\.eod_mask_loss = true .* records none")


def test_a_validation_that_cannot_be_drawn_is_refused_before_the_run(pair):
    refused(with_train(job([pair]), eval_samples=4), r"valid split.*data\.split.*train\.eval_samples = 0")
    assert check_data(with_train(job([pair], split=[0.9, 0.1, 0.0]), eval_samples=4)) == VOCAB
