"""The ``.json`` beside a ``.bin``/``.idx`` pair: which tokenizer wrote it, how much it holds, and its digests.

The pair itself records none of this, so a pair from elsewhere opens with a warning and fewer checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CHUNK_BYTES = 1 << 22


def file_digest(path: str | Path) -> str:
    """sha256 of a file in hexadecimal, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenizerRecord:
    """What readers need to know of the tokenizer that wrote a pair."""

    type: str
    digest: str | None
    """sha256 of the tokenizer's file, in hexadecimal."""
    vocab_size: int
    eod: int | None
    """Id of the end-of-document token."""
    mask: int | None = None
    """Id that hides a token in the masked objective."""
    eod_appended: bool = False
    """Whether every document ends in ``eod``."""


@dataclass(frozen=True)
class Sidecar:
    """Everything recorded beside a pair."""

    dtype: str
    sequences: int
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str | None
    idx_sha256: str | None
    tokenizer: TokenizerRecord | None = None

    def write(self, path: str | Path) -> None:
        """Write as JSON, flushed to the disk."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


def read_sidecar(path: str | Path) -> Sidecar | None:
    """The sidecar at ``path``, or None when there is none; ValueError when it cannot be understood."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        record = content.pop("tokenizer", None)
        tokenizer = TokenizerRecord(**record) if record is not None else None
        sidecar = Sidecar(tokenizer=tokenizer, **content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record that preprocess_data writes ({error}).") from error
    _check_types(path, sidecar)
    return sidecar


def _check_types(path: str | Path, sidecar: Sidecar) -> None:
    """JSON knows no dataclass: a count that is a string or negative would fail far from its cause."""
    integers = {f.name: getattr(sidecar, f.name) for f in fields(sidecar) if f.type == "int"}
    if sidecar.tokenizer is not None:
        integers["tokenizer.vocab_size"] = sidecar.tokenizer.vocab_size
    for name, value in integers.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{path} has {name} = {value!r} where a count is needed.")
