"""Environment variables that must stand before torch is loaded: threads, allocators, CUDA and NCCL.

Large temporaries come and go each step. glibc maps and unmaps each of them, which costs a page fault per
4 KiB; the settings here keep them in the heap, on huge pages.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"

DEVICE = {
    # A single hardware queue keeps compute and communication in the order in which they were issued, so that
    # tensor-parallel collectives start before the GEMM that hides them.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_DEBUG": "WARN",
    # Segments that grow instead of fragmenting, as activations of different sizes come and go.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""What GPUs need, unless the user set it; without a GPU nothing reads them."""
SHOWN = ("CUDA_", "NCCL_", "GLOO_", "PYTORCH_", "TORCH_NCCL_", "OMP_", "MASTER_", "GLIBC_TUNABLES")
"""Beginnings of the names that a run prints."""


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
    """Set in ``env`` what ranks inherit: threads, allocators, and loopback alone when one host holds all."""
    env["OMP_NUM_THREADS"] = str(threads)
    for name, value in DEVICE.items():
        env.setdefault(name, value)
    if "NCCL_SOCKET_IFNAME" in env:  # rank 0's address and NCCL's traffic share an interface
        env.setdefault("GLOO_SOCKET_IFNAME", env["NCCL_SOCKET_IFNAME"])
    if uses_glibc():
        env.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    if single_host and Path("/sys/class/net/lo").exists():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")


def shown(env: Mapping[str, str]) -> str:
    """The variables that decide where and how ranks compute and communicate, in one line."""
    return " ".join(f"{name}={env[name]}" for name in sorted(env) if name.startswith(SHOWN))


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
