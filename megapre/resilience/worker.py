"""What the launcher wraps around each rank, and the small shared board between ranks and supervisor."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import megapre
from megapre.config.check import ConfigError, RunError
from megapre.resilience.output import redirect
from megapre.resilience.pulse import PulseFile

DONE, FAILED, BAD_JOB, STOPPED = 0, 1, 2, 75
"""Exit codes: done, failed, refused job, stopped early with a checkpoint (requeue me)."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Board:
    """Memory shared by a supervisor and its ranks, of one launch and all its restarts."""

    pids: Any
    """int64 per local rank: its process id, 0 before it runs."""
    returned: Any
    """int8 per local rank: 1 once it has returned its code and waits for the agent to collect it."""
    stop: Any
    """int32: number of the stop signal that the supervisor received, else 0."""
    refused: Any
    """int32: 1 once a rank has refused the job; a restart would refuse it again."""
    folder: str
    """Where each failing rank leaves its traceback as ``rank_R.txt``, and one asked for its stack ``stack_R.txt``."""
    restarts: int
    """Restarts in a row that may begin where the attempt before began."""

    @classmethod
    def create(cls, context: Any, local_world: int, folder: str, restarts: int = 3) -> Board:
        """An empty board in memory that processes of the ``multiprocessing`` context can share."""
        return cls(
            context.RawArray("q", local_world),
            context.RawArray("b", local_world),
            context.RawValue("i", 0),
            context.RawValue("i", 0),
            folder,
            restarts,
        )

    @property
    def pulse(self) -> Path:
        """The file of `PulseFile`."""
        return Path(self.folder, "pulse")

    def stack(self, slot: int) -> Path:
        """Where a rank writes its stack on SIGUSR2."""
        return Path(self.folder, f"stack_{slot}.txt")


def is_refusal(error: BaseException) -> bool:
    """Whether an error is a sentence of ours for the user rather than a defect.

    True for `ConfigError` and for a plain ValueError raised by megapre's own code; a ValueError out of torch
    or numpy is a defect and keeps its traceback.
    """
    if isinstance(error, ConfigError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(megapre.__file__).parent
    return type(error) is ValueError and bool(frames) and package in Path(frames[-1].filename).parents


def sentence(error: BaseException) -> str:
    """What the user is told of an error that needs no traceback, "" for a defect."""
    return f"megapre: {error}" if isinstance(error, RunError) or is_refusal(error) else ""


def run(target: Callable[[list[str]], int], argv: list[str], board: Board) -> int:
    """Run ``target(argv)`` as one rank and return its exit code; a crash ends the process with code 1.

    The stop signals are blocked on entry (see `launcher`); ``target`` unblocks them by installing a
    `StopRequest`, and receives then what came before.
    """
    rank, slot = os.environ["RANK"], int(os.environ["LOCAL_RANK"])
    _die_with_supervisor()
    redirect(board.folder, slot)
    board.returned[slot] = 0
    pulse = PulseFile(board.pulse)
    pulse.clear(slot)
    # Written by a handler in C, which needs no interpreter; it must stand before anybody knows this process.
    stack = open(board.stack(slot), "a")
    faulthandler.register(signal.SIGUSR2, file=stack, all_threads=False)
    board.pids[slot] = os.getpid()
    if board.stop.value:
        os.kill(os.getpid(), board.stop.value)
    if board.refused.value:
        return _returned(board, slot, BAD_JOB)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    fruitless = pulse.fruitless(restarts)
    if restarts and rank == "0":
        text = f"restart {fruitless} of {board.restarts}" + (f", {restarts} in all" if restarts > fruitless else "")
        if fruitless > board.restarts:
            text = f"{fruitless} attempts in a row began at the same step: giving up (resilience.max_restarts)"
        print(f"megapre: {text}", file=sys.stderr, flush=True)
    if fruitless > board.restarts:
        return _returned(board, slot, FAILED)
    try:
        code = target(argv)
    except BaseException as error:
        text = f"{sentence(error)}\n" if sentence(error) else traceback.format_exc()
        left = Path(board.folder, f"rank_{rank}.txt")
        left.write_text(text, encoding="utf-8", errors="replace")
        now = time.monotonic_ns()  # the supervisor asks which rank was the first: the wall clock may have jumped
        os.utime(left, ns=(now, now))
        if is_refusal(error):
            return _returned(board, slot, BAD_JOB)
        # Destructors of process groups can wait for peers that are waiting for this one.
        sys.stdout.flush()
        os._exit(FAILED)
    return _returned(board, slot, code)


def _returned(board: Board, slot: int, code: int) -> int:
    if code == BAD_JOB:
        board.refused.value = 1
    board.returned[slot] = 1
    return code


def _die_with_supervisor() -> None:
    """No orphans: end this rank when the fork server or the supervisor is gone, whatever killed it.

    The kernel watches the fork server, our parent. The supervisor is no parent of ours, so a thread watches
    the pipe that it holds open.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        return
    sentinel = supervisor.sentinel

    def watch() -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()
