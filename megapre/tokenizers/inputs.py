"""Input files of the tools: which there are, how they are packed, and how they are cut into pieces of work.

Formats by name: ``.jsonl`` (or any other name) holds a JSON object a line, ``.json`` the same or one array, ``.txt``
one document, ``.parquet`` a column of text; each plain or as ``.gz``, ``.zst``, ``.xz``. The cut depends on the files
alone, so the output of a run does not depend on its number of workers or machines.
"""

from __future__ import annotations

import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, BinaryIO, cast

import zstandard

PACKED = (".gz", ".zst", ".xz")
FORMATS = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
SMALLEST_PIECE, LARGEST_PIECE, PIECES = 8 << 20, 1 << 30, 4096
"""Bytes of a piece of work, and how many pieces a large input is cut into."""
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError)
"""What reading a cut or damaged compressed file raises."""


@dataclass(frozen=True)
class Span:
    """A part of one file: bytes [start, stop) of plain lines, row groups of Parquet, else [0, size)."""

    path: str
    start: int
    stop: int
    whole: bool
    """Whether it is all of the file, and the only way to read a file that is packed or no lines."""


@dataclass(frozen=True)
class Piece:
    """What one worker reads at a time and another run may find finished."""

    number: int
    spans: tuple[Span, ...]
    size: int
    """Bytes on disk, for progress and for sharing work out."""


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files of names, folders and glob patterns, each pattern's in sorted order and every file once.

    Of a folder, files of a known format are taken, those in its folders too. ValueError when one matches nothing.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.isfile(pattern):
            found = [pattern]
        elif os.path.isdir(pattern):
            walk = (os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names)
            found = sorted(path for path in walk if os.path.splitext(unpacked_name(path))[1] in FORMATS)
        else:
            found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            raise ValueError(f"--input {pattern} matches no file.")
        paths += found
    return list(dict.fromkeys(paths))


def unpacked_name(path: str) -> str:
    """The name without ``.gz``, ``.zst`` or ``.xz``."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in PACKED else path


def format_of(path: str) -> str:
    """One of ``FORMATS``; names that end otherwise hold JSON lines."""
    suffix = os.path.splitext(unpacked_name(path))[1]
    return suffix if suffix in (".json", ".txt", ".parquet") else ".jsonl"


def cut(paths: Sequence[str], piece_bytes: int = 0) -> list[Piece]:
    """Cut files into pieces: large plain files into several, small files of any kind together.

    ``piece_bytes`` 0 means: a 4,096th of the input, within 8 MiB and 1 GiB. ValueError on Parquet that is none.
    """
    sizes = [os.path.getsize(path) for path in paths]
    target = piece_bytes or min(LARGEST_PIECE, max(SMALLEST_PIECE, sum(sizes) // PIECES))
    pieces: list[Piece] = []
    spans: list[Span] = []
    held = 0
    for path, size in zip(paths, sizes):
        for span, weight in _spans(path, size, target):
            if spans and held + weight > target:
                pieces.append(Piece(len(pieces), tuple(spans), held))
                spans, held = [], 0
            spans.append(span)
            held += weight
    if spans:
        pieces.append(Piece(len(pieces), tuple(spans), held))
    return pieces


def share_out(pieces: Sequence[Piece], ranks: int) -> list[tuple[int, int]]:
    """Ranges of pieces, one per rank, of about equally many bytes each."""
    total, passed, bounds = sum(piece.size for piece in pieces), 0, [0]
    for number, piece in enumerate(pieces):
        while len(bounds) < ranks and passed * ranks >= total * len(bounds):
            bounds.append(number)
        passed += piece.size
    bounds += [len(pieces)] * (ranks + 1 - len(bounds))
    return list(pairwise(bounds))


def _spans(path: str, size: int, target: int) -> list[tuple[Span, int]]:
    kind = format_of(path)
    if size > target and unpacked_name(path) == path and (kind == ".jsonl" or (kind == ".json" and not is_array(path))):
        count = -(-size // target)
        bounds = [size * i // count for i in range(count + 1)]
        return [(Span(path, a, b, False), b - a) for a, b in pairwise(bounds)]
    if size > target and kind == ".parquet" and unpacked_name(path) == path:
        groups = open_parquet(path).metadata.num_row_groups
        count = max(1, min(groups, -(-size // target)))
        bounds = [groups * i // count for i in range(count + 1)]
        return [(Span(path, a, b, False), size // count) for a, b in pairwise(bounds)]
    return [(Span(path, 0, size, True), size)]


def is_array(path: str) -> bool:
    """Whether a ``.json`` file holds one array rather than an object a line, by its first character."""
    try:
        with open_packed(path) as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except DAMAGED:
        return False


def open_packed(path: str) -> BinaryIO:
    """A file's content, unpacked as it is read; reading raises one of ``DAMAGED`` where the packing is broken."""
    suffix = os.path.splitext(path)[1]
    if suffix == ".gz":
        return cast(BinaryIO, _Unpacked(gzip.open(path, "rb")))
    if suffix == ".xz":
        return cast(BinaryIO, _Unpacked(lzma.open(path, "rb")))
    if suffix == ".zst":
        return cast(BinaryIO, _Unpacked(_Zstd(path)))
    return open(path, "rb", buffering=0)


def open_parquet(source: str | IO[bytes]) -> Any:
    """A Parquet file by pyarrow; ValueError when it is none or the library is missing."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: pip install 'megapre[parquet]'.") from None
    try:
        return parquet.ParquetFile(source)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{source} is no Parquet file ({str(error).splitlines()[0]}).") from error


class _Unpacked(io.RawIOBase):
    """Returns what is there, so that a failure further on loses nothing that came before it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def readable(self) -> bool:
        """Yes."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes; none at the end."""
        data: bytes = self._inner.read1(size)
        return data

    def close(self) -> None:
        """Close the file."""
        self._inner.close()
        super().close()


class _Zstd:
    """Zstandard frames back to back. The library takes a cut frame for the end, so the blocks are counted there."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "rb")
        self._inner = zstandard.ZstdDecompressor().stream_reader(self._file, read_across_frames=True)

    def read1(self, size: int) -> bytes:
        data: bytes = self._inner.read1(size)
        if not data and not (data := self._inner.read(size)) and not frames_complete(self._path):
            raise EOFError("the compressed data end inside a frame")
        return data

    def close(self) -> None:
        self._file.close()


def frames_complete(path: str) -> bool:
    """Whether a Zstandard file ends where a frame does (RFC 8878); reads only the headers of frames and blocks."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(18)
            if len(head) >= 8 and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame to be skipped
                at += 8 + int.from_bytes(head[4:8], "little")
                continue
            try:
                at += zstandard.frame_header_size(head)
                checksum = zstandard.get_frame_parameters(head).has_checksum
            except zstandard.ZstdError:
                return False
            last = False
            while not last:
                file.seek(at)
                header = int.from_bytes(file.read(3).ljust(3, b"\xff"), "little")
                last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
                at += 3 + (1 if kind == 1 else length)
                if kind == 3 or at > size:
                    return False
            at += 4 * checksum
    return at == size
