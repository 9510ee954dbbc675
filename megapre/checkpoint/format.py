"""The checkpoint on disk: shards, manifests and the root file, and how they are written.

    step_0000120/
        rank_00003.safetensors   the pieces of rank 3, one 1-D tensor each
        rank_00003.json          their addresses, and the CRC-32 of every chunk of the shard
        checkpoint.json          step, save identity, world size, trainer state, SHA-256 of every manifest

The chain of trust runs downwards: the root carries its own SHA-256, the root's digests hold the manifests, the
manifests' checksums hold the shards. Shards are ordinary safetensors files that any tool opens. They are written
here rather than by the safetensors library so that checksums are taken from the live tensors on their way out,
tensors on an accelerator pass in slices, and views of one flat buffer may be saved (the library refuses those).
No pickle anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megapre.checkpoint.reshard import CheckpointError, check_data, validate
from megapre.parallel.placement import Address

FORMAT = 1
CHUNK = 16 * 2**20
"""Bytes under one checksum."""
ROOT = "checkpoint.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' name of each dtype that a checkpoint may hold."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


def shard_name(rank: int) -> str:
    """File of a rank's tensors."""
    return f"rank_{rank:05d}.safetensors"


def manifest_name(rank: int) -> str:
    """File of a rank's addresses and checksums."""
    return f"rank_{rank:05d}.json"


@dataclass(frozen=True)
class Piece:
    """One 1-D tensor of a shard."""

    address: Address
    dtype: torch.dtype
    key: str
    """Its name in the safetensors file."""
    begin: int
    """First byte in the file."""

    @property
    def end(self) -> int:
        """One past the last byte in the file."""
        return self.begin + (self.address.end - self.address.start) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """What one rank wrote."""

    uuid: str
    step: int
    rank: int
    world: int
    bytes: int
    """Size of the shard."""
    chunk: int
    """Bytes under one checksum."""
    crc32: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Root:
    """What the whole checkpoint is."""

    uuid: str
    step: int
    world: int
    state: dict[str, Any]
    digests: tuple[str, ...]
    """SHA-256 of each rank's manifest, in the order of the ranks."""


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such operation and make names durable by themselves.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: bytes) -> None:
    with open(path, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _plan(items: Sequence[tuple[Address, Tensor]], metadata: dict[str, str]) -> tuple[bytes, list[Piece]]:
    """The safetensors header of a shard, and its pieces in the order of the bytes that follow."""
    pieces: list[Piece] = []
    header: dict[str, Any] = {"__metadata__": metadata}
    cursor = 0
    for address, data in items:
        key = address.name
        while key in header:
            key = f"{address.name}#{len(pieces)}"
        piece = Piece(address, data.dtype, key, cursor)
        header[key] = {
            "dtype": CODES[data.dtype],
            "shape": [address.end - address.start],
            "data_offsets": [piece.begin, piece.end],
        }
        pieces.append(piece)
        cursor = piece.end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return text, [Piece(p.address, p.dtype, p.key, p.begin + len(text)) for p in pieces]


def _slices(data: Tensor) -> Iterator[memoryview]:
    """The bytes of a 1-D tensor, a chunk at a time, through the host's memory."""
    step = max(1, CHUNK // data.dtype.itemsize)
    for first in range(0, len(data), step):
        part = data[first : first + step].detach().cpu().contiguous()
        yield part.view(torch.uint8).numpy().data


class _Summed:
    """Writes bytes and keeps the CRC-32 of every chunk of them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.crc32: list[int] = []

    def write(self, data: bytes | memoryview) -> None:
        while len(data):
            inside = self.size % CHUNK
            if not inside:
                self.crc32.append(0)
            part = data[: CHUNK - inside]
            self.crc32[-1] = zlib.crc32(part, self.crc32[-1])
            self.file.write(part)
            self.size += len(part)
            data = data[len(part) :]


def write_rank(
    directory: Path, items: Sequence[tuple[Address, Tensor]], *, uuid: str, step: int, rank: int, world: int
) -> str:
    """Write and fsync the shard and the manifest of one rank; returns the manifest's SHA-256.

    ``items`` are (address, 1-D tensor) pairs. Raises CheckpointError on an address that does not fit its tensor or
    a dtype that has no place in a checkpoint, OSError when the disk refuses.
    """
    for address, data in items:
        validate(address)
        check_data(address, data)
        if data.dtype not in CODES:
            raise CheckpointError(f"{address.name!r} is {data.dtype}, and a checkpoint holds {', '.join(DTYPES)}")
    # Wide types first keep every tensor aligned, as readers that map the file expect.
    items = sorted(items, key=lambda item: -item[1].dtype.itemsize)
    header, pieces = _plan(items, {"format": "pt", "uuid": uuid, "step": str(step), "rank": str(rank)})
    with open(directory / shard_name(rank), "wb") as file:
        summed = _Summed(file)
        summed.write(header)
        for _, data in items:
            for part in _slices(data):
                summed.write(part)
        file.flush()
        os.fsync(file.fileno())
    manifest = {
        "format": FORMAT,
        "uuid": uuid,
        "step": step,
        "rank": rank,
        "world": world,
        "bytes": summed.size,
        "chunk": CHUNK,
        "crc32": summed.crc32,
        "pieces": [
            {
                "name": p.address.name,
                "dtype": CODES[p.dtype],
                "shape": p.address.shape,
                "offset": p.address.offset,
                "size": p.address.size,
                "start": p.address.start,
                "end": p.address.end,
                "key": p.key,
                "begin": p.begin,
            }
            for p in pieces
        ],
    }
    text = json.dumps(manifest, separators=(",", ":")).encode()
    _write_text(directory / manifest_name(rank), text)
    sync_directory(directory)
    return hashlib.sha256(text).hexdigest()


def seal(body: dict[str, Any]) -> bytes:
    """The text of a root file: one JSON object whose first line is the SHA-256 of all that follows it."""
    text = b'"body": ' + json.dumps(body).encode() + b"}\n"
    return b'{"sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'",\n' + text


def write_root(directory: Path, root: Root) -> None:
    """Write and fsync ``checkpoint.json``. Raises CheckpointError when the state is not plain JSON."""
    check_plain(root.state, "state")
    body = {
        "format": FORMAT,
        "uuid": root.uuid,
        "step": root.step,
        "world": root.world,
        "state": root.state,
        "manifests": root.digests,
    }
    _write_text(directory / ROOT, seal(body))
    sync_directory(directory)


def check_plain(value: object, where: str) -> None:
    """Raise CheckpointError unless JSON gives the value back as it is (no tuples, no keys but text)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, and JSON keys are text")
            check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            check_plain(inner, f"{where}[{number}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON would not give back unchanged")
