"""A pool of rank processes that run function after function, so that a proof of many layouts starts them once.

Processes come from a fork server with torch preloaded: a rank starts in milliseconds instead of seconds. Each
task gets its own rendezvous; a task that fails or hangs ends the pool's processes, and the next one starts anew.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from megapre.resilience.ranks import LOOPBACK, Ranks

START = "forkserver"
"""How processes come to be; ``fork`` where the parent is one thread that has loaded all they need."""
PRELOAD = ["torch", "torch.distributed", "megapre.verify.run"]


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time."""


class RankPool:
    """Up to ``size`` processes, started when first needed."""

    def __init__(self, size: int, threads: int = 1) -> None:
        self.size, self.threads = size, threads
        self._context: Any = multiprocessing.get_context(START)
        if START == "forkserver":
            self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``function(ranks, *args)`` on ``world`` ranks; returns the results in rank order.

        ``function`` is a module-level function. Raises RankError with the first rank's own traceback.
        """
        if world > self.size:
            raise ValueError(f"{world} ranks are needed, but the pool has {self.size}: raise --ranks.")
        self._start(world)
        name = f"{function.__module__}:{function.__qualname__}"
        port = free_port()
        for rank in range(world):
            ranks = Ranks(rank, world, rank, world, LOOPBACK, port)
            self._workers[rank][1].send((name, ranks, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < world:
            left: dict[Any, int] = {self._workers[rank][1]: rank for rank in range(world) if rank not in results}
            ready: list[Any] = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise RankError(f"rank {min(left.values())} of {world} gave no answer to {name} in {timeout:.0f} s")
            for connection in ready:
                rank = left[connection]
                try:
                    ok, value = connection.recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {world} in {name}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, world: int) -> None:
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self.threads), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _work(connection: Connection, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while True:
        try:
            name, ranks, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            module, function = name.split(":")
            value = getattr(importlib.import_module(module), function)(ranks, *args)
            connection.send((True, value))
            del value
            gc.collect()  # engines hold cycles, and with them their process groups and the threads of these
        except BaseException:
            connection.send((False, traceback.format_exc()))
            return
