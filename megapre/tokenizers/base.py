"""What every tokenizer offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

EOD_NAMES = ("<|endoftext|>", "</s>", "<eod>", "<|end_of_text|>", "<eos>", "[SEP]")
"""Names of the end-of-document token, the first that exists is taken."""
MASK_NAMES = ("<mask>", "[MASK]", "<|mask|>")


class Tokenizer(Protocol):
    """Text to ids and back. Text never yields the end-of-document, mask or another special token."""

    @property
    def type(self) -> str:
        """Name in ``data.tokenizer_type``."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included: every id is below it."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""

    @property
    def mask(self) -> int | None:
        """Id that hides a token, when the tokenizer has one."""

    @property
    def digest(self) -> str:
        """sha256, in hexadecimal, of what defines the tokenizer (its file)."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end-of-document token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens appear by name."""

    def lookup(self, name: str) -> int | None:
        """Id of a special token, or None when the vocabulary has none of that name."""

    def texts(self) -> list[bytes | None]:
        """Per id, what it adds to a text, with a space where it begins a word; None for ids that stand for no text."""


@dataclass(frozen=True)
class Specials:
    """Ids with a meaning of their own."""

    eod: int
    mask: int | None


def find_specials(path: str, lookup: Callable[[str], int | None]) -> Specials:
    """The special ids of a vocabulary, by the usual names; ValueError when no end-of-document token exists."""
    eod = next((found for name in EOD_NAMES if (found := lookup(name)) is not None), None)
    if eod is None:
        raise ValueError(f"{path} has no end-of-document token: none of {', '.join(EOD_NAMES)} is in its vocabulary.")
    mask = next((found for name in MASK_NAMES if (found := lookup(name)) is not None), None)
    return Specials(eod, mask)


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """What a library raises as ``ValueError``, its cause in parentheses; panics of Rust, no Exceptions, included."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        cause = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{message} ({cause}).") from error
