"""Raw documents of ``.jsonl`` and ``.txt`` files, plain or gzipped, in bounded memory."""

from __future__ import annotations

import glob
import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import orjson

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Lines of one JSONL file, or one whole text file."""

    path: str
    first_line: int
    """Number of the first line, from 1; 0 for a text file, which is one document."""
    lines: list[bytes]


@dataclass(frozen=True)
class Document:
    """Texts of one document, one for each key asked for, and the line it stands on (0 in a text file)."""

    line: int
    texts: list[str]


@dataclass(frozen=True)
class BadLine:
    """A line, or text file, that is no document."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files of the given names and glob patterns, patterns in sorted order; ValueError when one matches nothing."""
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            raise ValueError(f"--input {pattern} matches no file.")
        paths += found
    return paths


def chunks(paths: Sequence[str], size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Files in order, cut at line ends into chunks of about ``size`` bytes. Blank lines keep their number."""
    for path in paths:
        with _open(path) as file:
            if is_text(path):
                yield Chunk(path, 0, [file.read()])
                continue
            first, held, lines = 1, 0, []
            for line in file:
                lines.append(line)
                held += len(line)
                if held >= size:
                    yield Chunk(path, first, lines)
                    first, held, lines = first + len(lines), 0, []
            if lines:
                yield Chunk(path, first, lines)


def parse(chunk: Chunk, keys: Sequence[str]) -> tuple[list[Document], list[BadLine]]:
    """Documents of a chunk, with a text for each of ``keys``, and the lines that are none."""
    documents, bad = [], []
    for line, content in enumerate(chunk.lines, chunk.first_line):
        if chunk.first_line and not content.strip():
            continue
        try:
            documents.append(Document(line, _texts(content, keys) if line else [content.decode()] * len(keys)))
        except ValueError as error:
            bad.append(BadLine(chunk.path, line, str(error)))
    return documents, bad


def is_text(path: str) -> bool:
    """Whether a file is one plain document (``.txt``, ``.txt.gz``) rather than JSON lines."""
    return path.removesuffix(".gz").endswith(".txt")


def _texts(line: bytes, keys: Sequence[str]) -> list[str]:
    document = orjson.loads(line)
    if not isinstance(document, dict):
        raise ValueError(f"a JSON {type(document).__name__} where an object is needed")
    texts = []
    for key in keys:
        text = document.get(key)
        if not isinstance(text, str):
            raise ValueError(f"no key {key!r}" if key not in document else f"{key!r} is no string")
        texts.append(text)
    return texts


def _open(path: str) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
