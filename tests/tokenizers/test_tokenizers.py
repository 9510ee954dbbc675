from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from megapre.tokenizers.load import load
from megapre.tokenizers.train import train

PIECES = ["<|endoftext|>", "<mask>", "<pad>", "</s>", "\\", "\\\\n", '"', "\n\n", "\t", "\r\n", "  ", "##", "\u200d",
          "\ufeff", "\u0301", "👩‍👩‍👧", "שלום", "İ", "ß", "\x1f", " a", "\u00a0", "\ufffd", "def ", "the "]  # fmt: skip
FILES = [("bpe", "tokenizers"), ("unigram", "tokenizers"), ("wordpiece", "tokenizers"),
         ("bpe", "sentencepiece"), ("unigram", "sentencepiece")]  # fmt: skip


def hostile(seed: int, count: int) -> list[str]:
    """Strings of any code points but surrogates, mixed with what breaks tokenizers."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(40)):
            code = rng.randrange(1, 0x110000 if rng.random() < 0.5 else 0x250)
            parts.append(rng.choice(PIECES) if rng.random() < 0.3 else chr(65 if 0xD800 <= code < 0xE000 else code))
        texts.append("".join(parts))
    return texts


def corpus(path: Path) -> str:
    rng = random.Random(1)
    words = ["".join(rng.choice("abcdefghilmnorstu") for _ in range(rng.randrange(2, 9))) for _ in range(400)]
    with path.open("w") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=80)) + ".\nÄ é\n"}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Path of a tokenizer for each type and backend."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = corpus(folder / "text.jsonl")
    paths = {}
    for type, backend in FILES:
        suffix = ".json" if backend == "tokenizers" else ".model"
        paths[type, backend] = str(folder / f"{type}_{backend}{suffix}")
        assert train([text], paths[type, backend], type=type, backend=backend, vocab_size=420) == 420
    return paths


def open_trained(trained, type, backend):
    return load("HuggingFaceTokenizer" if backend == "tokenizers" else "SentencePieceTokenizer", trained[type, backend])


@pytest.mark.parametrize("type, backend", FILES)
def test_any_text_comes_back_and_holds_no_special_token(trained, type, backend):
    """B63: text -> ids -> text is the identity. SentencePiece's own U+2581 is the known exception."""
    tokenizer = open_trained(trained, type, backend)
    for text in hostile(7, 1500):
        text = text.replace("\u2581", "")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, ascii(text)
        assert not {tokenizer.eod, tokenizer.mask} & set(ids), ascii(text)
        assert not ids or 0 <= min(ids) <= max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("type, backend", FILES)
def test_specials_sizes_and_digest(trained, type, backend):
    tokenizer = open_trained(trained, type, backend)
    assert tokenizer.vocab_size == 420
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>" and tokenizer.decode([tokenizer.mask]) == "<mask>"
    assert tokenizer.digest == hashlib.sha256(Path(trained[type, backend]).read_bytes()).hexdigest()
    texts = ["one two", "", "three\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode("") == []
    words = "abcdefg the other things"
    assert len(tokenizer.encode(words)) < len(words.encode())


@pytest.mark.parametrize("type, backend", FILES)
def test_training_is_deterministic(trained, tmp_path, type, backend):
    again = tmp_path / "again"
    train([corpus(tmp_path / "text.jsonl")], str(again), type=type, backend=backend, vocab_size=420)
    assert again.read_bytes() == Path(trained[type, backend]).read_bytes()


def test_training_refuses_what_it_cannot_do(tmp_path):
    text = corpus(tmp_path / "text.jsonl")
    out = str(tmp_path / "out")
    for options, message in (
        ({"type": "char"}, "--type char is unknown"),
        ({"type": "wordpiece", "backend": "sentencepiece"}, "--backend sentencepiece does not train"),
        ({"vocab_size": 100}, "--vocab-size 100 is below 260"),
        ({"key": "body"}, "no key 'body'"),
    ):
        with pytest.raises(ValueError, match=message):
            train([text], out, **options)
    with pytest.raises(ValueError, match="no text to learn from"):
        train([text], out, key="body", bad=lambda line: None)


def test_byte_tokenizer():
    tokenizer = load("ByteTokenizer")
    for text in hostile(3, 500):
        ids = tokenizer.encode(text)
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 257 and tokenizer.eod == 256 and tokenizer.mask is None
    assert tokenizer.decode([104, 256, 0xFF]) == "h<|endoftext|>\ufffd"


def test_null_tokenizer():
    tokenizer = load("NullTokenizer", vocab_size=10)
    assert tokenizer.encode(" 0 9\n3 ") == [0, 9, 3] and tokenizer.decode([0, 9]) == "0 9"
    assert tokenizer.eod == 10 and tokenizer.vocab_size == 11
    for text, message in (("10", "id 10 is outside the 10"), ("-1", "id -1"), ("x", "invalid literal")):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(text)


def test_what_cannot_be_loaded_is_named(tmp_path, trained):
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    content = json.loads(Path(trained["bpe", "tokenizers"]).read_text())
    del content["model"]["vocab"]["<|endoftext|>"]
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|endoftext|>"]
    without = tmp_path / "without.json"
    without.write_text(json.dumps(content))
    for type, model, message in (
        ("WordTokenizer", "", r"data\.tokenizer_type = 'WordTokenizer' is unknown"),
        ("HuggingFaceTokenizer", "", r"data\.tokenizer_model \(--tokenizer-model\)"),
        ("HuggingFaceTokenizer", "/nowhere", "'/nowhere' does not exist"),
        ("SentencePieceTokenizer", "/nowhere", "'/nowhere' does not exist"),
        ("HuggingFaceTokenizer", str(broken), "is no tokenizer.json"),
        ("SentencePieceTokenizer", str(broken), "is no SentencePiece model"),
        ("HuggingFaceTokenizer", str(without), "no end-of-document token"),
        ("NullTokenizer", "", "--vocab-size"),
    ):
        with pytest.raises(ValueError, match=message):
            load(type, model)


def test_ids_with_gaps_count_to_the_last(tmp_path, trained):
    """A vocabulary of 421 entries whose last id is 999 needs 1,000 rows."""
    content = json.loads(Path(trained["bpe", "tokenizers"]).read_text())
    content["model"]["vocab"]["zzzz"] = 999
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert load("HuggingFaceTokenizer", str(tmp_path)).vocab_size == 1000
