"""The node around the GPUs: versions, cores, network cards, limits, memory, file systems."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from megapre.resilience.doctor.rows import BAD, NONE, NOTE, OK, Row
from megapre.resilience.environment import usable_cores

MIB, GIB = 2**20, 2**30
FILES = 4096
"""Open files that a rank of a large job needs: one socket a peer, and its data."""
SHARED_MEMORY = 512 * MIB
BLOCK = 4 * MIB


def version_rows() -> list[Row]:
    """Python, torch, NCCL, and whether torch was built for the driver's machine."""
    import torch

    rows = [Row("python", OK, f"{platform.python_version()} on {platform.platform()}")]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    rows.append(Row("torch", OK, f"{torch.__version__}, {built}"))
    if not torch.version.cuda:
        rows.append(Row("NCCL", NONE, "torch is built without CUDA"))
    elif not torch.cuda.is_available():
        rows.append(Row("NCCL", NONE, "torch sees no GPU"))
    else:
        rows.append(Row("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version()))))  # type: ignore[no-untyped-call]
    return rows


def core_rows(system: Path = Path("/sys")) -> list[Row]:
    """Cores that this process may use, NUMA nodes, the governor of the clock."""
    nodes = sorted(system.glob("devices/system/node/node[0-9]*"), key=lambda path: int(path.name[4:]))
    told = [f"{node.name[4:]}: {_read(node / 'cpulist')}" for node in nodes]
    rows = [Row("cores", OK, f"{usable_cores()} usable of {os.cpu_count()}; NUMA nodes {'; '.join(told) or 'unknown'}")]
    governors = {_read(path) for path in system.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")}
    if not governors:
        rows.append(Row("CPU clock", NONE, "this kernel does not steer it"))
    else:
        status = OK if governors == {"performance"} else NOTE
        rows.append(Row("CPU clock", status, f"governor {', '.join(sorted(governors))}"))
    return rows


def card_rows(system: Path = Path("/sys")) -> list[Row]:
    """InfiniBand and RoCE ports: whether each is up, how fast, on which NUMA node, how often it lost its link."""
    rows = []
    for port in sorted(system.glob("class/infiniband/*/ports/*")):
        card = port.parents[1]
        state, rate, layer = (_read(port / name) for name in ("state", "rate", "link_layer"))
        numa = _read(card / "device" / "numa_node")
        downs = _read(port / "counters" / "link_downed")
        down = "ACTIVE" not in state
        text = f"{state.partition(': ')[2] or state}, {rate}, {layer or 'unknown layer'}, NUMA node {numa or '?'}"
        flapped = downs.isdigit() and int(downs) > 0
        if flapped:
            text += f", link lost {downs} times"
        # A card may have a port that nobody plugged in: only one that is cabled and dead is a fault.
        unplugged = "Disabled" in _read(port / "phys_state") or "Polling" in _read(port / "phys_state")
        status = (NOTE if unplugged else BAD) if down else NOTE if flapped else OK
        rows.append(Row(f"NIC {card.name}/{port.name}", status, text))
    return rows or [Row("NICs", NONE, "no InfiniBand or RoCE card")]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def limit_rows(system: Path = Path("/sys"), shared: Path = Path("/dev/shm")) -> list[Row]:
    """ulimits that end or slow a run, and the size of /dev/shm."""
    rows = []
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= FILES
    rows.append(Row("ulimit -n", OK if enough else BAD, f"{_limit(files)} open files, at most {_limit(hard)}"
                    + ("" if enough else f": raise it to {FILES}")))  # fmt: skip
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    cards = any(system.glob("class/infiniband/*"))
    pinned = locked == resource.RLIM_INFINITY
    rows.append(
        Row("ulimit -l", OK if pinned or not cards else BAD, f"{_limit(locked)} bytes of locked memory"
            + ("" if pinned or not cards else ": RDMA needs unlimited"))
    )  # fmt: skip
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows.append(Row("ulimit -f", OK if size == resource.RLIM_INFINITY else BAD, f"files of {_limit(size)} bytes"))
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    rows.append(Row("ulimit -c", OK, f"core files of {_limit(core)} bytes"))
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        status = OK if free >= SHARED_MEMORY else BAD
        more = "" if status == OK else f": {SHARED_MEMORY // MIB} MiB are needed (docker run --shm-size)"
        rows.append(Row("/dev/shm", status, f"{free / MIB:,.0f} MiB free{more}"))
    return rows


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def memory_rows(info: Path = Path("/proc/meminfo")) -> list[Row]:
    """Free host memory, and memory modules whose errors the kernel counted."""
    fields = dict(line.split(":", 1) for line in _read(info).splitlines() if ":" in line)
    free, total = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    rows = [Row("memory", OK if free > total // 4 else NOTE, f"{free / GIB:.1f} of {total / GIB:.1f} GiB available")]
    return rows


def ecc_rows(system: Path = Path("/sys")) -> list[Row]:
    """Errors of the host's own memory, as the kernel's EDAC counts them."""
    controllers = sorted(system.glob("devices/system/edac/mc/mc[0-9]*"))
    if not controllers:
        return [Row("host ECC", NONE, "no memory controller reports to this kernel")]
    lost, mended = (sum(int(_read(path / name) or 0) for path in controllers) for name in ("ue_count", "ce_count"))
    status = BAD if lost else NOTE if mended else OK
    return [Row("host ECC", status, f"{lost} uncorrectable and {mended} corrected errors since the start")]


def clock_rows() -> list[Row]:
    """Whether the system clock is kept right: logs of several nodes are compared by it."""

    class Timex(ctypes.Structure):
        """Room for the kernel's struct timex; modes 0 only reads."""

        _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_char * 252))

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "adjtimex"):
        return [Row("clock", NONE, "this system has no adjtimex")]
    state = libc.adjtimex(ctypes.byref(Timex()))
    right = state != 5  # TIME_ERROR
    return [Row("clock", OK if right else NOTE, "synchronised" if right else "not synchronised with a time server")]


def space_rows(folder: Path, needed: int) -> list[Row]:
    """Free space where a run writes; ``needed`` bytes are what its checkpoints take (0: unknown)."""
    usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
    text = f"{usage.free / GIB:,.1f} GiB free in {folder}"
    if needed:
        text += f"; the job's checkpoints take {needed / GIB:,.1f} GiB"
    full = usage.free < max(needed, GIB // 4) or (inodes.f_files and inodes.f_favail < 1000)
    return [Row("free space", BAD if full else OK, text)]


def disk_rows(folder: Path, mib: int, least: tuple[float, float] = (0.0, 0.0)) -> list[Row]:
    """Write and read ``mib`` MiB in ``folder``; slower than ``least`` (write, read in MiB/s) refuses the node.

    One file, fsync counted in, pages dropped before it is read. The file is removed.
    """
    path = folder / f".doctor-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    data = mmap.mmap(-1, BLOCK)
    data.write(os.urandom(BLOCK))
    try:
        began = time.monotonic()
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            written = sum(_chunks(descriptor, data, mib, began))
            os.fsync(descriptor)
            wrote = written / MIB / (time.monotonic() - began)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(descriptor, 0, os.SEEK_SET)
            began, got = time.monotonic(), 0
            while part := os.readv(descriptor, [data]):
                got += part
            read = got / MIB / (time.monotonic() - began)
        finally:
            os.close(descriptor)
            path.unlink()
    except OSError as error:
        return [Row("file system", BAD, f"{folder} cannot be written and read: {error.strerror}")]
    if got != written:
        return [Row("file system", BAD, f"{folder} gave {got} of {written} bytes back")]
    return [
        Row(name, BAD if rate < low else OK, f"{rate:,.0f} MiB/s in {folder}" + (f", wanted {low:g}" if low else ""))
        for name, rate, low in (("write rate", wrote, least[0]), ("read rate", read, least[1]))
    ]


def _chunks(descriptor: int, data: mmap.mmap, mib: int, began: float) -> Iterator[int]:
    """Write up to ``mib`` MiB, or what fits into 10 s."""
    for _ in range(max(1, mib * MIB // BLOCK)):
        yield os.write(descriptor, data)
        if time.monotonic() - began > 10:
            return
