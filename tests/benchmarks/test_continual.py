"""What benchmarks/continual.py compares and reads, on a random BERT and a made-up manual."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
import transformers

from benchmarks.continual import docstrings, hidden_states, manuals


def test_hidden_states_of_a_bare_bert_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape = transformers.BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BertModel(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    assert hidden_states(tmp_path) < 1e-4


def test_texts_are_prose_without_macros(tmp_path: Path) -> None:
    page = '.de Sp\n.sp\n..\n.SH NAME\nls \\- list\n.PP\n.B \\-a\nshows \\fIall\\fR of them\n'
    (tmp_path / "man1").mkdir()
    (tmp_path / "man1" / "ls.1.gz").write_bytes(gzip.compress(page.encode()))
    assert list(manuals(tmp_path)) == ["NAME\nls - list\n-a\nshows all of them"]
    assert any(len(text) > 1000 for text in docstrings())
