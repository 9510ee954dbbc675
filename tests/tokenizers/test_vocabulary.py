"""Special ids and the table of words, of every kind of vocabulary, against words cut out of the text itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megapre.data.setting import word_table
from megapre.objectives.units import words
from megapre.tokenizers.base import Tokenizer
from megapre.tokenizers.load import load
from megapre.tokenizers.train import train
from megapre.tokenizers.vocabulary import record
from tests.objectives.cases import setting

TEXT = "The reader's foo_bar2 of naïve readers, unread: (re)reading; Straße und Größe 1234 times - 日本語 text_.x"
NAMES = ["<cls>", "<sep>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<extra_id_0>", "<extra_id_1>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vocabulary")
    rows = [json.dumps({"text": f"{TEXT} {i} readers read what the reader {'re' * (i % 3)}read."}) for i in range(60)]
    (made / "a.jsonl").write_text("\n".join(rows))
    return made


def made(folder: Path, kind: str) -> Tokenizer:
    if kind == "wordpiece":
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "read", "the", "of"]
        vocab += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"] + ["##er", "##ing", *"(),:;'-._0123456789"]
        (folder / "vocab.txt").write_text("\n".join(vocab))
        return load("BertWordPieceLowerCase", str(folder / "vocab.txt"))
    backend = "sentencepiece" if kind == "sentencepiece" else "tokenizers"
    path = str(folder / ("t.model" if kind == "sentencepiece" else f"{kind}.json"))
    options = {"type": "unigram" if kind != "bpe" else "bpe", "backend": backend, "vocab_size": 420, "specials": NAMES}
    train([str(folder / "a.jsonl")], path, **options)
    return load("SentencePieceTokenizer" if kind == "sentencepiece" else "HuggingFaceTokenizer", path)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sentencepiece", "bytes"])
def test_tokens_of_a_word_are_told_from_the_next_word(kind: str, folder: Path) -> None:
    tokenizer = load("ByteTokenizer") if kind == "bytes" else made(folder, kind)
    found = record(tokenizer, True)
    if kind != "bytes":
        assert found.specials is not None and set(found.specials) >= {"cls", "sep", "pad", "fim_prefix", "fim_middle"}
        assert found.sentinels is not None and len(found.sentinels) == 2
        assert [tokenizer.decode([i]) for i in found.sentinels] == NAMES[-2:]
    for text in (TEXT, "a_b c9 d", "x"):
        ids = np.array(tokenizer.encode(text))
        bounds = words(ids, np.ones(len(ids), bool), setting(joins=word_table(found)))
        cut = [tokenizer.decode(ids[a:b].tolist()).strip() for a, b in bounds]
        # Han and kana stand apart as tokens; all else is letters, digits and underscores.
        latin = [word for word in re.findall(r"\w+", text) if word.isascii() or word[0] in "nSG"]
        runs = [word for word in (re.sub(r"[^\w]", "", piece) for piece in cut) if word and not "぀" <= word[0] <= "鿿"]
        assert [word for word in runs if "�" not in word] == latin, (kind, text)


def test_wordpiece_says_itself_what_continues(folder: Path) -> None:
    tokenizer = made(folder, "wordpiece")
    found = record(tokenizer, False)
    assert found.specials == {"cls": 2, "sep": 3, "pad": 0} and found.sentinels is None
    ids = np.array(tokenizer.encode("reader of the reading, (x)"))
    bounds = words(ids, np.ones(len(ids), bool), setting(joins=word_table(found)))
    assert [len(range(a, b)) for a, b in bounds] == [2, 1, 1, 2, 1, 1, 1, 1]


def test_a_vocabulary_without_text_has_no_table() -> None:
    found = record(load("NullTokenizer", "", 9), True)
    assert found.words is None and found.specials is None


def test_special_tokens_are_named_once(folder: Path) -> None:
    for names in (["<mask>"], ["<cls>", "<cls>"]):
        with pytest.raises(ValueError, match="--special-tokens"):
            train([str(folder / "a.jsonl")], str(folder / "x.json"), vocab_size=420, specials=names)
    with pytest.raises(ValueError, match="--vocab-size 261 is below 262"):
        train([str(folder / "a.jsonl")], str(folder / "x.json"), vocab_size=261, specials=["<cls>", "<sep>"])
