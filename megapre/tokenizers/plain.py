"""Tokenizers without a file: bytes, and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


class ByteTokenizer:
    """One id per UTF-8 byte (0-255), and 256 as end-of-document."""

    type = "ByteTokenizer"
    vocab_size = 257
    eod = 256
    mask = None
    digest = hashlib.sha256(b"megapre ByteTokenizer 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of a text; ValueError (UnicodeEncodeError) on a lone surrogate."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def lookup(self, name: str) -> int | None:
        """The end-of-document token, or None."""
        return self.eod if name == "<|endoftext|>" else None

    def texts(self) -> list[bytes | None]:
        """Every byte, and no text for end-of-document."""
        return [*(bytes([byte]) for byte in range(self.eod)), None]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes; bytes that are no UTF-8 become U+FFFD, 256 becomes its name."""
        parts, run = [], bytearray()
        for token in ids:
            if token == self.eod:
                parts += [run.decode(errors="replace"), "<|endoftext|>"]
                run = bytearray()
            else:
                run.append(token)
        return "".join([*parts, run.decode(errors="replace")])


class NullTokenizer:
    """Text is ids in decimal, separated by white space. As Megatron's: ids 0 to N - 1, and N ends a document."""

    type = "NullTokenizer"
    mask = None

    def __init__(self, ids: int) -> None:
        if ids < 1:
            raise ValueError(f"NullTokenizer needs a number of ids, not {ids}, in --vocab-size (model.vocab_size).")
        self.eod = ids
        self.vocab_size = ids + 1
        self.digest = hashlib.sha256(f"megapre NullTokenizer {ids}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids written in a text; ValueError on what is no number or not below the number of ids."""
        ids = [int(word) for word in text.split()]
        for token in ids:
            if not 0 <= token < self.eod:
                raise ValueError(f"id {token} is outside the {self.eod} ids of --vocab-size.")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def lookup(self, name: str) -> int | None:
        """None: ids have no names."""
        return None

    def texts(self) -> list[bytes | None]:
        """No text at all: what an id adds is unknown."""
        return [None] * self.vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        """Ids in decimal."""
        return " ".join(str(int(token)) for token in ids)
