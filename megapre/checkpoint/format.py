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
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megapre.checkpoint.reshard import CheckpointError, check_data, validate
from megapre.parallel.placement import Address

try:  # the same CRC-32 by carry-less multiplication, several times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

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


@dataclass(frozen=True)
class Plan:
    """The file of one rank before it exists."""

    manifest: dict[str, Any]
    """All of the manifest but the checksums."""
    header: bytes
    tensors: tuple[Tensor, ...]
    """In the order of their bytes after the header."""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return int(self.manifest["bytes"])


def lay_out(items: Sequence[tuple[Address, Tensor]], *, uuid: str, step: int, rank: int, world: int) -> Plan:
    """Plan the shard of one rank from its (address, 1-D tensor) pairs.

    Raises CheckpointError on an address that does not fit its tensor or a dtype that has no place in a checkpoint.
    """
    for address, data in items:
        validate(address)
        check_data(address, data)
        if data.dtype not in CODES:
            raise CheckpointError(f"{address.name!r} is {data.dtype}, and a checkpoint holds {', '.join(DTYPES)}")
    # Wide types first keep every tensor aligned, as readers that map the file expect.
    items = sorted(items, key=lambda item: -item[1].dtype.itemsize)
    pieces: list[Piece] = []
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "uuid": uuid, "step": str(step), "rank": str(rank)}}
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
    manifest = {
        "format": FORMAT,
        "uuid": uuid,
        "step": step,
        "rank": rank,
        "world": world,
        "bytes": len(text) + cursor,
        "chunk": CHUNK,
        "pieces": [_entry(piece, len(text)) for piece in pieces],
    }
    return Plan(manifest, text, tuple(data for _, data in items))


def _entry(piece: Piece, origin: int) -> dict[str, Any]:
    address = piece.address
    return {
        "name": address.name,
        "dtype": CODES[piece.dtype],
        "shape": address.shape,
        "offset": address.offset,
        "size": address.size,
        "start": address.start,
        "end": address.end,
        "key": piece.key,
        "begin": origin + piece.begin,
    }


def _slices(data: Tensor) -> Iterator[memoryview]:
    """The bytes of a 1-D tensor, a chunk at a time, through the host's memory."""
    step = max(1, CHUNK // data.dtype.itemsize)
    for first in range(0, len(data), step):
        part = data[first : first + step].detach().cpu().contiguous()
        yield part.view(torch.uint8).numpy().data


class _Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take them."""


class _Memory:
    """A buffer of the host, filled from its start."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer, self.size = buffer, 0

    def write(self, data: bytes | memoryview) -> None:
        self.buffer[self.size : self.size + len(data)] = data
        self.size += len(data)


def _pour(plan: Plan, sink: _Sink, grain: int) -> list[int]:
    """Write header and tensors, at most ``grain`` bytes at once; the CRC-32 of every chunk, of the live bytes."""
    size, sums = 0, []
    for data in itertools.chain([memoryview(plan.header)], *map(_slices, plan.tensors)):
        while len(data):
            inside = size % CHUNK
            if not inside:
                sums.append(0)
            part = data[: min(CHUNK - inside, grain)]
            sums[-1] = crc32(part, sums[-1])
            sink.write(part)
            size += len(part)
            data = data[len(part) :]
    return sums


def write_rank(
    directory: Path, items: Sequence[tuple[Address, Tensor]], *, uuid: str, step: int, rank: int, world: int
) -> str:
    """Write and fsync the shard and the manifest of one rank; returns the manifest's SHA-256.

    Raises CheckpointError as `lay_out` does, OSError when the disk refuses.
    """
    plan = lay_out(items, uuid=uuid, step=step, rank=rank, world=world)
    with open(directory / shard_name(rank), "wb") as file:
        sums = _pour(plan, file, CHUNK)
        file.flush()
        os.fsync(file.fileno())
    return _write_manifest(directory, plan.manifest, sums)


@dataclass(frozen=True)
class Staged:
    """A shard in host memory that no longer depends on any live tensor."""

    manifest: dict[str, Any]
    data: memoryview
    crc32: list[int]
    """Of every chunk, taken from the live tensors on their way here."""


GRAIN = 256 * 2**10
"""Bytes that are summed and copied at once: they stay in a core's cache in between."""


def stage(plan: Plan, buffer: memoryview) -> Staged:
    """Copy a shard into ``buffer``, which must hold ``plan.bytes``."""
    sums = _pour(plan, _Memory(buffer), GRAIN)
    return Staged(plan.manifest, buffer[: plan.bytes], sums)


def write_staged(directory: Path, staged: Staged) -> str:
    """Write and fsync a staged shard and its manifest; returns the manifest's SHA-256.

    Raises CheckpointError when the memory no longer holds what the live tensors held, OSError when the disk refuses.
    """
    rank, pieces = staged.manifest["rank"], staged.manifest["pieces"]
    with open(directory / shard_name(rank), "wb") as file:
        for number, expected in enumerate(staged.crc32):
            first = number * CHUNK
            data = staged.data[first : first + CHUNK]
            if crc32(data) != expected:
                ends = [(p, p["begin"] + (p["end"] - p["start"]) * DTYPES[p["dtype"]].itemsize) for p in pieces]
                hit = [p["name"] for p, end in ends if p["begin"] < first + len(data) and end > first]
                raise CheckpointError(
                    f"the host memory of rank {rank} changed {', '.join(hit[:4]) or 'a tensor'} before it was written "
                    f"(bytes {first} to {first + len(data)} of its shard): test the memory of this node"
                )
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _write_manifest(directory, staged.manifest, staged.crc32)


def _write_manifest(directory: Path, manifest: dict[str, Any], sums: list[int]) -> str:
    text = json.dumps({**manifest, "crc32": sums}, separators=(",", ":")).encode()
    _write_text(directory / manifest_name(manifest["rank"]), text)
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
