"""Merged pairs hold the documents of their parts; inspection finds what was planted."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from megapre.config.load import to_toml
from megapre.data.indexed import IndexedDataset, IndexedWriter
from megapre.data.samples import Samples
from megapre.tokenizers.preprocess import Job, preprocess
from tests.data.corpora import job, with_train, write_pair
from tools import inspect_data, merge_datasets


def test_merged_pairs_hold_all_documents_in_order(tmp_path, capsys):
    prefixes = [write_pair(tmp_path / name, lengths, seed=i) for i, (name, lengths) in enumerate(
        {"a": [3, 40, 1], "b": [7] * 50, "c": [1]}.items())]  # fmt: skip
    out = str(tmp_path / "all" / "whole")
    assert merge_datasets.main(["--input", *prefixes, "--output-prefix", out, "--workers", "2"]) == 0
    assert "54 documents" in capsys.readouterr().out
    whole = IndexedDataset(out, verify=True)
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    documents = [data.document(i).tolist() for data in parts for i in range(len(data))]
    assert [whole.document(i).tolist() for i in range(len(whole))] == documents
    assert whole.sidecar.tokenizer == parts[0].sidecar.tokenizer
    assert merge_datasets.main(["--input", str(tmp_path), "--output-prefix", out]) == 0
    assert IndexedDataset(out, verify=True).total_tokens == whole.total_tokens


def test_merging_keeps_sentences_and_widens_the_type(tmp_path):
    for name, dtype, shift in (("a", "<u2", 0), ("b", "<i4", 70_000)):
        with IndexedWriter(str(tmp_path / name), dtype) as writer:
            writer.add_document(np.arange(6) + shift, [2, 4])
            writer.add_document([9], [1])
    out = str(tmp_path / "o")
    assert merge_datasets.main(["--input", str(tmp_path / "a"), str(tmp_path / "b.idx"), "--output-prefix", out]) == 0
    data = IndexedDataset(out, verify=True)
    assert data.dtype == np.dtype("<i4") and data.sequence_lengths.tolist() == [2, 4, 1] * 2
    assert data.document_bounds.tolist() == [0, 2, 3, 5, 6] and data.document(2).tolist() == list(range(70_000, 70_006))


def test_merging_refuses_what_does_not_belong_together(tmp_path, capsys):
    a, b = (write_pair(tmp_path / name, [5]) for name in "ab")
    content = json.loads(Path(b + ".json").read_text())
    content["tokenizer"]["digest"] = "1" * 64
    Path(b + ".json").write_text(json.dumps(content))
    for inputs, out, message in (
        ([a, b], "o", "different tokenizers"),
        ([a, a], "o", "names a pair twice"),
        ([a], a, "is one of the inputs"),
        ([str(tmp_path / "none")], "o", "does not exist"),
    ):
        assert merge_datasets.main(["--input", *inputs, "--output-prefix", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


@pytest.fixture
def corpus(tmp_path):
    texts = [f"document number {i} " * (1 + i % 7) for i in range(60)]
    texts[41] = "a needle in this one " * 9
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = preprocess(Job([str(tmp_path / "x.jsonl")], str(tmp_path / "p"), ["text"], "ByteTokenizer", append_eod=True))
    return made.prefixes[0]


def test_statistics_text_picture_and_validation(tmp_path, corpus, capsys):
    assert inspect_data.main([corpus]) == 0
    out = capsys.readouterr().out
    assert "documents            60" in out and "validated            False" in out and "ByteTokenizer, 257 ids" in out
    picture = tmp_path / "l.svg"
    assert inspect_data.main([corpus, "--decode", "41", "--histogram", str(picture), "--validate"]) == 0
    assert "needle in this one" in capsys.readouterr().out and ElementTree.parse(picture)
    assert inspect_data.main([corpus]) == 0
    assert "validated            True" in capsys.readouterr().out
    IndexedDataset(corpus, verify=True)


def test_validation_sees_what_opening_does_not(tmp_path, corpus, capsys):
    data = bytearray(Path(corpus + ".bin").read_bytes())
    data[100] ^= 3
    Path(corpus + ".bin").write_bytes(data)
    IndexedDataset(corpus)
    assert inspect_data.main([corpus, "--validate"]) == 2
    assert "damaged after it was written" in capsys.readouterr().err
    os.remove(corpus + ".json")
    assert inspect_data.main([corpus, "--validate"]) == 0
    assert IndexedDataset(corpus).sidecar.validated


def test_what_a_step_reads_and_when_a_text_is_seen(tmp_path, corpus, capsys):
    config = with_train(
        job([corpus], sequence=64, tokenizer_type="ByteTokenizer"), steps=20, run_dir=str(tmp_path / "r")
    )
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "job.toml").write_text(to_toml(config))
    run = ["--run", str(tmp_path / "r")]
    assert inspect_data.main([*run, "--find", "a needle"]) == 0
    out = capsys.readouterr().out
    assert "document 41: step " in out
    samples = Samples(config, vocab_size=257)
    texts = (bytes(t for t in samples.sample(n).example.inputs.tolist() if t < 256) for n in range(160))
    holding = [n for n, text in enumerate(texts) if b"needle" in text]
    assert holding and all(f"(sample {n}" in out for n in holding[:8])
    assert inspect_data.main([*run, "--step", str(holding[0] // 8)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if f"sample {holding[0]}:" in line]
    assert any(" document 41 " in line for line in lines)
    assert inspect_data.main([*run, "--find", "no such text"]) == 1
    assert inspect_data.main([*run]) == 2
