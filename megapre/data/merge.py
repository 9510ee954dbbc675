"""Put runs of documents behind one another into one pair: each writer fills its own bytes, nobody holds the index.

A part is a shard of ``preprocess_data`` (ids, lengths and, with sentences, documents in plain files) or a whole pair.
The sizes of all parts fix where each one's ids, lengths, pointers and document bounds go, so any number of threads,
processes or machines may write them in any order, and one of them gives the pair its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import numpy as np

from megapre.data.indexed import CODES, HEADER, MAGIC, IndexedDataset
from megapre.data.sidecar import BLOCK_BYTES, Sidecar, TokenizerRecord, block_digest, combine_digests

COPY = 64 << 20
ROWS = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A run of documents: ``path`` is the stem of a shard's files or the prefix of a pair."""

    path: str
    tokens: int
    sequences: int
    documents: int
    pair: bool = False

    @property
    def bin(self) -> str:
        """File of the ids."""
        return f"{self.path}.bin"

    def lengths(self) -> Iterator[np.ndarray]:
        """int32 tokens of each sequence, a block of rows at a time."""
        if self.pair:
            found = IndexedDataset(self.path).sequence_lengths
            for start in range(0, self.sequences, ROWS):
                yield found[start : start + ROWS]
        else:
            yield from _rows(f"{self.path}.len", self.sequences)

    def counts(self) -> Iterator[np.ndarray]:
        """int64 sequences of each document, a block of rows at a time."""
        if self.pair:
            bounds = IndexedDataset(self.path).document_bounds
            for start in range(0, self.documents, ROWS):
                yield np.diff(bounds[start : start + ROWS + 1])
        elif os.path.exists(f"{self.path}.doc"):
            for rows in _rows(f"{self.path}.doc", self.documents):
                yield rows.astype(np.int64)
        else:  # one sequence a document
            for start in range(0, self.documents, ROWS):
                yield np.ones(min(ROWS, self.documents - start), np.int64)


def _rows(path: str, count: int) -> Iterator[np.ndarray]:
    if os.path.getsize(path) != 4 * count:
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes where {count} rows take {4 * count}.")
    with open(path, "rb") as file:
        for start in range(0, count, ROWS):
            yield np.fromfile(file, "<i4", min(ROWS, count - start))


class Target:
    """A pair being put together out of ``parts``: one process begins and finishes, any number write and hash."""

    def __init__(self, prefix: str, dtype: np.dtype, parts: Sequence[Part]) -> None:
        self.prefix, self.dtype, self.parts = prefix, np.dtype(dtype).newbyteorder("<"), parts
        self.tokens = [0, *accumulate(part.tokens for part in parts)]
        self.sequences = [0, *accumulate(part.sequences for part in parts)]
        self.documents = [0, *accumulate(part.documents for part in parts)]
        s, d = self.sequences[-1], self.documents[-1]
        self._pointers = HEADER.size + 4 * s
        self._bounds = HEADER.size + 12 * s
        self.idx_bytes = self._bounds + 8 * (d + 1)
        self.bin_bytes = self.tokens[-1] * self.dtype.itemsize
        self._name = {suffix: f"{prefix}{suffix}.merging" for suffix in (".bin", ".idx", ".json")}

    def begin(self) -> None:
        """Make both files at their full size, and write the index's header; OSError when the disk is too full."""
        for suffix, size in ((".bin", self.bin_bytes), (".idx", self.idx_bytes)):
            with open(self._name[suffix], "wb") as file:
                _reserve(file.fileno(), size)
                if suffix == ".idx":
                    s, d = self.sequences[-1], self.documents[-1]
                    os.pwrite(file.fileno(), HEADER.pack(MAGIC, 1, CODES[self.dtype], s, d + 1), 0)
                    os.pwrite(file.fileno(), np.asarray([0], "<i8").tobytes(), self._bounds)

    def write(self, number: int) -> None:
        """Put part ``number`` in its place; ValueError when its files are not what was counted."""
        part, size = self.parts[number], self.dtype.itemsize
        self._copy(part, self.tokens[number] * size)
        with open(self._name[".idx"], "rb+", buffering=0) as file:
            out = file.fileno()
            row, byte, total = self.sequences[number], self.tokens[number] * size, 0
            for lengths in part.lengths():
                ends = byte + np.cumsum(lengths, dtype=np.int64) * size
                starts = np.concatenate(([byte], ends[:-1])).astype("<i8")
                _write_all(out, lengths.astype("<i4").tobytes(), HEADER.size + 4 * row)
                _write_all(out, starts.tobytes(), self._pointers + 8 * row)
                row, byte, total = row + len(lengths), int(ends[-1]), total + int(lengths.sum(dtype=np.int64))
            bound, last = self.documents[number] + 1, self.sequences[number]
            for counts in part.counts():
                bounds = last + np.cumsum(counts)
                _write_all(out, bounds.astype("<i8").tobytes(), self._bounds + 8 * bound)
                bound, last = bound + len(counts), int(bounds[-1])
            os.fsync(out)
        if total != part.tokens or (row, last) != (self.sequences[number + 1],) * 2:
            raise ValueError(f"{part.path} holds {total} tokens in {row - self.sequences[number]} sequences, which is "
                             f"not the {part.tokens} in {part.sequences} that were counted.")  # fmt: skip

    def digests(self, rank: int = 0, ranks: int = 1, threads: int = 1) -> dict[str, dict[int, str]]:
        """Digests of this rank's blocks of both files, by suffix and number of the block."""
        found: dict[str, dict[int, str]] = {}
        for suffix, size in ((".bin", self.bin_bytes), (".idx", self.idx_bytes)):
            numbers = range(rank, -(-size // BLOCK_BYTES), ranks)
            found[suffix] = dict(zip(numbers, each(partial(block_digest, self._name[suffix]), numbers, threads)))
        return found

    def finish(self, blocks: dict[str, dict[int, str]], tokenizer: TokenizerRecord | None) -> Sidecar:
        """Write the record and give the files their names, the index last."""
        sidecar = Sidecar(
            dtype=self.dtype.name,
            sequences=self.sequences[-1],
            documents=self.documents[-1],
            tokens=self.tokens[-1],
            bin_bytes=self.bin_bytes,
            idx_bytes=self.idx_bytes,
            bin_digest=combine_digests(blocks[".bin"]),
            idx_digest=combine_digests(blocks[".idx"]),
            tokenizer=tokenizer,
        )
        sidecar.write(self._name[".json"])
        if os.path.exists(self.prefix + ".idx"):
            os.remove(self.prefix + ".idx")
        for suffix in (".bin", ".json", ".idx"):
            os.replace(self._name[suffix], self.prefix + suffix)
        return sidecar

    def abandon(self) -> None:
        """Remove what was begun."""
        for name in self._name.values():
            if os.path.exists(name):
                os.remove(name)

    def _copy(self, part: Part, at: int) -> None:
        source = IndexedDataset(part.path).dtype if part.pair else self.dtype
        wanted = part.tokens * source.itemsize
        with open(part.bin, "rb", buffering=0) as inp, open(self._name[".bin"], "rb+", buffering=0) as out:
            if os.fstat(inp.fileno()).st_size != wanted:
                raise ValueError(f"{part.bin} has {os.fstat(inp.fileno()).st_size} bytes where {wanted} were counted.")
            if source == self.dtype:
                _copy_bytes(inp.fileno(), out.fileno(), wanted, at)
            else:
                while len(data := np.frombuffer(inp.read(COPY), source)):
                    limit = np.iinfo(self.dtype)
                    if int(data.min()) < limit.min or int(data.max()) > limit.max:
                        raise ValueError(f"{part.bin} holds ids that do not fit {self.dtype.name}.")
                    _write_all(out.fileno(), data.astype(self.dtype).tobytes(), at)
                    at += len(data) * self.dtype.itemsize
            os.fsync(out.fileno())


def merge(
    prefix: str, dtype: np.dtype, parts: Sequence[Part], tokenizer: TokenizerRecord | None, threads: int = 1
) -> Sidecar:
    """Put ``parts`` into the pair ``prefix`` by threads of this process."""
    target = Target(prefix, dtype, parts)
    try:
        target.begin()
        each(target.write, range(len(parts)), threads)
        return target.finish(target.digests(threads=threads), tokenizer)
    except BaseException:
        target.abandon()
        raise


def each(work: Callable[[int], T], items: Sequence[int], threads: int) -> list[T]:
    """``work`` of every item, by threads."""
    if threads <= 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _reserve(file: int, size: int) -> None:
    os.ftruncate(file, size)
    if size:
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (22, 95):  # EINVAL, EOPNOTSUPP: the file system cannot promise
                raise


def _copy_bytes(source: int, target: int, count: int, at: int) -> None:
    done = 0
    while done < count:
        try:
            moved = os.copy_file_range(source, target, min(COPY, count - done), done, at + done)
        except OSError as error:
            if error.errno not in (5, 18, 22, 38, 95) or done:  # EIO to EOPNOTSUPP: not between these files
                raise
            moved = 0
        if not moved:
            data = os.pread(source, min(COPY, count - done), done)
            if not data:
                raise ValueError(f"a part ended {count - done} bytes early while it was copied.")
            _write_all(target, data, at + done)
            moved = len(data)
        done += moved


def _write_all(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
