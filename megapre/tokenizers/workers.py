"""Worker processes that take pieces one at a time and are replaced when their memory has grown.

The caches of the fastest tokenizers know no bound; a new process is cheaper than a limit inside them. Processes start
as copies of this one, with the tokenizer read already; under MPI, which does not bear that, as copies of a server.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

RECYCLE = 170 << 20
"""Resident bytes that a worker may gain; above, it is replaced once its piece is done."""


class WorkerError(RuntimeError):
    """A worker was killed or failed in a way that is no fault of the input."""


class Worker:
    """One process and the pipe to it."""

    def __init__(self, target: Callable[..., Any], setup: Any, crew: Sequence[Worker], method: str) -> None:
        context: Any = get_context(method)
        self.pipe, theirs = context.Pipe()
        # A copied process holds our ends of all pipes: closed there, or no worker would see us die.
        ours = [worker.pipe for worker in [*crew, self]] if method == "fork" else []
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, target, setup, ours), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()
        self.item: Any = None

    def give(self, item: Any) -> None:
        """Hand over a piece."""
        self.item = item
        self.pipe.send(item)

    def stop(self, *, kill: bool = False) -> None:
        """End the process and wait for it."""
        if kill:
            self.process.kill()
        self.pipe.close()
        self.process.join()


def run(
    make: Callable[[Any], Callable[[Any, Callable[[Any], None]], Any]],
    setup: Any,
    items: Sequence[Any],
    workers: int,
    progress: Callable[[Any], None],
    method: str = "fork",
) -> Iterator[tuple[Any, Any]]:
    """(item, result) of every item, as they finish: ``make(setup)`` gives the function of an item.

    The function gets a second argument, through which it may report progress. With 0 workers it runs here. ``method``
    is how processes start: "fork" calls ``make`` once and here, "forkserver" in each. Raises what the function raised,
    and WorkerError when a process is killed.
    """
    if workers == 0:
        work = make(setup)
        for item in items:
            yield item, work(item, progress)
        return
    if method == "fork":
        make, setup = _given, make(setup)
    waiting = deque(items)
    crew: list[Worker] = []
    try:
        while waiting or crew:
            while waiting and len(crew) < workers:
                crew.append(Worker(make, setup, crew, method))
                crew[-1].give(waiting.popleft())
            ready = {id(pipe) for pipe in wait([worker.pipe for worker in crew])}
            for worker in [worker for worker in crew if id(worker.pipe) in ready]:
                kind, value, grown = _receive(worker)
                if kind == "progress":
                    progress(value)
                    continue
                if kind == "error":
                    raise value
                item = worker.item
                if grown > RECYCLE or not waiting:
                    crew.remove(worker)
                    worker.stop()
                else:
                    worker.give(waiting.popleft())
                yield item, value
    finally:
        for worker in crew:
            worker.stop(kill=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """What starts here tokenizes by one thread: the processes are the parallelism, and a fork loses threads."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _given(work: Any) -> Any:
    return work


def _receive(worker: Worker) -> tuple[str, Any, int]:
    try:
        message: tuple[str, Any, int] = worker.pipe.recv()
        return message
    except EOFError:
        worker.process.join()
        code = worker.process.exitcode or 0
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise WorkerError(f"a worker {cause}; what is finished is kept, so run the same command again.") from None


def _serve(pipe: Connection, make: Callable[[Any], Any], setup: Any, inherited: Sequence[Connection]) -> None:
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work, before = make(setup), resident()
        while True:
            item = pipe.recv()
            pipe.send(("done", work(item, lambda value: pipe.send(("progress", value, 0))), resident() - before))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as error:
        pipe.send(("error", error, 0))


def resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
