from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megapre.data.indexed import IndexedDataset

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("preprocess_data_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def bytes_of(text: str) -> list[int]:
    return [*text.encode(), 256]


def arguments(tmp_path: Path, *inputs: str, tokenizer: str = "ByteTokenizer") -> list[str]:
    return ["--input", *inputs, "--output-prefix", str(tmp_path / "out" / "P"), "--tokenizer-type", tokenizer]


def write_lines(path: Path, documents: list) -> str:
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return str(path)


def test_documents_come_out_in_order_with_their_record(tmp_path, main, capsys):
    texts = ["one", "", 'two\n\nthree \\n "x"', "é\u2028"]
    path = write_lines(tmp_path / "a.jsonl", [{"text": t, "id": 3} for t in texts])
    assert main([*arguments(tmp_path, path), "--append-eod"]) == 0
    assert "4 documents" in (out := capsys.readouterr().out) and "1 empty" in out and "0 bad lines" in out
    data = IndexedDataset(str(tmp_path / "out" / "P_text_document"), verify=True)
    assert [data.document(i).tolist() for i in range(len(data))] == [bytes_of(t) for t in texts if t]
    record = data.sidecar.tokenizer
    assert (record.type, record.vocab_size, record.eod, record.eod_appended) == ("ByteTokenizer", 257, 256, True)


def test_workers_write_the_same_bytes(tmp_path):
    """As users run it: a script, processes started by spawn, several files, globs, gzip and text; no torch."""
    write_lines(tmp_path / "a1.jsonl", [{"text": f"document {i} " * 40} for i in range(4000)] + [7])
    with gzip.open(tmp_path / "a2.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\nbroken\n')
    (tmp_path / "b.txt").write_text("a whole file\nis one document\n")
    outputs = []
    for workers in ("1", "2"):
        prefix = tmp_path / workers
        command = [sys.executable, str(TOOL), "--input", str(tmp_path / "a*"), str(tmp_path / "b.txt")]
        command += ["--output-prefix", str(prefix), "--tokenizer-type", "ByteTokenizer", "--workers", workers]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # The first file is larger than a chunk, and lines keep their number in the file.
        assert "a1.jsonl:4001: " in done.stderr and "a2.jsonl.gz:2: " in done.stderr
        outputs.append([Path(f"{prefix}_text_document{s}").read_bytes() for s in (".bin", ".idx", ".json")])
    assert outputs[0] == outputs[1]
    data = IndexedDataset(str(tmp_path / "2_text_document"))
    assert len(data) == 4002
    assert bytes(data.document(4000).astype("u1")) == b"zipped"
    assert bytes(data.document(4001).astype("u1")) == b"a whole file\nis one document\n"
    assert bytes(data.document(3999).astype("u1")) == b"document 3999 " * 40


BAD = [
    ('{"text": "cut', "a.jsonl:2: "),
    ("[1]", "a.jsonl:2: a JSON list where an object is needed"),
    ('{"body": "x"}', "a.jsonl:2: no key 'text'"),
    ('{"text": 5}', "a.jsonl:2: 'text' is no string"),
    ('{"text": "\\ud800"}', "a.jsonl:2: "),
    ("\udcff", "a.jsonl:2: "),
]


@pytest.mark.parametrize("line, report", BAD)
def test_bad_lines_are_reported_and_skipped_or_fatal(tmp_path, main, capsys, line, report):
    content = '{"text": "a"}\n' + line + '\n\n{"text": "b"}'
    (tmp_path / "a.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    command = arguments(tmp_path, str(tmp_path / "a.jsonl"))
    assert main(command) == 0
    captured = capsys.readouterr()
    assert report in captured.err and "2 documents" in captured.out and "1 bad lines" in captured.out
    data = IndexedDataset(str(tmp_path / "out" / "P_text_document"))
    assert data.tokens.tolist() == [97, 98]
    (tmp_path / "out" / "P_text_document.idx").unlink()
    assert main([*command, "--on-bad-line", "fail"]) == 2
    assert report in capsys.readouterr().err
    assert not (tmp_path / "out" / "P_text_document.idx").exists()
    assert not list((tmp_path / "out").glob("*.tmp-*"))


def test_a_line_the_tokenizer_refuses_is_bad_for_all_keys(tmp_path, main, capsys):
    documents = [{"a": "1 2", "b": "3"}, {"a": "4", "b": "99"}, {"a": "5", "b": "6"}]
    path = write_lines(tmp_path / "a.jsonl", documents)
    command = [*arguments(tmp_path, path, tokenizer="NullTokenizer"), "--vocab-size", "10", "--json-keys", "a", "b"]
    assert main(command) == 0
    assert "a.jsonl:2: id 99 is outside" in capsys.readouterr().err
    a, b = (IndexedDataset(str(tmp_path / "out" / f"P_{key}_document")) for key in "ab")
    assert a.tokens.tolist() == [1, 2, 5] and b.tokens.tolist() == [3, 6]


def test_bad_arguments_exit_with_two_and_one_sentence(tmp_path, main, capsys):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    empty = write_lines(tmp_path / "e.jsonl", [{"text": ""}])
    good = arguments(tmp_path, path)
    for command, message in (
        (arguments(tmp_path, str(tmp_path / "none*")), "matches no file"),
        (arguments(tmp_path, path, tokenizer="GPT9"), "'GPT9' is unknown"),
        (arguments(tmp_path, path, tokenizer="HuggingFaceTokenizer"), "--tokenizer-model"),
        (arguments(tmp_path, empty), "no document has a token"),
        ([*good, "--workers", "0"], "--workers 0"),
        ([*good, "--json-keys", "text", "text"], "names a key twice"),
    ):
        assert main(command) == 2
        *_, error = capsys.readouterr().err.strip().split("\n")
        assert message in error
    with pytest.raises(SystemExit) as caught:
        main(["--input", path])
    assert caught.value.code == 2
    assert not list(tmp_path.glob("out/*"))


def test_old_habits_are_accepted_with_a_hint(tmp_path, main, capsys):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    assert main([*arguments(tmp_path, path), "--dataset-impl", "mmap", "--keep-newlines", "--vocab", "x"]) == 0
    error = capsys.readouterr().err
    assert "--dataset-impl mmap is the only format" in error and "--vocab is read as" in error


def test_the_tool_starts_without_torch():
    code = f"import runpy, sys\nrunpy.run_path({str(TOOL)!r})\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
