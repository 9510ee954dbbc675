"""``megapre/_data.so``: helpers of csrc/data, plain C functions without torch, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

LIBRARY = Path(__file__).resolve().parent.parent / "_data.so"


@lru_cache(maxsize=1)
def library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """The library, or None where it is not built; its callers have a reference in Python."""
    try:
        found = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        found.megapre_chairman.argtypes = [pointer, size, size, pointer, pointer]
        found.megapre_chairman.restype = ctypes.c_int
        found.megapre_permute.argtypes = [ctypes.c_uint64] * 3
        found.megapre_permute.restype = ctypes.c_uint64
        found.megapre_two_level.argtypes = [ctypes.c_uint64] * 6
        found.megapre_two_level.restype = ctypes.c_uint64
        found.megapre_mark_documents.argtypes = [pointer, size, size, pointer, pointer]
        found.megapre_mark_documents.restype = None
        found.megapre_document_starts.argtypes = [pointer, pointer, *[size] * 6, pointer, size]
        found.megapre_document_starts.restype = size
    except (OSError, AttributeError):
        return None
    return found


def missing(path: Path = LIBRARY) -> str:
    """What a run says when the references in Python take the library's place; empty when it is there."""
    if library(path) is not None:
        return ""
    why = f"{path.name} is missing or older than its sources"
    return f"{why}: Python reads the data, slower, until `make setup` builds it"


def chairman(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Source and rank of each slot of a period, int32; None without the library. MemoryError when there is none."""
    found = library()
    if found is None:
        return None
    seats, period = np.asarray(counts, np.int64), int(sum(counts))
    sources, ranks = np.empty(period, np.int32), np.empty(period, np.int32)
    code = found.megapre_chairman(seats.ctypes.data, len(seats), period, sources.ctypes.data, ranks.ctypes.data)
    if code == 1:
        raise MemoryError(f"a period of {period} samples")
    assert code == 0, f"{counts} cannot be seated"
    return sources, ranks


def document_starts(
    first: int, documents: int, pointers: int, sequences: int, itemsize: int, total: int, start: int, stop: int
) -> np.ndarray | None:
    """Tokens in [start, stop) that begin a document, int64; None without the library or when a record is damaged.

    ``first`` and ``pointers`` are addresses of int64 [documents + 1] and [sequences].
    """
    found = library()
    if found is None:
        return None
    room = 256
    while True:
        out = np.empty(room, np.int64)
        count = found.megapre_document_starts(
            first, pointers, documents, sequences, itemsize, total, start, stop, out.ctypes.data, room
        )
        if count == -1:
            return None
        if count >= 0:
            return out[:count]
        room *= 16
