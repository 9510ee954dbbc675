"""Saving beside the training: a copy in host memory, and a thread that writes it.

``save`` copies this rank's tensors into a buffer that was allocated before the first save, with the checksums taken
from the live tensors on the way, and returns; a thread writes the copy and owns no tensor of the run. The thread never
communicates. The ranks learn through a flag that rides on a reduction of theirs (`written`, `settle`) that all are
done; rank 0's thread then makes the checkpoint valid. One save is under way at most.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapre.checkpoint import store
from megapre.checkpoint.format import Staged, check_plain, lay_out, stage, write_rank, write_staged
from megapre.checkpoint.reshard import CheckpointError
from megapre.checkpoint.store import Sync, Ticket, together
from megapre.parallel.placement import Address

GIB = 2**30
SLACK = 64 * 1024
"""Bytes by which headers of two saves may differ (step numbers grow)."""


class Background(threading.Thread):
    """One action in a thread that no exit waits for."""

    def __init__(self, action: Callable[[], str]) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self._action = action
        self._result = ""
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Thread body."""
        try:
            self._result = self._action()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def result(self, timeout: float) -> str:
        """Its result, or its error raised; CheckpointError after ``timeout`` seconds."""
        self.join(timeout)
        if self.is_alive():
            raise CheckpointError(f"its file system has not answered for {timeout:.0f} s")
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is not None:
            raise CheckpointError(f"its writer ended with {type(self._error).__name__}") from self._error
        return self._result


@dataclass
class _Pending:
    """A save under way."""

    ticket: Ticket
    state: dict[str, Any]
    writing: Background
    blocked: float
    """Seconds that training waited for it."""
    began: float = field(default_factory=time.monotonic)
    settled: bool = False
    commit: Background | None = None
    """On rank 0; its result is what went wrong with older checkpoints."""
    told: bool = False


class Saver:
    """The checkpoints of a run, written one after the other; all methods but `written` are called by all ranks.

    ``keep`` is called on rank 0 with each checkpoint that became valid (to remove older ones), ``say`` with a line for
    the person who watches, ``unsaved`` with the failure of a save that a later one found. ``timeout`` is the longest
    wait for a file system in seconds, and must be below that of the collectives.
    """

    def __init__(
        self,
        root: Path,
        *,
        rank: int,
        world: int,
        sync: Sync,
        keep: Callable[[Path], object] = lambda path: None,
        say: Callable[[str], None] = lambda line: None,
        unsaved: Callable[[CheckpointError], None] = lambda error: None,
        timeout: float = 300.0,
    ) -> None:
        self.root, self.rank, self.world, self.sync, self.timeout = Path(root), rank, world, sync, timeout
        self._keep, self._say, self._unsaved = keep, say, unsaved
        self._buffer: Tensor | None = None
        self._pending: _Pending | None = None
        self._crowded = False

    # ------------------------------------------------------------------------------------------ host memory

    def prepare(self, pieces: Iterable[tuple[Address, Tensor]], budget: float) -> bool:
        """Allocate and touch the buffer for ``pieces``; whether saves will be asynchronous, the same on all ranks.

        ``budget`` is the GiB of host memory that a rank may use; 0 lets the ranks of a host use half of what is free
        there. When that is too little on any host, all save synchronously, and rank 0 says why.
        """
        need = lay_out(list(pieces), uuid="0" * 32, step=0, rank=self.rank, world=self.world).bytes + SLACK
        report = json.dumps([socket.gethostname(), need, free_memory()])
        hosts: dict[str, list[tuple[int, int, int]]] = {}
        for rank, text in enumerate(self.sync.gather_text(report)):
            host, wanted, free = json.loads(text)
            hosts.setdefault(host, []).append((rank, wanted, free))
        problem = _too_little(hosts, budget)
        if not problem:
            try:
                self._buffer = torch.empty(need, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
                self._buffer.zero_()  # the kernel hands out pages when they are first touched
            except (RuntimeError, MemoryError):
                problem = f"rank {self.rank} could not allocate {need / GIB:.2f} GiB"
        problems = [text for text in self.sync.gather_text(problem) if text]
        if problems:
            self._buffer = None
            self._say(f"checkpoints are saved synchronously: {problems[0]}")
        return not problems

    # ------------------------------------------------------------------------------------------ saving

    def save(self, step: int, pieces: Iterable[tuple[Address, Tensor]], state: dict[str, Any]) -> None:
        """Save ``step``: returns when training may go on, which is at once where saves are asynchronous.

        Waits for an earlier save first. Raises the same CheckpointError on every rank when a synchronous save
        fails; an asynchronous one reports in `settle` or `finish`.
        """
        began = time.monotonic()
        late = self._pending.ticket.step if self._pending else None
        try:
            self.finish()
        except CheckpointError as error:
            self._unsaved(error)
        waited = time.monotonic() - began
        if late is not None and waited > 1 and not self._crowded:
            self._crowded = True  # said once: every `saved` line tells how long training waited
            self._say(f"step {step} waited {waited:.1f} s for the save of step {late}: save less often")
        if self._buffer is None:
            path = store.save(self.root, step, pieces, state, rank=self.rank, world=self.world, sync=self.sync)
            if self.rank == 0:
                self._say(f"saved {path} (training waited {time.monotonic() - began:.2f} s)")
                self._say_problem(self._keep_only(path))
            return
        state = copy.deepcopy(state)  # it is written at the end, when training has moved on
        ticket = store.agree(self.root, step, self.rank, self.world, self.sync)
        writing = self._start(ticket, list(pieces), state)
        self._pending = _Pending(ticket, state, writing, time.monotonic() - began)

    def _start(self, ticket: Ticket, pieces: list[tuple[Address, Tensor]], state: dict[str, Any]) -> Background:
        """Stage and start to write; whatever fails becomes this rank's answer in `settle`."""
        assert self._buffer is not None
        staged: Staged | None = None
        error: Exception | None = None
        late = ""
        try:
            check_plain(state, "state")
            ticket.open()
            plan = lay_out(pieces, **ticket.place)
            if plan.bytes <= len(self._buffer):
                staged = stage(plan, self._buffer.numpy().data)
            else:  # the run's tensors have grown: correct, if slow
                late = write_rank(ticket.partial, pieces, **ticket.place)
        except Exception as failure:
            error = failure

        def write() -> str:
            if error is not None:
                raise error
            return write_staged(ticket.partial, staged) if staged else late

        return Background(write)

    def written(self) -> int:
        """Step of the save whose files this rank has written and that is not settled yet; -1 for none."""
        self._report()
        pending = self._pending
        if pending is None or pending.settled or pending.writing.is_alive():
            return -1
        return pending.ticket.step

    def settle(self, step: int) -> None:
        """Exchange the digests of the save of ``step``, if it is under way; rank 0's thread then makes it valid.

        Waits for what is still being written, so call it when every rank's `written` told the step. Raises the same
        CheckpointError on every rank when one of them failed.
        """
        pending = self._pending
        if pending is None or pending.settled or pending.ticket.step != step:
            return
        try:
            digests = together(lambda: pending.writing.result(self.timeout), self.sync)
        except CheckpointError:
            self._pending = None
            pending.ticket.withdraw()
            raise
        pending.settled = True

        def commit() -> str:
            pending.ticket.commit(digests, pending.state)
            return self._keep_only(pending.ticket.final)

        if self.rank == 0:
            pending.commit = Background(commit)

    def finish(self) -> None:
        """Return when no save is under way. Raises the same CheckpointError on every rank when it failed."""
        if self._pending is None:
            return
        self.settle(self._pending.ticket.step)
        pending, self._pending = self._pending, None
        try:
            together(lambda: pending.commit.result(self.timeout) if pending.commit else "", self.sync)
        except CheckpointError:
            pending.ticket.withdraw()
            raise
        self._done(pending)

    def _report(self) -> None:
        """Rank 0 speaks of a save as soon as it is valid; of a failed one in `finish`, as all ranks must."""
        pending = self._pending
        if pending is None or pending.commit is None or pending.commit.is_alive():
            return
        try:
            pending.commit.result(0)
        except Exception:
            return
        self._done(pending)

    def _done(self, pending: _Pending) -> None:
        if pending.commit is None or pending.told:
            return
        pending.told = True
        took = time.monotonic() - pending.began
        self._say(f"saved {pending.ticket.final} (training waited {pending.blocked:.2f} s, written in {took:.2f} s)")
        self._say_problem(pending.commit.result(0))

    def _keep_only(self, path: Path) -> str:
        """Remove what is not to be kept beside ``path``; what goes wrong, since the save itself has succeeded."""
        try:
            self._keep(path)
        except (OSError, CheckpointError) as error:
            return f"old checkpoints were not removed: {error}"
        return ""

    def _say_problem(self, problem: str) -> None:
        if problem:
            self._say(problem)


def _too_little(hosts: dict[str, list[tuple[int, int, int]]], budget: float) -> str:
    """Why the hosts' ranks, as (rank, bytes needed, bytes free), may not stage; empty when they may."""
    for host, ranks in hosts.items():
        rank, need, _ = max(ranks, key=lambda found: found[1])
        if budget and need > budget * GIB:
            return f"rank {rank} needs {need / GIB:.2f} GiB of host memory and checkpoint.host_memory is {budget:g}"
        total, free = sum(need for _, need, _ in ranks), min(free for _, _, free in ranks)
        if not budget and total > free // 2:
            return (
                f"the ranks of {host} need {total / GIB:.2f} GiB of host memory, more than half of the "
                f"{free / GIB:.2f} GiB that are free: set checkpoint.host_memory to allow it"
            )
    return ""


def free_memory() -> int:
    """Bytes of memory that this host, or the container around it, can still give."""
    free = 2**62
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        pass  # no Linux, or no such file in this kernel: what was found until then
    return max(0, free)
