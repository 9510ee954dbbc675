"""Files behind fsspec (s3://, gs://, file://, memory://): the index is copied once, ``.bin`` comes by blocks.

Blocks wait in a folder of bounded size; the least recently used goes first. The order of samples is known, so the
loader asks for the blocks of coming steps, and the two-level permutation keeps neighbouring windows near in time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4 << 20
THREADS = 4
ATTEMPTS = 4
"""Times that a block is asked for before its error is passed on."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


class LocalFile:
    """A file of this machine, read by position."""

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; data.paths holds prefixes of .bin/.idx pairs.") from None
        self.size = os.fstat(self._file.fileno()).st_size
        self.path = path

    def pread(self, count: int, at: int) -> bytes:
        """At most ``count`` bytes from ``at`` on."""
        return os.pread(self._file.fileno(), count, at)


class Cache:
    """Blocks of remote files in a folder of this process, at most ``limit`` bytes of them; many threads may read."""

    def __init__(self, folder: str, limit: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.root = Path(folder or os.path.join(tempfile.gettempdir(), "megapre-cache"))
        self.limit, self.block_bytes = max(limit, 2 * block_bytes), block_bytes
        self.hits = self.misses = self.fetched = 0
        self._folder, self._lock_file = _own_folder(self.root)
        self._guard = threading.Lock()
        self._blocks: OrderedDict[str, int] = OrderedDict()
        for path in sorted(self._folder.glob("*.block"), key=lambda path: path.stat().st_mtime):
            self._blocks[path.name] = path.stat().st_size
        self._coming: dict[str, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cache")

    def copy(self, url: str) -> str | None:
        """A local copy of a whole file, fetched once for each version of it; None when there is none at ``url``."""
        system, path = filesystem(url)
        try:
            version = version_of(system, path)
        except FileNotFoundError:
            return None
        name = hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:32] + os.path.splitext(url)[1]
        target = self.root / "index" / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_suffix(f".tmp-{os.getpid()}-{threading.get_ident()}")
            with system.open(path, "rb") as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            self.fetched += temporary.stat().st_size
            os.replace(temporary, target)
        return str(target)

    def read(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """A block by name, from the folder or by ``fetch``."""
        with self._guard:
            if name in self._blocks:
                self._blocks.move_to_end(name)
                self.hits += 1
                path, future = self._folder / name, None
            else:
                future = self._ask(name, fetch)
                if future.done():
                    self.hits += 1
                else:
                    self.misses += 1
        if future is not None:
            return future.result()
        try:
            return path.read_bytes()
        except FileNotFoundError:  # somebody emptied the folder
            with self._guard:
                self._blocks.pop(name, None)
                future = self._ask(name, fetch)
            return future.result()

    def prefetch(self, name: str, fetch: Callable[[], bytes]) -> None:
        """Ask for a block without waiting for it."""
        with self._guard:
            if name not in self._blocks:
                self._ask(name, fetch)

    def report(self) -> str:
        """Hit rate and bytes fetched."""
        asked = max(1, self.hits + self.misses)
        return f"data cache: {self.hits / asked:.1%} of {asked} reads were there, {self.fetched / 1e6:.1f} MB fetched"

    def close(self) -> None:
        """Stop the threads; the blocks stay for the next run."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        os.close(self._lock_file)

    def _ask(self, name: str, fetch: Callable[[], bytes]) -> Future[bytes]:
        if name not in self._coming:
            self._coming[name] = self._pool.submit(self._load, name, fetch)
        return self._coming[name]

    def _load(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        try:
            data = _persist(fetch)
            temporary = self._folder / f"{name}.tmp"
            temporary.write_bytes(data)
            os.replace(temporary, self._folder / name)
        finally:
            with self._guard:
                self._coming.pop(name, None)
        with self._guard:
            self.fetched += len(data)
            self._blocks[name] = len(data)
            while sum(self._blocks.values()) > self.limit and len(self._blocks) > 1:
                old, _ = self._blocks.popitem(last=False)
                (self._folder / old).unlink(missing_ok=True)
        return data


class RemoteFile:
    """A remote file, read by position through a `Cache`. Its version is checked when it is opened."""

    def __init__(self, url: str, cache: Cache) -> None:
        self._system, self._path = filesystem(url)
        try:
            self.size = int(self._system.info(self._path)["size"])
            version = version_of(self._system, self._path)
        except FileNotFoundError:
            raise ValueError(f"{url} does not exist; data.paths holds prefixes of .bin/.idx pairs.") from None
        self.path, self._cache = url, cache
        self._key = hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:32]

    def pread(self, count: int, at: int) -> bytes:
        """At most ``count`` bytes from ``at`` on."""
        count = min(count, self.size - at)
        parts = []
        for block in self.blocks(at, at + count):
            data = self._cache.read(self._name(block), self._fetch(block))
            low = block * self._cache.block_bytes
            parts.append(data[max(0, at - low) : at + count - low])
        return b"".join(parts)

    def prefetch(self, start: int, stop: int) -> None:
        """Ask for the blocks of bytes [start, stop)."""
        for block in self.blocks(start, min(stop, self.size)):
            self._cache.prefetch(self._name(block), self._fetch(block))

    def blocks(self, start: int, stop: int) -> Iterable[int]:
        """Numbers of the blocks that hold bytes [start, stop)."""
        size = self._cache.block_bytes
        return range(start // size, -(-stop // size)) if stop > start else ()

    def _name(self, block: int) -> str:
        return f"{self._key}-{block}.block"

    def _fetch(self, block: int) -> Callable[[], bytes]:
        low = block * self._cache.block_bytes
        high = min(self.size, low + self._cache.block_bytes)

        def fetch() -> bytes:
            data: bytes = self._system.cat_file(self._path, start=low, end=high)
            if len(data) != high - low:
                raise OSError(f"{self.path} gave {len(data)} bytes of a block of {high - low}")
            return data

        return fetch


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it; ValueError when it, or the protocol's driver, is missing."""
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        return system, path
    except ImportError as error:
        raise ValueError(
            f"{url} needs {error}: pip install 'megapre[stream]' and the driver of its protocol."
        ) from None
    except ValueError as error:
        raise ValueError(f"{url} is no file system that fsspec knows ({error}).") from None


def version_of(system: Any, path: str) -> str:
    """Size and what else tells one version of a file from the next; never taken from a listing kept in memory."""
    system.invalidate_cache()
    info = system.info(path)
    marks = [info.get(key) for key in ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created")]
    return " ".join(str(mark) for mark in marks)


def _persist(fetch: Callable[[], bytes]) -> bytes:
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except (OSError, TimeoutError):
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(0.1 * 4**attempt)
    raise AssertionError


def _own_folder(root: Path) -> tuple[Path, int]:
    """The first folder of ``root`` that no living process holds, with its lock."""
    for number in range(1 << 16):
        folder = root / f"blocks-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder, lock
        except OSError:
            os.close(lock)
    raise OSError(f"{root} has no free folder")
