from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from megapre.tokenizers.load import load

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train_tokenizer_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_learns_from_lines_and_text_files_and_reports_bad_lines(tmp_path, main, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "low lower lowest newest " * 20}) + "\nnot json\n")
    (tmp_path / "b.txt").write_text("wider widest\n" * 20)
    out = tmp_path / "new" / "tokenizer.json"
    inputs = [str(tmp_path / "*.jsonl"), str(tmp_path / "b.txt")]
    command = ["--input", *inputs, "--output", str(out), "--vocab-size", "280", "--json-key", "body"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "a.jsonl:2: " in captured.err and "1 bad lines" in captured.out
    tokenizer = load("HuggingFaceTokenizer", str(out))
    assert len(tokenizer.encode("lowest widest")) <= 6
    assert main([*command, "--on-bad-line", "fail"]) == 2
    assert "a.jsonl:2: " in capsys.readouterr().err


def test_says_when_the_text_has_fewer_pieces_than_asked(tmp_path, main, capsys):
    (tmp_path / "b.txt").write_text("ab ab\n")
    assert main(["--input", str(tmp_path / "b.txt"), "--output", str(tmp_path / "t.json"), "--vocab-size", "5000"]) == 0
    assert "of the 5000 asked for" in capsys.readouterr().out


def test_bad_arguments_exit_with_two(tmp_path, main, capsys):
    (tmp_path / "b.txt").write_text("ab ab\n")
    command = ["--input", str(tmp_path / "b.txt"), "--output", str(tmp_path / "t.json")]
    assert main([*command, "--vocab-size", "99"]) == 2
    assert main([*command, "--type", "wordpiece", "--backend", "sentencepiece"]) == 2
    assert main(["--input", str(tmp_path / "none"), "--output", "x"]) == 2
    assert len(capsys.readouterr().err.strip().split("\n")) == 3
    assert not (tmp_path / "t.json").exists()
