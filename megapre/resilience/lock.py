"""One run per folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapre.checkpoint.store import Sync


@contextmanager
def run_lock(run_dir: Path, rank: int, sync: Sync) -> Iterator[None]:
    """Hold ``run_dir/lock`` on rank 0. ValueError on all ranks when another run, here or on another host, holds it.

    A file system without locks (some network mounts) lets every run pass.
    """
    problem, descriptor = "", -1
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                problem = f"{run_dir} is in use by {holder}: end that run or set another train.run_dir"
    try:
        problem = sync.broadcast_text(problem if rank == 0 else None)
        if problem:
            raise ValueError(problem)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)
