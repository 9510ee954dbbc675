"""Reading a checkpoint's files and trusting none of them: every field has its range checked, every byte its sum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from megapre.checkpoint.format import DTYPES, FORMAT, ROOT, Manifest, Piece, Root, crc32, manifest_name, shard_name
from megapre.checkpoint.reshard import MAX_ELEMENTS, CheckpointError, validate
from megapre.parallel.placement import Address

_SEAL = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_T = TypeVar("_T")


LARGEST_TEXT, LARGEST_CHUNK = 256 * 2**20, 256 * 2**20
"""Bytes of a root or manifest, and of a chunk, that are believed: memory for them is taken before their content is
trusted."""


class _Fields:
    """A JSON object whose fields are taken with their type and range checked."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is not a JSON object")
        self.value = value
        self.where = where

    def take(self, name: str, kind: type[_T]) -> _T:
        value = self.value.get(name)
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {name!r} is {_brief(value)}, not of type {kind.__name__}")
        return value

    def integer(self, name: str, low: int = 0, high: int = MAX_ELEMENTS) -> int:
        value = self.take(name, int)
        if not low <= value <= high:
            raise CheckpointError(f"{self.where}: {name!r} is {_brief(value)}, outside [{low}, {high}]")
        return value

    def integers(self, name: str, high: int = MAX_ELEMENTS) -> tuple[int, ...]:
        value = self.take(name, list)
        if any(type(n) is not int or not 0 <= n <= high for n in value):
            raise CheckpointError(f"{self.where}: {name!r} is {_brief(value)}, not integers in [0, {high}]")
        return tuple(value)


def _brief(value: object) -> str:
    if type(value) is int and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _guarded(path: Path, parse: Callable[[bytes], _T]) -> _T:
    """Parse a file's text; whatever is wrong with it becomes one CheckpointError that names it."""
    try:
        with _regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_TEXT:
                raise CheckpointError(f"{path} has {size} bytes, more than the {LARGEST_TEXT} that one may have")
            return parse(file.read())
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def _regular(path: Path) -> io.FileIO:
    """A file opened for reading, unbuffered; CheckpointError for a pipe or a device, which could block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file")
    return io.FileIO(descriptor, "rb")


def read_root(directory: Path) -> Root:
    """Read ``checkpoint.json``. Raises CheckpointError when it is missing, damaged or of another format."""
    path = directory / ROOT

    def parse(text: bytes) -> Root:
        head = _SEAL.match(text)
        if not head or hashlib.sha256(text[head.end() :]).hexdigest().encode() != head[1]:
            raise CheckpointError(f"{path} does not match its own SHA-256")
        body = _Fields(_Fields(json.loads(text), str(path)).take("body", dict), str(path))
        body.integer("format", FORMAT, FORMAT)
        digests = body.take("manifests", list)
        world = body.integer("world", 1)
        if len(digests) != world or any(type(d) is not str for d in digests):
            raise CheckpointError(f"{path} has {len(digests)} manifest digests for {world} ranks")
        return Root(
            body.take("uuid", str), body.integer("step"), world, body.take("state", dict), tuple(digests)
        )

    return _guarded(path, parse)


def read_manifest(directory: Path, rank: int, root: Root) -> Manifest:
    """Read one rank's manifest and hold it against the root.

    Raises CheckpointError when it is missing, damaged, of another save, or has fields out of range.
    """
    path = directory / manifest_name(rank)

    def parse(text: bytes) -> Manifest:
        if hashlib.sha256(text).hexdigest() != root.digests[rank]:
            raise CheckpointError(f"{path} does not match its SHA-256 in {ROOT}{_stale(text, root)}")
        fields = _Fields(json.loads(text), str(path))
        fields.integer("format", FORMAT, FORMAT)
        for name, expected in (("uuid", root.uuid), ("step", root.step), ("rank", rank), ("world", root.world)):
            if fields.take(name, type(expected)) != expected:
                raise CheckpointError(f"{path} has {name} {_brief(fields.value[name])}, not {expected!r} of {ROOT}")
        size, chunk = fields.integer("bytes"), fields.integer("chunk", 1, LARGEST_CHUNK)
        sums = fields.integers("crc32", 2**32 - 1)
        if len(sums) != -(-size // chunk):
            raise CheckpointError(f"{path} has {len(sums)} checksums for {size} bytes in chunks of {chunk}")
        pieces = tuple(
            _read_piece(_Fields(value, f"{path}: piece {number}"), size)
            for number, value in enumerate(fields.take("pieces", list))
        )
        return Manifest(root.uuid, root.step, rank, root.world, size, chunk, sums, pieces)

    return _guarded(path, parse)


def _stale(text: bytes, root: Root) -> str:
    """A hint for the common case that a manifest is whole but was written by another save."""
    try:
        found = json.loads(text)
        step, uuid = found["step"], found["uuid"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return f" (it was written by save {_brief(uuid)} of step {_brief(step)})" if uuid != root.uuid else ""


def _read_piece(fields: _Fields, size: int) -> Piece:
    code = fields.take("dtype", str)
    if code not in DTYPES:
        raise CheckpointError(f"{fields.where}: dtype {_brief(code)} is none of {', '.join(DTYPES)}")
    address = Address(
        fields.take("name", str),
        fields.integers("shape"),
        fields.integers("offset"),
        fields.integers("size"),
        fields.integer("start"),
        fields.integer("end"),
    )
    try:
        validate(address)
    except CheckpointError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error
    piece = Piece(address, DTYPES[code], fields.take("key", str), fields.integer("begin"))
    if piece.end > size:
        raise CheckpointError(f"{fields.where}: {address.name!r} ends at byte {piece.end} of a shard of {size} bytes")
    return piece


class Shard:
    """A shard opened for reading; no byte leaves it before the checksum of its chunk has been verified.

    Raises CheckpointError when the file is missing or has another size than its manifest says.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.path = directory / shard_name(manifest.rank)
        self.manifest = manifest
        try:
            self._file = _regular(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        size = os.fstat(self._file.fileno()).st_size
        if size != manifest.bytes:
            self.close()
            raise CheckpointError(f"{self.path} has {size} bytes and its manifest says {manifest.bytes}")
        self._buffer = memoryview(b"")
        self._held = -1
        """Which verified chunk the buffer holds."""

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def chunk(self, number: int) -> memoryview:
        """The bytes of one chunk; valid until the next call. Raises CheckpointError when its checksum is wrong."""
        if not self._buffer:
            self._buffer = memoryview(bytearray(min(self.manifest.chunk, self.manifest.bytes)))
        first = number * self.manifest.chunk
        data = self._buffer[: min(self.manifest.chunk, self.manifest.bytes - first)]
        if number == self._held:
            return data
        self._held = -1
        try:
            self._file.seek(first)
            got = 0
            while got < len(data):
                count = self._file.readinto(data[got:])
                if not count:
                    raise CheckpointError(f"{self.path} ends at byte {first + got} of {self.manifest.bytes}")
                got += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if crc32(data) != self.manifest.crc32[number]:
            last = first + len(data)
            hit = [p.address.name for p in self.manifest.pieces if p.begin < p.end and p.begin < last and p.end > first]
            names = ", ".join(hit[:8]) + (f" and {len(hit) - 8} more" if len(hit) > 8 else "")
            raise CheckpointError(
                f"{self.path} is damaged between bytes {first} and {last} ({names or 'its header'}): wrong CRC-32"
            )
        self._held = number
        return data

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` on. Raises CheckpointError when one of them is not trusted."""
        size, end, cursor = self.manifest.chunk, begin + len(out), begin
        while cursor < end:
            number = cursor // size
            stop = min(end, (number + 1) * size)
            base = number * size
            out[cursor - begin : stop - begin] = self.chunk(number)[cursor - base : stop - base]
            cursor = stop
