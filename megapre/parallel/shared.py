"""Collectives between ranks of one host, on CPU tensors, through memory that all of them have mapped.

gloo sends every byte through a socket, even to the next core. Here a rank writes into a region that its peers have
mapped, and they read it there, at several times the bandwidth (``benchmarks/collectives.py``). An axis takes part when
all its ranks are on one host; messages between two ranks, other axes and sums of other types stay with gloo. Sums are
taken in the order of the ranks, in fp32 for bf16, so they do not depend on timing.

A region is an anonymous file (memfd), gone with its last process, whatever happens. ``csrc/host/shared.cpp`` has the
protocol.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megapre.parallel.comm import Axis, Work
from megapre.parallel.grid import Grid

LIBRARY = Path(__file__).resolve().parent.parent / "_host.so"
SLOT = 1 << 20
"""Bytes that a rank hands over at a time; large enough that waiting for each other does not count."""
SPINS = 2000
"""How often a rank with a core of its own looks at a counter before it sleeps: some 100 microseconds."""
TOKEN = 16
"""Random bytes at the end of a region, by which a peer knows that it has opened the right one."""
BYTES = 0
"""The type of what is moved as it is; the others are those that can be summed, as shared.cpp numbers them."""
KINDS = {"all_reduce": 0, "all_gather": 1, "reduce_scatter": 2}
TYPES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.int32: 4, torch.int64: 5}
REDUCTIONS = {"sum": 0, "max": 1, "min": 2}


@lru_cache(maxsize=1)
def library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """The native half, or None where it is not built or the system has no memfd: then gloo does all."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        found = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        found.megapre_shared_bytes.argtypes = [size]
        found.megapre_shared_bytes.restype = size
        found.megapre_shared_open.argtypes = [number, number, pointer, pointer, size, ctypes.c_double, number]
        found.megapre_shared_open.restype = pointer
        found.megapre_shared_post.argtypes = [pointer, number, number, number, pointer, pointer, size]
        found.megapre_shared_post.restype = size
        found.megapre_shared_post_all_to_all.argtypes = [pointer, pointer, pointer, pointer, pointer, number]
        found.megapre_shared_post_all_to_all.restype = size
        found.megapre_shared_wait.argtypes = [pointer, size, ctypes.POINTER(ctypes.c_double)]
        found.megapre_shared_wait.restype = number
        found.megapre_shared_close.argtypes = [pointer]
        found.megapre_shared_close.restype = None
    except (OSError, AttributeError):
        return None
    return found


class Memory:
    """This rank's file, with one region for each of ``axes`` axes, and what it has opened of its neighbours' files.

    All of it lives as long as the channels that work on it.
    """

    def __init__(self, found: ctypes.CDLL, axes: int) -> None:
        page = mmap.PAGESIZE
        self.stride = -(-found.megapre_shared_bytes(SLOT) // page) * page
        self._size = axes * self.stride + TOKEN
        self._token = os.urandom(TOKEN)
        self.file = os.memfd_create("megapre")
        os.ftruncate(self.file, self._size)
        os.pwrite(self.file, self._token, axes * self.stride)
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1)  # held while the channels live: by it the others know
        self._files = [self.file]
        self._maps: list[mmap.mmap] = []
        self.address = self._map(self.file)
        weakref.finalize(self, _close, self._files)

    def card(self, host: str) -> str:
        """What another rank needs in order to open this file."""
        return f"{host} {os.getpid()} {self.file} {self._token.hex()}"

    def open(self, card: str) -> tuple[int, int] | None:
        """(address, descriptor) of a neighbour's file; None where it cannot be opened or is another one."""
        _, pid, number, token = card.split()
        try:
            file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
            self._files.append(file)
            right = os.pread(file, TOKEN + 1, self._size - TOKEN) == bytes.fromhex(token)
            return (self._map(file), file) if right else None
        except OSError:
            return None

    def _map(self, file: int) -> int:
        self._maps.append(mmap.mmap(file, self._size))
        return ctypes.addressof(ctypes.c_char.from_buffer(self._maps[-1]))


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


class Channel:
    """One axis's operations, in the order of posting; its thread ends when it is collected."""

    def __init__(
        self, found: ctypes.CDLL, name: str, rank: int, memory: Memory, regions: Sequence[tuple[int, int]],
        timeout: float, spins: int,
    ) -> None:  # fmt: skip
        size = len(regions)
        addresses, files = zip(*regions)
        self.name, self._size, self._library, self._memory = name, size, found, memory
        self._handle = found.megapre_shared_open(
            rank, size, (ctypes.c_void_p * size)(*addresses), (ctypes.c_int * size)(*files), SLOT, timeout, spins
        )
        self._ended = ctypes.c_double()
        self._held: deque[tuple[int, tuple[Tensor, ...]]] = deque()
        weakref.finalize(self, found.megapre_shared_close, self._handle)

    def post(self, kind: str, dtype: int, op: str, output: Tensor, tensor: Tensor, count: int) -> Posted:
        """Post an operation; ``output`` and ``tensor`` are kept until it has ended."""
        ticket = self._library.megapre_shared_post(
            self._handle, KINDS[kind], dtype, REDUCTIONS[op], *self._addresses(kind, output, tensor), count
        )
        return self._posted(kind, ticket, output, tensor)

    def post_all_to_all(self, output: Tensor, tensor: Tensor, received: Sequence[int], sent: Sequence[int]) -> Posted:
        """Post an all-to-all of the bytes given for each rank; tensors are kept until it has ended."""
        size, array = self._size, ctypes.c_int64 * self._size
        addresses = self._addresses("all_to_all", output, tensor)
        ticket = self._library.megapre_shared_post_all_to_all(
            self._handle, *addresses, array(*sent), array(*received), size
        )
        return self._posted("all_to_all", ticket, output, tensor)

    def _addresses(self, kind: str, *tensors: Tensor) -> list[int]:
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise ValueError(f"{kind} over axis {self.name}: a tensor of {tuple(tensor.shape)} is not contiguous.")
        return [tensor.data_ptr() for tensor in tensors]

    def _posted(self, kind: str, ticket: int, *tensors: Tensor) -> Posted:
        self._held.append((ticket, tensors))
        return Posted(self, ticket, kind)

    def wait(self, ticket: int, kind: str) -> float:
        """Return when the operation has ended: the time of it. RuntimeError when a peer is gone or silent."""
        failure = self._library.megapre_shared_wait(self._handle, ticket, ctypes.byref(self._ended))
        if failure:
            what = "has ended" if failure < 0 else "did not take part in time"
            if failure > self._size:
                what = "sends another number of bytes than this rank expects"
            rank = (abs(failure) - 1) % self._size
            raise RuntimeError(f"rank {rank} of axis {self.name} {what}: its {kind} cannot be completed.")
        while self._held and self._held[0][0] <= ticket:
            self._held.popleft()
        return self._ended.value


class Posted:
    """An operation under way."""

    def __init__(self, channel: Channel, ticket: int, kind: str) -> None:
        self._channel, self._ticket, self._kind = channel, ticket, kind
        self.ended: float | None = None
        """When it, or one posted later, had ended, on time.perf_counter's clock; known after `wait`."""

    def wait(self) -> None:
        """As Work."""
        if self.ended is None:
            self.ended = self._channel.wait(self._ticket, self._kind)


class SharedAxis(Axis):
    """An axis within one host; tensors of types that are not in ``TYPES`` are summed by gloo."""

    def __init__(self, axis: Axis, channel: Channel) -> None:
        super().__init__(axis.name, axis.rank, axis.size, axis.group)
        self._channel = channel

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        if tensor.dtype not in TYPES:
            return super().all_reduce(tensor, op)
        return self._channel.post("all_reduce", TYPES[tensor.dtype], op, tensor, tensor, tensor.numel())

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        self._fits("all_gather", output, shard)
        return self._channel.post("all_gather", BYTES, "sum", output, shard, shard.nbytes)

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis."""
        if tensor.dtype not in TYPES:
            return super().reduce_scatter(shard, tensor)
        self._fits("reduce_scatter", tensor, shard)
        return self._channel.post("reduce_scatter", TYPES[tensor.dtype], "sum", shard, tensor, shard.numel())

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        every = []
        for whole, rows in ((output, received), (tensor, sent)):
            rows = rows if rows is not None else [whole.shape[0] // self.size] * self.size
            if len(rows) != self.size or sum(rows) != whole.shape[0] or min(rows) < 0:
                raise ValueError(
                    f"all_to_all over {self.size} ranks of axis {self.name}: parts of {rows} rows do not make up a "
                    f"tensor of {whole.shape[0]}."
                )
            width = prod(whole.shape[1:]) * whole.itemsize
            every.append([count * width for count in rows])
        return self._channel.post_all_to_all(output, tensor, *every)

    def _fits(self, kind: str, whole: Tensor, shard: Tensor) -> None:
        if whole.numel() != self.size * shard.numel() or whole.dtype != shard.dtype:
            raise ValueError(
                f"{kind} over {self.size} ranks of axis {self.name}: a shard of {shard.numel()} x {shard.dtype} and a "
                f"whole of {whole.numel()} x {whole.dtype} do not belong together."
            )


def host_name(node: int) -> str:
    """Equal for ranks on one host of a launch: one kernel, one network, one number among the hosts."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{node}"
    except OSError:
        return "unknown"


def share(grid: Grid, node: int, timeout: float) -> Grid:
    """``grid`` with shared memory on every axis whose ranks are all on one host; all ranks call this together.

    ``node`` is this host's number in the launch, ``timeout`` the seconds after which a peer that does not take part
    fails an operation. The axis ``host`` stays with gloo: over it all agree on who shares.
    """
    if grid.world.size == 1:
        return grid
    found = library()
    axes = {id(axis): axis for name, axis in grid.axes().items() if name != "host"}
    try:
        memory = Memory(found, len(axes)) if found is not None else None
    except OSError:  # a sandbox that has no memfd
        memory = None
    cards = grid.host.gather_text(memory.card(host_name(node)) if memory is not None else "")
    hosts = [card.partition(" ")[0] for card in cards]
    here = hosts[grid.world.rank]
    opened = {
        rank: (memory.address, memory.file) if rank == grid.world.rank else memory.open(card)
        for rank, card in enumerate(cards)
        if memory is not None and hosts[rank] == here
    }
    able = grid.host.gather_text(str(int(None not in opened.values())))
    if memory is None or found is None:
        return grid
    spins = SPINS if len(opened) * torch.get_num_threads() <= len(os.sched_getaffinity(0)) else 0
    numbers = {key: number for number, key in enumerate(axes)}

    def change(axis: Axis) -> Axis:
        if axis.size == 1 or id(axis) not in numbers:
            return axis
        members = dist.get_process_group_ranks(axis.group)
        if any(hosts[rank] != here or able[rank] != "1" for rank in members):
            return axis
        offset = numbers[id(axis)] * memory.stride
        regions = [(place[0] + offset, place[1]) for rank in members if (place := opened[rank]) is not None]
        return SharedAxis(axis, Channel(found, axis.name, axis.rank, memory, regions, timeout, spins))

    return grid.mapped(change)


def report(grid: Grid, device: torch.device) -> str:
    """Which axes go which way, in one line; empty where there is one rank or all is NCCL's."""
    if grid.world.size == 1 or device.type != "cpu":
        return ""
    ways: dict[str, list[str]] = {}
    for name, axis in grid.axes().items():
        if axis.size > 1:
            ways.setdefault("shared memory" if isinstance(axis, SharedAxis) else "gloo", []).append(name)
    said = "; ".join(f"{way} over {', '.join(names)}" for way, names in sorted(ways.items()))
    why = "" if library() is not None else f" ({LIBRARY.name} is missing or older than its sources: `make setup`)"
    return f"messages: {said}{why}"
