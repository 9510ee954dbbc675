"""Copies of the job's pairs on the node's own disk (``data.stage``), made once a node before the ranks open them.

A copy is named after its file and that file's version, so one that is there under its name is whole and of this
version. Nothing else is read in its place, and nothing here removes anything but a part that failed its digest.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megapre.config.schema import Config
from megapre.data import sidecar
from megapre.data.manifest import members
from megapre.data.remote import filesystem, is_remote, version_of

SUFFIXES = (".json", ".idx", ".bin")
PIECE = 4 << 20
ATTEMPTS = 3
"""Times that a copy is begun or gone on with before its error is the job's."""


class Original(NamedTuple):
    """A file of a pair as it is now."""

    path: str
    size: int
    version: str


class Stage:
    """The folder of copies of this user on this node: ``data.stage``/megapre-UID. ValueError when it cannot be one."""

    def __init__(self, place: str) -> None:
        where = os.path.expandvars(place)
        if "$" in where:
            raise ValueError(f"data.stage = {place!r} names a variable that is not set on {socket.gethostname()}.")
        self.folder = Path(where) / f"megapre-{os.getuid()}"

    def create(self) -> None:
        """Make the folder; in one like /tmp it must be ours, and no link."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.lstat()
        except OSError as error:
            raise ValueError(
                f"data.stage: {self.folder} on {socket.gethostname()} cannot be made ({error.strerror}): name another."
            ) from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ValueError(
                f"data.stage: {self.folder} on {socket.gethostname()} belongs to user {found.st_uid} with mode "
                f"{found.st_mode & 0o7777:o} where a folder that user {os.getuid()} alone writes to is needed."
            )

    def place(self, original: Original) -> Path:
        """Where the copy of a file is, or is to be."""
        stem, suffix = os.path.splitext(os.path.basename(original.path))
        name = original.path if is_remote(original.path) else os.path.abspath(original.path)
        key = hashlib.sha256(f"{name} {original.version}".encode()).hexdigest()[:16]
        return self.folder / f"{stem}-{key}{suffix}"

    def __call__(self, path: str) -> str:
        """The copy of a file when there is one, else the file itself."""
        original = look(path)
        copy = self.place(original) if original else None
        return str(copy) if original and copy and _size(copy) == original.size else path

    @contextmanager
    def alone(self, stopped: Callable[[], bool]) -> Iterator[bool]:
        """Hold the folder against other processes of the node; False when a stop was asked for while waiting."""
        lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while not stopped():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield True
                    return
                except BlockingIOError:
                    time.sleep(0.1)
            yield False
        finally:
            os.close(lock)


def stage(config: Config, stopped: Callable[[], bool], say: Callable[[str], None]) -> bool:
    """Copy what ``data.paths`` names and the node does not hold yet; the other processes of the node wait for it.

    True when all is there, False when ``stopped()`` ended it early; a later call goes on where that one stopped.
    Raises ValueError when the folder is too small, and when a file cannot be read or is not what its record says.
    """
    if not config.data.stage:
        return True
    store = Stage(config.data.stage)
    store.create()
    with store.alone(stopped) as held:
        if not held:
            return False
        prefixes = [prefix for path in config.data.paths for prefix in members(path)]
        pairs = [[found for suffix in SUFFIXES if (found := look(prefix + suffix))] for prefix in prefixes]
        files = {original.path: original for pair in pairs for original in pair}
        missing = [one for one in files.values() if _size(store.place(one)) != one.size]
        _check_space(store, files, missing)
        began = time.monotonic()
        for prefix in prefixes:
            digests = _digests(prefix)
            for suffix in SUFFIXES:
                one = files[prefix + suffix] if prefix + suffix in files else None
                if one in missing and not _persistently(store, one, digests.get(suffix), stopped):
                    return False
        if missing:
            copied, took = sum(one.size for one in missing), time.monotonic() - began
            say(
                f"data.stage: {len(missing)} of {len(files)} files, {copied / 1e9:.3g} GB, copied to {store.folder} "
                f"of {socket.gethostname()} in {took:.0f} s"
            )
    return True


def look(path: str) -> Original | None:
    """A file as it is now; None when there is none."""
    try:
        if is_remote(path):
            system, inside = filesystem(path)
            return Original(path, int(system.info(inside)["size"]), version_of(system, inside))
        found = os.stat(path)
        return Original(path, found.st_size, f"{found.st_size} {found.st_mtime_ns}")
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    """Bytes of a regular file that is no link; -1 without one."""
    try:
        found = path.lstat()
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _partial(copy: Path) -> Path:
    return copy.with_name(copy.name + ".partial")


def _check_space(store: Stage, files: dict[str, Original], missing: list[Original]) -> None:
    """Refuse before a byte is copied."""
    needed = sum(one.size - max(0, _size(_partial(store.place(one)))) for one in missing)
    disk = os.statvfs(store.folder)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise ValueError(
            f"data.stage: {store.folder} of {socket.gethostname()} has {free / 1e9:.3g} GB free, and the "
            f"{len(missing)} of {len(files)} files of data.paths that are not there yet take {needed / 1e9:.3g} GB: "
            f'make room, name another folder, or read them where they are (data.stage = "").'
        )


def _digests(prefix: str) -> dict[str, str | None]:
    """Digests of a pair by its record, as far as it has one."""
    path = prefix + ".json"
    if not is_remote(path):
        record = sidecar.read_sidecar(path)
    else:
        system, inside = filesystem(path)
        record = sidecar.parse_sidecar(path, system.cat_file(inside)) if system.exists(inside) else None
    return {".bin": record.bin_digest, ".idx": record.idx_digest} if record else {}


def _persistently(store: Stage, one: Original, digest: str | None, stopped: Callable[[], bool]) -> bool:
    """`_copy`, again after errors that may pass; ValueError in one sentence after those that do not."""
    for attempt in range(ATTEMPTS):
        try:
            return _copy(one, store.place(one), digest, stopped)
        except OSError as error:
            if attempt + 1 == ATTEMPTS or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise ValueError(
                    f"data.stage: {one.path} ({one.size / 1e9:.3g} GB) was not copied to {store.folder} of "
                    f"{socket.gethostname()} ({error.strerror or error}); what is there stays for the next attempt."
                ) from None
            time.sleep(4**attempt / 4)
    raise AssertionError


def _copy(one: Original, copy: Path, digest: str | None, stopped: Callable[[], bool]) -> bool:
    """Copy a file by blocks of its digest; whole blocks that an earlier attempt left are read, not copied, again."""
    partial = _partial(copy)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(partial, flags, 0o600), "r+b", buffering=0) as target:
        size = sidecar.BLOCK_BYTES
        kept = min(os.fstat(target.fileno()).st_size, one.size) // size if digest else 0
        blocks = {}
        for number in range(kept):
            if stopped():
                return False
            blocks[number] = sidecar.block_digest(partial, number)
        target.truncate(kept * size)
        target.seek(kept * size)
        with _open(one.path) as source:
            source.seek(kept * size)
            for number in range(kept, -(-one.size // size)):
                found, left = hashlib.sha256(), min(size, one.size - number * size)
                while left:
                    if stopped():
                        return False
                    piece = source.read(min(PIECE, left))
                    if not piece:
                        raise ValueError(f"data.stage: {one.path} ended {left} bytes early: it changed meanwhile.")
                    found.update(piece)
                    target.write(piece)
                    left -= len(piece)
                blocks[number] = found.hexdigest()
        if digest and (seen := sidecar.combine_digests(blocks)) != digest:
            partial.unlink()
            if kept:  # a spoilt part, or the file
                return _copy(one, copy, digest, stopped)
            raise ValueError(
                f"data.stage: {one.path} has digest {seen[:12]} where its record says {digest[:12]}: it was changed or "
                "damaged after it was written."
            )
        os.fsync(target.fileno())
        os.replace(partial, copy)
    return True


def _open(path: str) -> Any:
    if not is_remote(path):
        return open(path, "rb", buffering=0)
    system, inside = filesystem(path)
    return system.open(inside, "rb")
