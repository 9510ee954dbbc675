"""The ``.json`` beside a ``.bin``/``.idx`` pair: which tokenizer wrote it, how much it holds, and its digests.

The pair itself records none of this, so a pair from elsewhere opens with a warning and fewer checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 22
BLOCK_BYTES = 64 << 20
"""Bytes of a block of the digests of a pair, which many processes compute together."""


def file_digest(path: str | Path) -> str:
    """sha256 of a file in hexadecimal, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def model_digest(path: str) -> str:
    """Digest of a tokenizer's files: of the file, of the folder's ``tokenizer.json``, or of several files in order."""
    files = model_files(path)
    digests = [file_digest(file) for file in files]
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def model_files(path: str) -> list[str]:
    """Files that ``data.tokenizer_model`` names: a file, several joined by ``:``, or a folder of the usual ones."""
    if os.path.isdir(path):
        known = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.txt"])
        found = [[os.path.join(path, name) for name in names] for names in known]
        return next((files for files in found if all(map(os.path.isfile, files))), found[0])
    return [path] if os.path.isfile(path) else path.split(os.pathsep)


def block_digest(path: str | Path, number: int) -> str:
    """sha256 of block ``number`` of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(number * BLOCK_BYTES)
        left = BLOCK_BYTES
        while left and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def combine_digests(blocks: dict[int, str]) -> str:
    """sha256 of the binary digests of all blocks in order, in hexadecimal; one of no block is that of nothing."""
    return hashlib.sha256(b"".join(bytes.fromhex(blocks[number]) for number in range(len(blocks)))).hexdigest()


def tree_digest(path: str | Path) -> str:
    """Digest of a file as a sidecar records it: of the digests of its 64 MiB blocks."""
    blocks = -(-os.path.getsize(path) // BLOCK_BYTES)
    return combine_digests({number: block_digest(path, number) for number in range(blocks)})


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
    specials: dict[str, int] | None = None
    """Ids of ``cls``, ``sep``, ``pad``, ``fim_prefix``, ``fim_suffix`` and ``fim_middle``, those that exist."""
    sentinels: list[int] | None = None
    """Ids of <extra_id_0>, <extra_id_1>, ..."""
    words: str | None = None
    """Two bits an id, base64: all the first bits (a word may go on into it), then the second (it may go on after)."""


@dataclass(frozen=True)
class Sidecar:
    """Everything recorded beside a pair."""

    dtype: str
    sequences: int
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_digest: str | None
    """``tree_digest`` of the file."""
    idx_digest: str | None
    tokenizer: TokenizerRecord | None = None
    validated: str | None = None
    """``idx_digest`` when `inspect_data.py --validate` found every offset and digest right."""
    packs: dict[str, Any] | None = None
    """Plans of rows by tokens a row (``data/pack.py``)."""

    def write(self, path: str | Path) -> None:
        """Write as JSON, flushed to the disk."""
        write_json(
            path, {key: value for key, value in asdict(self).items() if key not in ("validated", "packs") or value}
        )


def write_json(path: str | Path, content: object) -> None:
    """Write as JSON, flushed to the disk, under its name only when complete."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def read_sidecar(path: str | Path) -> Sidecar | None:
    """The sidecar at ``path``, or None when there is none; ValueError when it cannot be understood."""
    try:
        with open(path, "rb") as file:
            return parse_sidecar(path, file.read())
    except FileNotFoundError:
        return None


def parse_sidecar(path: str | Path, content: bytes) -> Sidecar:
    """The sidecar that the file at ``path`` holds; ValueError when it cannot be understood."""
    try:
        fields_ = json.loads(content)
        record = fields_.pop("tokenizer", None)
        tokenizer = TokenizerRecord(**record) if record is not None else None
        sidecar = Sidecar(tokenizer=tokenizer, **fields_)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
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
