"""Environment variables that must stand before torch is loaded: threads and the allocator.

Large temporaries come and go each step. glibc maps and unmaps each of them, which costs a page fault per
4 KiB; the settings here keep them in the heap, on huge pages.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
)


def threads_per_rank(wanted: int, local_world: int, env: Mapping[str, str]) -> int:
    """CPU threads of a rank: ``train.threads``, else OMP_NUM_THREADS, else its share of the usable cores."""
    if wanted > 0:
        return wanted
    if env.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(env["OMP_NUM_THREADS"]))
    return max(1, usable_cores() // local_world)


def usable_cores() -> int:
    """Cores this process may run on; a container's or Slurm's binding counts."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare(env: MutableMapping[str, str], threads: int, single_host: bool) -> None:
    """Set in ``env`` what ranks inherit: threads, allocator, and loopback alone when one host holds all."""
    env["OMP_NUM_THREADS"] = str(threads)
    if uses_glibc():
        env.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    if single_host and Path("/sys/class/net/lo").exists():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")


def uses_glibc() -> bool:
    """Whether this interpreter runs on glibc, which alone reads GLIBC_TUNABLES."""
    return platform.libc_ver()[0] == "glibc"


def restart_with(env: Mapping[str, str]) -> None:
    """Replace this process by the same command under ``env``; the allocator reads its settings only at exec.

    Blocked signals stay blocked and pending ones stay pending across the exec, so none is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(env))
