"""Megatron's ``.bin``/``.idx`` pair: a reader that trusts nothing it can check, and a streaming writer.

Layout of ``.idx``, little-endian: magic (9 bytes), version u64, dtype code u8, sequences S u64, documents + 1
u64, then lengths i32[S] in tokens, pointers i64[S] in bytes, document index i64[documents + 1] in sequences.
``.bin`` holds the token ids back to back.
"""

from __future__ import annotations

import os
import struct
import warnings
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megapre.data import native
from megapre.data.remote import Cache, LocalFile, RemoteFile, is_remote
from megapre.data.sidecar import Sidecar, TokenizerRecord, read_sidecar, tree_digest

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
CHUNK = 1 << 20


def token_dtype(vocab_size: int | None) -> np.dtype:
    """Type of a stored token id, as Megatron's builder chooses it: u16 below 65,500 ids, else i32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """Read access to a pair: one flat stream of tokens, cut into documents.

    ``read`` copies by ``pread``, so no array refers to a map that was closed, a page that goes missing is an
    OSError rather than a signal, and the resident memory does not grow with what was read.
    Raises ValueError, in one sentence, on a pair that is missing, cut short or inconsistent.
    """

    def __init__(
        self, prefix: str, *, verify: bool = False, cache: Cache | None = None, staged: Callable[[str], str] = str
    ) -> None:
        """``staged`` says which file to open in the place of one of the pair's (`stage.Stage`)."""
        self.prefix = prefix
        tokens, index, record = (staged(prefix + suffix) for suffix in (".bin", ".idx", ".json"))
        self._bin: LocalFile | RemoteFile
        if is_remote(tokens):
            cache = cache or Cache("", 1 << 30)
            self._bin = RemoteFile(tokens, cache)
        else:
            self._bin = LocalFile(tokens)
        idx = _open(_here(index, cache) or index)
        self.dtype, self.sequences, entries = _read_header(idx, prefix)
        self.n_documents = entries - 1
        s = self.sequences
        # A view of a map: numpy keeps the map alive for as long as the array lives.
        body = np.memmap(idx, dtype=np.uint8, mode="r").view(np.ndarray)
        at = HEADER.size
        self._lengths = body[at : at + 4 * s].view("<i4")
        self._pointers = body[at + 4 * s : at + 12 * s].view("<i8")
        self._first = body[at + 12 * s : at + 12 * s + 8 * entries].view("<i8")
        self._addresses = (self._first.ctypes.data, self.n_documents, self._pointers.ctypes.data, s)
        bin_bytes = self._bin.size
        self._check_ends(bin_bytes)
        self.total_tokens = bin_bytes // self.dtype.itemsize
        here = _here(record, cache)
        self.sidecar = read_sidecar(here) if here else None
        if self.sidecar is None:
            warnings.warn(
                f"{prefix}.json is missing: the tokenizer, the end-of-document id and the digests of {prefix} "
                "are unknown and not checked.",
                stacklevel=2,
            )
        else:
            self._check_sidecar(self.sidecar, bin_bytes, len(body))
        if verify:
            self._check_index()
        if verify and self.sidecar is not None:
            self._check_digests(self.sidecar)

    def __len__(self) -> int:
        return self.n_documents

    @cached_property
    def tokens(self) -> np.ndarray:
        """Flat view of all tokens, mapped read-only: ``dtype`` [total_tokens]."""
        if self.total_tokens == 0:
            return np.empty(0, self.dtype)
        if isinstance(self._bin, RemoteFile):
            return self.read(0, self.total_tokens)
        return np.memmap(self._bin.path, dtype=self.dtype, mode="r").view(np.ndarray)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence as the index says, int32 [sequences], mapped."""
        return self._lengths

    @property
    def document_bounds(self) -> np.ndarray:
        """First sequence of each document and the number of sequences, int64 [documents + 1], mapped."""
        return self._first

    @cached_property
    def documents(self) -> np.ndarray:
        """Boundaries of documents in tokens, int64 [documents + 1], from 0 to ``total_tokens``.

        Costs 8 bytes a document; ``document_start`` and ``document_starts`` cost none.
        """
        return self._starts(0, self.n_documents + 1)

    def document_start(self, index: int) -> int:
        """First token of document ``index``; ``index`` = number of documents gives ``total_tokens``. O(1).

        Opening checks the ends alone, so each record is checked when it is touched: ValueError on a hostile one.
        """
        sequence, size = int(self._first[index]), self.dtype.itemsize
        if sequence == self.sequences:
            return self.total_tokens
        if not 0 <= sequence < self.sequences:
            raise self._damaged(f"document {index} begins at sequence {sequence} of {self.sequences}")
        at, length = int(self._pointers[sequence]), int(self._lengths[sequence])
        end = int(self._pointers[sequence + 1]) if sequence + 1 < self.sequences else self.total_tokens * size
        if at < 0 or length < 0 or at % size or at + length * size != end:
            raise self._damaged(f"sequence {sequence} has {length} tokens at byte {at} and ends at byte {end}")
        return at // size

    def document_at(self, token: int) -> tuple[int, int, int]:
        """The document that holds ``token``, with its first token and its end."""
        low, high = 0, self.n_documents
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.document_start(middle) <= token else (low, middle)
        return low, self.document_start(low), self.document_start(low + 1)

    def sequence_start(self, index: int) -> int:
        """First token of sequence ``index``."""
        return int(self._pointers[index]) // self.dtype.itemsize

    def sequence_starts(self, start: int, stop: int) -> np.ndarray:
        """Tokens in [start, stop) that begin a sequence, int64, ascending; O(log sequences) page touches."""
        low = bisect_left(range(self.sequences), start, key=self.sequence_start)
        high = bisect_left(range(self.sequences), stop, lo=low, key=self.sequence_start)
        return self._pointers[low:high].astype(np.int64) // self.dtype.itemsize

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Tokens in [start, stop) that begin a document, int64, ascending; O(log documents) page touches."""
        found = native.document_starts(*self._addresses, self.dtype.itemsize, self.total_tokens, start, stop)
        return self._document_starts(start, stop) if found is None else found

    def _document_starts(self, start: int, stop: int) -> np.ndarray:
        """The definition, which also says what is wrong with a damaged record."""
        low = bisect_left(range(self.n_documents), start, key=self.document_start)
        # A sample spans few documents: double a step from the first rather than search them all again.
        step = 1
        while low + step < self.n_documents and self.document_start(low + step) < stop:
            step *= 2
        bound = min(low + step, self.n_documents)
        high = bisect_left(range(bound), stop, lo=low + step // 2, key=self.document_start)
        return self._starts(low, high)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy of tokens [start, stop) of the flat stream, in the stored dtype; ValueError outside the stream."""
        if not 0 <= start <= stop <= self.total_tokens:
            raise ValueError(f"tokens [{start}, {stop}) are outside the {self.total_tokens} tokens of {self.prefix}.")
        size = self.dtype.itemsize
        wanted = (stop - start) * size
        data = self._bin.pread(wanted, start * size)
        while len(data) < wanted:
            more = self._bin.pread(wanted - len(data), start * size + len(data))
            if not more:
                raise ValueError(f"{self.prefix}.bin ended {wanted - len(data)} bytes early: it changed while open.")
            data += more
        return np.frombuffer(data, self.dtype)

    def prefetch(self, start: int, stop: int) -> None:
        """Say that tokens [start, stop) will be read soon; for remote files."""
        if isinstance(self._bin, RemoteFile):
            self._bin.prefetch(start * self.dtype.itemsize, stop * self.dtype.itemsize)

    def document(self, index: int) -> np.ndarray:
        """Copy of the tokens of document ``index``, in the stored dtype; IndexError outside [0, documents)."""
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.prefix}, which has {self.n_documents}")
        return self.read(self.document_start(index), self.document_start(index + 1))

    def _starts(self, low: int, high: int) -> np.ndarray:
        first = self._first[low:high].astype(np.int64)
        if len(first) and not (0 <= int(first.min()) and int(first.max()) <= self.sequences):
            raise self._damaged(f"documents {low} to {high} begin outside its {self.sequences} sequences")
        starts = np.full(len(first), self.total_tokens, np.int64)
        inside = first < self.sequences
        starts[inside] = self._pointers[first[inside]] // self.dtype.itemsize
        if len(starts) and (int(starts[0]) < 0 or int(starts[-1]) > self.total_tokens or (np.diff(starts) < 0).any()):
            raise self._damaged(f"documents {low} to {high} do not follow one another")
        return starts

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.prefix}.idx is damaged: {what} (inspect_data.py --validate checks all of it).")

    def _check_ends(self, bin_bytes: int) -> None:
        """Checks that touch two pages: enough to see a cut or foreign ``.bin``."""
        expected = 0
        if self.sequences:
            expected = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if bin_bytes != expected:
            raise ValueError(
                f"{self.prefix}.bin has {bin_bytes} bytes where {self.prefix}.idx describes {expected} "
                f"({self.sequences} sequences of {self.dtype.name}): it is cut short or belongs to another index."
            )
        if int(self._first[0]) != 0 or int(self._first[-1]) != self.sequences:
            raise ValueError(
                f"{self.prefix}.idx has documents from sequence {int(self._first[0])} to {int(self._first[-1])} "
                f"where 0 to {self.sequences} are needed."
            )

    def _check_index(self) -> None:
        """Every pointer is the sum of the lengths before it, and documents do not overlap."""
        expected = 0
        for start in range(0, self.sequences, CHUNK):
            lengths = self._lengths[start : start + CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise ValueError(f"{self.prefix}.idx has a sequence of {int(lengths.min())} tokens.")
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            wrong = self._pointers[start : start + CHUNK] != ends - lengths * self.dtype.itemsize
            if wrong.any():
                at = int(wrong.argmax())
                raise ValueError(
                    f"{self.prefix}.idx says that sequence {start + at} is at byte {int(self._pointers[start + at])} "
                    f"where the lengths before it end at {int(ends[at] - lengths[at] * self.dtype.itemsize)}."
                )
            expected = int(ends[-1])
        for start in range(0, self.n_documents, CHUNK):
            if (np.diff(self._first[start : start + CHUNK + 1]) < 0).any():
                raise ValueError(f"{self.prefix}.idx has documents that run backwards after document {start}.")

    def _check_sidecar(self, sidecar: Sidecar, bin_bytes: int, idx_bytes: int) -> None:
        found = {
            "bin_bytes": bin_bytes,
            "idx_bytes": idx_bytes,
            "sequences": self.sequences,
            "documents": self.n_documents,
            "tokens": self.total_tokens,
            "dtype": self.dtype.name,
        }
        for name, value in found.items():
            if getattr(sidecar, name) != value:
                raise ValueError(
                    f"{self.prefix}.json records {name} = {getattr(sidecar, name)} where the pair has {value}: "
                    "the files do not belong together."
                )

    def _check_digests(self, sidecar: Sidecar) -> None:
        if isinstance(self._bin, RemoteFile):
            raise ValueError(f"{self.prefix} is remote: verify it where it is stored.")
        for suffix, digest in ((".bin", sidecar.bin_digest), (".idx", sidecar.idx_digest)):
            if digest is not None and (found := tree_digest(self.prefix + suffix)) != digest:
                raise ValueError(
                    f"{self.prefix}{suffix} has digest {found[:12]} where its record says {digest[:12]}: "
                    "it was changed or damaged after it was written."
                )


def _here(path: str, cache: Cache | None) -> str | None:
    """The path of a file on this machine, copied there when it is remote; None when a remote one does not exist."""
    return cache.copy(path) if cache and is_remote(path) else path


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; data.paths holds prefixes of .bin/.idx pairs.") from None


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_header(idx: BinaryIO, prefix: str) -> tuple[np.dtype, int, int]:
    """dtype, sequences, documents + 1; the size of the file proves the counts before anything is mapped."""
    header = idx.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{prefix}.idx does not begin as an index does ({header[:9]!r} where {MAGIC!r} is needed).")
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != 1:
        raise ValueError(f"{prefix}.idx has version {version}; only version 1 is known.")
    if code not in DTYPES:
        raise ValueError(f"{prefix}.idx has dtype code {code}, which is no integer type ({sorted(DTYPES)} are).")
    found, expected = os.fstat(idx.fileno()).st_size, HEADER.size + 12 * sequences + 8 * entries
    if entries < 1 or found != expected:
        modes = ": it carries the modes of a multimodal set" if found == expected + sequences > expected else ""
        raise ValueError(
            f"{prefix}.idx has {found} bytes where {sequences} sequences and {entries} document bounds "
            f"take {expected}{modes}."
        )
    return np.dtype(DTYPES[code]), sequences, entries


class IndexedWriter:
    """Writes a pair and its record as documents arrive; the pair appears under its name only when complete.

    Memory: 4 bytes a sequence and 8 bytes a document. As a context manager it finishes on success and removes
    its temporary files on an exception.
    """

    def __init__(self, prefix: str, dtype: np.dtype | str, tokenizer: TokenizerRecord | None = None) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise ValueError(f"token ids cannot be stored as {self.dtype.name}.")
        self._limit = np.iinfo(self.dtype)
        self._tokenizer = tokenizer
        self._lengths = array("i")
        self._first = array("q", [0])
        self._temporary = {suffix: f"{prefix}{suffix}.tmp-{os.getpid()}" for suffix in (".bin", ".idx", ".json")}
        self._bin = open(self._temporary[".bin"], "wb")
        self.tokens = 0

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def add_document(self, ids: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document: integer ids, cut into sequences of ``lengths`` tokens (one when None).

        Raises ValueError on an id that the dtype cannot hold.
        """
        lengths = [len(ids)] if lengths is None else lengths
        self._append(np.asarray(ids), lengths)
        self._first.append(len(self._lengths))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of one sequence each: flat ids and the tokens of each document."""
        before = len(self._lengths)
        self._append(ids, lengths.tolist())
        self._first.extend(range(before + 1, len(self._lengths) + 1))

    def finish(self) -> Sidecar:
        """Write the index and the record, flush, and give the three files their names; the index comes last."""
        _flush(self._bin)
        self._bin.close()
        with open(self._temporary[".idx"], "wb") as file:
            for chunk in self._index():
                file.write(chunk)
            _flush(file)
        size = {suffix: os.path.getsize(self._temporary[suffix]) for suffix in (".bin", ".idx")}
        sidecar = Sidecar(
            dtype=self.dtype.name,
            sequences=len(self._lengths),
            documents=len(self._first) - 1,
            tokens=self.tokens,
            bin_bytes=size[".bin"],
            idx_bytes=size[".idx"],
            bin_digest=tree_digest(self._temporary[".bin"]),
            idx_digest=tree_digest(self._temporary[".idx"]),
            tokenizer=self._tokenizer,
        )
        sidecar.write(self._temporary[".json"])
        # Without its index a pair cannot be opened, so a crash between two renames never leaves a mixed pair.
        if os.path.exists(self.prefix + ".idx"):
            os.remove(self.prefix + ".idx")
        for suffix in (".bin", ".json", ".idx"):
            os.replace(self._temporary[suffix], self.prefix + suffix)
        return sidecar

    def abandon(self) -> None:
        """Close and remove the temporary files."""
        self._bin.close()
        for path in self._temporary.values():
            if os.path.exists(path):
                os.remove(path)

    def _append(self, ids: np.ndarray, lengths: Sequence[int]) -> None:
        if sum(lengths) != len(ids):
            raise ValueError(f"sequences of {sum(lengths)} tokens in all do not cover a document of {len(ids)}.")
        if max(lengths, default=0) > 2**31 - 1:
            raise ValueError(f"a sequence of {max(lengths)} tokens does not fit the index (at most {2**31 - 1}).")
        if len(ids):
            if ids.dtype.kind not in "iu":
                raise ValueError(f"token ids are {ids.dtype.name}, not integers.")
            low, high = int(ids.min()), int(ids.max())
            if low < self._limit.min or high > self._limit.max:
                raise ValueError(f"ids from {low} to {high} do not fit {self.dtype.name} in {self.prefix}.")
            self._bin.write(np.ascontiguousarray(ids, self.dtype).tobytes())
        self._lengths.extend(lengths)
        self.tokens += len(ids)

    def _index(self) -> Iterator[bytes]:
        yield HEADER.pack(MAGIC, 1, CODES[self.dtype], len(self._lengths), len(self._first))
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        yield lengths.astype("<i4").tobytes()
        end = 0
        for start in range(0, len(lengths), CHUNK):
            sizes = lengths[start : start + CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            yield (ends - sizes).astype("<i8").tobytes()
            end = int(ends[-1])
        yield np.frombuffer(self._first, np.int64).astype("<i8").tobytes()
