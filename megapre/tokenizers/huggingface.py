"""Tokenizers stored as Hugging Face's ``tokenizer.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from megapre.data.sidecar import file_digest
from megapre.tokenizers.base import find_specials, refusing
from megapre.tokenizers.bytelevel import bytes_of_letters

REFUSED = "the tokenizer fails on this text"


class HuggingFaceTokenizer:
    """Reads ``tokenizer.json``, or a folder that holds one; ValueError when it cannot."""

    type = "HuggingFaceTokenizer"

    def __init__(self, path: str) -> None:
        path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise ValueError(f"data.tokenizer_model = {path!r} does not exist; a tokenizer.json is needed.")
        with refusing(f"data.tokenizer_model = {path!r} is no tokenizer.json"):
            self._inner = tokenizers.Tokenizer.from_file(path)
        self._prepare(path, file_digest(path))

    def _prepare(self, path: str, digest: str) -> None:
        """Settings and facts that hold for every vocabulary that this library reads."""
        # A document that quotes "<|endoftext|>" must not end there.
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        ids = self._inner.get_vocab(with_added_tokens=True).values()
        # Ids may have gaps; the model needs a row for the largest one.
        self.vocab_size = max(ids, default=-1) + 1
        specials = find_specials(path, self._inner.token_to_id)
        self.eod, self.mask = specials.eod, specials.mask
        self.digest = digest

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without template tokens."""
        with refusing(REFUSED):
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, without offsets, which halves the time."""
        with refusing(REFUSED):
            return [found.ids for found in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def lookup(self, name: str) -> int | None:
        """Id of a token, or None."""
        found: int | None = self._inner.token_to_id(name)
        return found

    def texts(self) -> list[bytes | None]:
        """Per id, what it adds to a text; None for special tokens and gaps."""
        added = self._inner.get_added_tokens_decoder()
        kinds = {step.get("type") for step in _steps(json.loads(self._inner.to_str()).get("decoder"))}
        read = bytes_of_letters if "ByteLevel" in kinds else word_piece if "WordPiece" in kinds else metaspace
        found: list[bytes | None] = [None] * self.vocab_size
        for piece, number in self._inner.get_vocab(with_added_tokens=True).items():
            if number not in added or not added[number].special:
                found[number] = read(piece)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens appear by name."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=False)
        return text


def metaspace(piece: str) -> bytes:
    """Bytes of a piece in which U+2581 is a space and <0x41> a byte, as SentencePiece writes them."""
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode(errors="replace")


def word_piece(piece: str) -> bytes:
    """Bytes of a piece of WordPiece: one without ## begins a word."""
    return piece[2:].encode() if piece.startswith("##") else b" " + piece.encode()


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder:
        yield decoder
        for step in decoder.get("decoders", []):
            yield from _steps(step)
