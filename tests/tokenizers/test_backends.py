"""Fast back ends give the ids of the reference, or are passed over, loudly; tokenizers of Megatron's older files."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from megapre.data.indexed import IndexedDataset
from megapre.tokenizers import backends
from megapre.tokenizers.backends import choose, differs, make
from megapre.tokenizers.bytelevel import alphabet
from megapre.tokenizers.load import load
from megapre.tokenizers.preprocess import Job, preprocess
from megapre.tokenizers.train import fertility, sample_texts, train
from tests.tokenizers.test_tokenizers import corpus, hostile


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    path = str(folder / "tokenizer.json")
    train([corpus(folder / "text.jsonl")], path, vocab_size=600)
    return path


@pytest.mark.parametrize("name", ["gigatoken", "tiktoken"])
def test_a_fast_back_end_gives_the_same_ids(bpe, name):
    pytest.importorskip(name)
    reference = load("HuggingFaceTokenizer", bpe)
    encode = make(name, reference.type, bpe)
    assert differs(encode, reference, [*backends.HOSTILE, *hostile(5, 600)]) == ""
    assert choose("auto", reference, bpe, hostile(6, 50), print)[0] == "gigatoken"


def test_back_ends_write_the_same_pair(bpe, tmp_path):
    lines = [json.dumps({"text": text}) for text in hostile(8, 200) if text]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    made = []
    for name in ("reference", "gigatoken", "tiktoken", "auto"):
        preprocess(Job([str(tmp_path / "x.jsonl")], str(tmp_path / name), ["text"], "HuggingFaceTokenizer", bpe,
                       append_eod=True, backend=name), lambda line: None)  # fmt: skip
        made.append([Path(f"{tmp_path / name}_text_document{s}").read_bytes() for s in (".bin", ".idx", ".json")])
    assert made[0] == made[1] == made[2] == made[3]


def test_a_back_end_that_differs_is_passed_over_or_refused(bpe, monkeypatch):
    reference, said = load("HuggingFaceTokenizer", bpe), []

    def wrong(path):
        return lambda texts: [[t + (text == "bad") for t in reference.encode(text)] for text in texts]

    monkeypatch.setattr(backends, "FAST", {"gigatoken": wrong, "tiktoken": backends.tiktoken})
    assert choose("auto", reference, bpe, ["good", "bad"], said.append)[0] == "tiktoken"
    assert len(said) == 1 and said[0].startswith("WARNING: back end gigatoken gives other ids") and "'bad'" in said[0]
    with pytest.raises(ValueError, match="gives other ids than the tokenizer itself: token 0 of 'bad'"):
        choose("gigatoken", reference, bpe, ["bad"], said.append)


def test_a_back_end_that_cannot_read_the_tokenizer_is_named(bpe, tmp_path):
    words = str(tmp_path / "words.json")
    train([corpus(tmp_path / "text.jsonl")], words, type="wordpiece", vocab_size=420)
    reference = load("HuggingFaceTokenizer", words)
    with pytest.raises(ValueError, match=r"--backend tiktoken cannot read .*no plain byte-level BPE"):
        choose("tiktoken", reference, words, [], print)
    assert choose("auto", reference, words, hostile(1, 50), print)[0] == "reference"
    byte = load("ByteTokenizer")
    assert choose("auto", byte, "", [], print)[0] == "reference"
    with pytest.raises(ValueError, match=r"reads a tokenizer\.json only"):
        choose("gigatoken", byte, "", [], print)


def test_gpt2_files_are_the_same_tokenizer(bpe, tmp_path):
    content = json.loads(Path(bpe).read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    rows = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(rows) + "\n")
    reference = load("HuggingFaceTokenizer", bpe)
    for path in (str(tmp_path), f"{tmp_path}/vocab.json:{tmp_path}/merges.txt"):
        tokenizer = load("GPT2BPETokenizer", path)
        assert (tokenizer.vocab_size, tokenizer.eod) == (reference.vocab_size, reference.eod)
        texts = [text.replace("<|endoftext|>", "") for text in hostile(2, 200)]
        assert tokenizer.encode_batch(texts) == reference.encode_batch(texts)
    with pytest.raises(ValueError, match=r"vocab\.json:merges\.txt"):
        load("GPT2BPETokenizer", str(tmp_path / "vocab.json"))


def test_bert_files(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "house", "##s", "House", ",", "e"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    lower, cased = (load(kind, str(tmp_path / "vocab.txt")) for kind in ("BertWordPieceLowerCase", "BertWordPieceCase"))
    assert lower.encode("The Houses, é") == [5, 6, 7, 9, 10] and cased.encode("the House,") == [5, 8, 9]
    assert (lower.eod, lower.mask, lower.vocab_size, lower.encode("qqq")) == (3, 4, 11, [1])
    (tmp_path / "bad.txt").write_text("a\nb")
    with pytest.raises(ValueError, match=r"has no \[UNK\]|no WordPiece"):
        load("BertWordPieceCase", str(tmp_path / "bad.txt"))


def test_rank_files_of_both_kinds(bpe, tmp_path):
    pytest.importorskip("tiktoken")
    letters = {byte: letter for letter, byte in alphabet().items()}
    tokens = [bytes([byte]) for byte in letters] + [b"th", b"the", b" the", b"in"]
    tokens = sorted(tokens, key=len)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "x.tiktoken").write_text("\n".join(lines))
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for rank, t in enumerate(tokens)
    ]
    (tmp_path / "tekken.json").write_text(json.dumps(rows))
    plain, tekken = (
        load("TikTokenizer", str(tmp_path / "x.tiktoken")),
        load("TikTokenizer", str(tmp_path / "tekken.json")),
    )
    assert (plain.vocab_size, plain.eod, plain.mask) == (262, 260, 261)
    assert (tekken.vocab_size, tekken.eod, tekken.mask) == (1260, 2, 3)
    for text in hostile(4, 300):
        ids = plain.encode(text)
        assert plain.decode(ids) == text and all(t < 260 for t in ids)
        assert tekken.decode(tekken.encode(text)) == text
    assert tekken.decode([2]) == "</s>" and plain.decode([260]) == "<|endoftext|>"
    (tmp_path / "x.tiktoken").write_text("YQ== 5\n")
    with pytest.raises(ValueError, match="ranks are not 0 to"):
        load("TikTokenizer", str(tmp_path / "x.tiktoken"))


def test_samples_are_drawn_from_all_over_and_held_out_ones_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr("megapre.tokenizers.train.PIECE", 2000)
    texts = [f"text {i} " * 20 for i in range(400)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    drawn = list(sample_texts([str(tmp_path / "x.jsonl")], "text", None, 9000))
    held = list(sample_texts([str(tmp_path / "x.jsonl")], "text", None, 9000, held_out=True))
    assert 9000 <= sum(map(len, drawn)) < 12_000 and set(drawn) <= set(texts) and not set(drawn) & set(held)
    places = sorted(texts.index(text) for text in drawn)
    assert places[-1] - places[0] > 150
    assert drawn == list(sample_texts([str(tmp_path / "x.jsonl")], "text", None, 9000))


def test_fertility(bpe):
    found = fertility(load("ByteTokenizer"), iter(["ab c\n", "é"]))
    assert found == {"tokens per word": (3 + 2 + 3) / 3, "words kept whole": 0.0, "bytes per token": 1.0}
    assert fertility(load("HuggingFaceTokenizer", bpe), iter(["any words at all"]))["tokens per word"] < 6


def test_numbered_set_of_one_document(tmp_path):
    (tmp_path / "x.txt").write_text("one")
    report = preprocess(
        Job([str(tmp_path / "x.txt")], str(tmp_path / "o"), ["text"], "ByteTokenizer", shard_tokens=1), print
    )
    assert IndexedDataset(report.prefixes[0]).tokens.tolist() == [*b"one"]
