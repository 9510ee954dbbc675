"""Ranks as threads of one process, with an exact stand-in for communication.

A proof needs what the collectives say, not how they travel: without sockets and process switches a layout costs a few
times less than over gloo, and no rank can outlive its test. Stricter than gloo: inputs are read only when the last
rank has come, so memory that was changed too early shows; calls that do not match are refused by name.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megapre.config.schema import Config
from megapre.parallel.comm import Axis, Together, Work
from megapre.parallel.grid import Grid
from megapre.resilience.connect import build_grid

PATIENCE = 60.0
"""Seconds until an operation that peers never join is called a deadlock."""


class Mismatch(RuntimeError):
    """Ranks called different operations, or one was never joined."""


@dataclass
class _Meeting:
    """One collective: what every rank handed in, and whether it has been carried out."""

    size: int
    kind: str = ""
    parts: dict[int, tuple[Tensor, Tensor, Any]] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class Hall:
    """Where the threads of one cell meet."""

    def __init__(self, turns: bool) -> None:
        self.lock = threading.Lock()
        self.turn = threading.Lock() if turns else None
        """Held by the one rank that runs: ranks that ran at once would fight for Python's lock at every operation."""
        self.meetings: dict[tuple[Any, ...], _Meeting] = {}
        self.mail: dict[tuple[Any, ...], deque[tuple[bool, Tensor, threading.Event]]] = {}
        self.problem: BaseException | None = None

    def fail(self, problem: BaseException) -> None:
        """Wake all who wait: a rank has raised."""
        with self.lock:
            self.problem = self.problem or problem
            waiting = [m.done for m in self.meetings.values()] + [e for box in self.mail.values() for _, _, e in box]
        for event in waiting:
            event.set()

    def join(self, key: tuple[Any, ...], size: int, rank: int, kind: str, part: tuple[Tensor, Tensor, Any]) -> Work:
        """Hand in ``part`` of the collective ``key``; the last rank to come carries it out for all."""
        with self.lock:
            meeting = self.meetings.setdefault(key, _Meeting(size, kind))
            if meeting.kind != kind:
                raise Mismatch(f"rank {rank} of {key[0]} calls {kind} where another calls {meeting.kind}")
            meeting.parts[rank] = part
            last = len(meeting.parts) == size
            if last:
                del self.meetings[key]
        if last:
            with torch.no_grad():
                COLLECTIVES[kind.split("/")[0]]([meeting.parts[r] for r in range(size)])
            meeting.parts.clear()
            meeting.done.set()
        return _Waiting(self, meeting.done, f"{kind} on {key[0]}")

    def post(self, key: tuple[Any, ...], sending: bool, tensor: Tensor) -> Work:
        """Meet the other side of a message; whoever comes second copies."""
        with self.lock:
            box = self.mail.setdefault(key, deque())
            if not box or box[0][0] == sending:
                event = threading.Event()
                box.append((sending, tensor, event))
            else:
                _, other, event = box.popleft()
                source, target = (tensor, other) if sending else (other, tensor)
                if source.shape != target.shape or source.dtype != target.dtype:
                    raise Mismatch(f"{source.dtype} {tuple(source.shape)} is sent, {tuple(target.shape)} received")
                with torch.no_grad():
                    target.copy_(source)
                event.set()
        return _Waiting(self, event, f"message {key}")


class _Waiting:
    def __init__(self, hall: Hall, event: threading.Event, what: str) -> None:
        self.hall, self.event, self.what = hall, event, what

    def wait(self) -> None:
        """Return when the operation has been carried out; Mismatch when it never is."""
        if not self.event.is_set():
            self._wait()
        if not self.event.is_set():
            raise Mismatch(f"{self.what}: not all ranks came in {PATIENCE:.0f} s")
        if self.hall.problem is not None:
            raise Mismatch(f"{self.what}: another rank failed")

    def _wait(self) -> None:
        """Let other ranks run until the last one has come."""
        turn = self.hall.turn
        if turn is not None:
            turn.release()
        self.event.wait(PATIENCE)
        if turn is not None:
            turn.acquire()


Parts = list[tuple[Tensor, Tensor, Any]]
"""(output, input, operation) of every rank."""


def _combined(parts: Parts) -> Tensor:
    total = parts[0][1].clone()
    for _, other, operation in parts[1:]:
        if operation == "sum":
            total += other
        else:
            total = {"max": torch.maximum, "min": torch.minimum}[operation](total, other)
    return total


def _all_reduce(parts: Parts) -> None:
    total = _combined(parts)
    for output, _, _ in parts:
        output.copy_(total)


def _all_gather(parts: Parts) -> None:
    whole = torch.cat([shard.reshape(-1) for _, shard, _ in parts])
    for output, _, _ in parts:
        output.view(-1).copy_(whole)


def _reduce_scatter(parts: Parts) -> None:
    pieces = _combined(parts).view(-1).chunk(len(parts))
    for (shard, _, _), piece in zip(parts, pieces):
        shard.view(-1).copy_(piece)


def _all_to_all(parts: Parts) -> None:
    sent = []
    for _, tensor, sizes in parts:
        rows = sizes[1] if sizes and sizes[1] is not None else [tensor.shape[0] // len(parts)] * len(parts)
        sent.append([piece.clone() for piece in tensor.split(rows)])
    for rank, (output, _, _) in enumerate(parts):
        output.copy_(torch.cat([pieces[rank] for pieces in sent]).view(output.shape))


COLLECTIVES: dict[str, Callable[[Parts], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


class ThreadAxis(Axis):
    """An axis whose ranks are threads: ``members`` are their ranks in the world."""

    def __init__(self, axis: Axis, members: tuple[int, ...], hall: Hall) -> None:
        super().__init__(axis.name, axis.rank, axis.size)
        self.members, self.hall, self.calls = members, hall, 0

    def _join(self, kind: str, output: Tensor, tensor: Tensor, operation: Any = "sum") -> Work:
        self.calls += 1
        kind = f"{kind}/{tensor.numel() if kind != 'all_to_all' else ''}"
        part = (output, tensor, operation)
        return self.hall.join((self.name, self.members, self.calls), self.size, self.rank, kind, part)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        return self._join("all_reduce", tensor, tensor, op)

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        return self._join("all_gather", output, shard)

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis."""
        return self._join("reduce_scatter", shard, tensor)

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        return self._join("all_to_all", output, tensor, (received, sent))

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis."""
        return self.hall.post((self.name, self.members, self.rank, to), True, tensor)

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        return self.hall.post((self.name, self.members, source, self.rank), False, tensor)

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        return Together([self.send(tensor, to), self.recv(received, source)])


def grids(config: Config, world: int, hall: Hall) -> list[Grid]:
    """The job's grid as each of ``world`` threads sees it: laid out by ``parallel/grid.py`` over torch's fake group."""
    return [_grid(config, rank, world, hall) for rank in range(world)]


def _grid(config: Config, rank: int, world: int, hall: Hall) -> Grid:
    if world == 1:
        return build_grid(config, torch.device("cpu"))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        grid = build_grid(config, torch.device("cpu"), host="fake")

        def threaded(axis: Axis) -> Axis:
            if axis.size == 1:
                return axis
            return ThreadAxis(axis, tuple(dist.get_process_group_ranks(axis.group)), hall)

        return grid.mapped(threaded)
    finally:
        dist.destroy_process_group()


def run(config: Config, world: int, function: Callable[..., Any], *args: Any, turns: bool = True) -> list[Any]:
    """Call ``function(grid, device, *args)`` on every rank of ``config``'s grid; the results in rank order.

    Raises what the first rank to fail has raised. With ``turns`` one rank runs until it has to wait for another, which
    is fastest; without, all run at once, as instruments with threads of their own need.
    """
    hall = Hall(turns)
    every = grids(config, world, hall)
    results: dict[int, Any] = {}
    problems: list[BaseException] = []

    def work(rank: int) -> None:
        if hall.turn is not None:
            hall.turn.acquire()
        try:
            results[rank] = function(every[rank], torch.device("cpu"), *args)
        except BaseException as problem:  # handed to the caller
            problems.append(problem)
            hall.fail(problem)
        finally:
            if hall.turn is not None:
                hall.turn.release()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return [results[rank] for rank in range(world)]
