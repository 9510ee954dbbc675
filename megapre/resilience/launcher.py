"""Local ranks under torch's elastic agent: started from a fork server, restarted when one crashes.

Exit codes are return values here. The agent counts a process that exits with anything but 0 as failed and
restarts it, so ranks return 0 (done), 2 (refused job) or 75 (stopped with a checkpoint) and the agent
takes all three as final; only a crash is restarted.

Stop signals are blocked while the fork server starts, and it inherits that: a scheduler that signals every
process of a job would kill it otherwise, and with it the ranks. Ranks inherit it too and take the
signals once their handlers stand, so none is lost between a rank's birth and its first line.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megapre.resilience import environment, worker
from megapre.resilience.output import Outputs
from megapre.resilience.peers import Peers
from megapre.resilience.pulse import ATTEMPTS, VARIABLE, PulseFile
from megapre.resilience.ranks import LOOPBACK
from megapre.resilience.rendezvous import BACKEND, meeting
from megapre.resilience.signals import STOP_SIGNALS, StopRequest
from megapre.resilience.watch import Watch, send

if TYPE_CHECKING:
    from torch.numa.binding import NumaOptions

PRELOAD = ("torch", "torch.distributed.elastic.multiprocessing", "torch.distributed.device_mesh")
"""Modules the fork server imports once for all ranks and restarts."""


def launch(
    world: int,
    target: Callable[[list[str]], int],
    argv: list[str],
    *,
    nnodes: int = 1,
    node_rank: int = 0,
    address: str = LOOPBACK,
    port: int = 0,
    max_restarts: int = 3,
    threads: int = 0,
    preload: Sequence[str] = (),
    heartbeat: float = 0.0,
    timeout: float = 600.0,
    log: Path | None = None,
    secret: bytes = b"",
    stop: StopRequest | None = None,
) -> int:
    """Run ``target(argv)`` on this host's ``world / nnodes`` ranks and return the exit code of all.

    ``target`` is a module-level function that returns an exit code, reads its rank from torchrun's variables
    (`ranks.discover`) and installs a `StopRequest`. ``address`` and ``port`` name node 0's
    rendezvous, for ``nnodes`` > 1. The fork server imports the modules ``preload`` for all ranks; none may
    start a thread or touch a GPU. A crash is restarted, on one host up to ``max_restarts`` times in a row from the
    same step (``Pulse.resumed``), over nodes so often in all, and gives 1 then. With a ``heartbeat``, in seconds, a
    rank that hangs is ended as by a crash (`hang`); ``timeout`` bounds its start, and how long nodes wait for each
    other. Failures go to ``log/events.jsonl``, what the ranks print to ``log/node_N.log`` too.
    With a ``secret`` as well, shared by all nodes, the nodes listen to each other (`peers`), and a cut link ends the
    attempt likewise.
    ``stop`` took the stop signals until now: one that it holds is passed on to the ranks.
    SIGTERM, SIGUSR1 and a first Ctrl-C are forwarded to the ranks; a second Ctrl-C kills them and raises
    KeyboardInterrupt. Raises ValueError when ``world`` is no multiple of ``nnodes``.
    """
    if world < 1 or world % nnodes:
        raise ValueError(f"{world} ranks cannot be shared equally by {nnodes} nodes: change parallel.data or the nodes")
    local_world = world // nnodes
    environment.prepare(
        os.environ, environment.threads_per_rank(threads, local_world, os.environ), single_host=nnodes == 1
    )
    # The agent would hand its own store to the ranks, where keys of the dead attempt stop a restart (gloo).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    folder = tempfile.mkdtemp(prefix="megapre-")
    board = worker.Board.create(multiprocessing.get_context("forkserver"), local_world, folder, max_restarts)
    PulseFile(board.pulse, local_world)
    os.environ[VARIABLE] = str(board.pulse)
    before = _take_signals(board)
    if stop and stop.requested():
        board.stop.value = signal.Signals[stop.reason]
    try:
        server = _start_fork_server(preload)
        peers = _listen(node_rank, nnodes, address, port, secret, heartbeat) if nnodes > 1 and secret else None
        outputs = Outputs(folder, local_world, log / f"node_{node_rank}.log" if log else None)
        outputs.start()
        watch = Watch(
            board, node_rank * local_world,
            server=server, heartbeat=heartbeat, starting=timeout, log=log, peers=peers, outputs=outputs,
        )  # fmt: skip
        watch.start()
        try:
            return _supervise(
                target, argv, board, local_world, nnodes, node_rank, address, port, max_restarts, timeout
            )
        finally:
            watch.finish()
            outputs.finish()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)


def _listen(node: int, nodes: int, address: str, port: int, secret: bytes, heartbeat: float) -> Peers | None:
    """Heartbeats between the nodes; none, with a line that says so, where node 0 cannot listen on its address alone."""
    if not heartbeat:
        return None
    try:
        peers = Peers(node, nodes, address, port, secret, heartbeat)
    except OSError as error:
        print(f"megapre: node {node} has no heartbeats over {address}:{port} ({error.strerror})", file=sys.stderr)
        return None
    peers.start()
    return peers


def combine(codes: Iterable[int]) -> int:
    """One exit code for many ranks: a failure before a refusal before a stop before success."""
    seen = set(codes)
    if seen - {worker.DONE, worker.BAD_JOB, worker.STOPPED}:
        return worker.FAILED
    return next((code for code in (worker.BAD_JOB, worker.STOPPED) if code in seen), worker.DONE)


def _take_signals(board: worker.Board) -> dict[int, Any]:
    """Forward stop signals to the ranks on the board; returns the handlers that stood before."""
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            for pid in filter(None, board.pids):
                send(pid, signal.SIGKILL)
            raise KeyboardInterrupt
        # A rank that registers after this line finds the flag, one that did before finds the signal.
        # Ctrl-C reaches ranks from the terminal as well, so what is forwarded is a SIGTERM.
        forwarded = signal.SIGTERM if number == signal.SIGINT else number
        board.stop.value = forwarded
        for pid in filter(None, board.pids):
            send(pid, forwarded)

    return {number: signal.signal(number, forward) for number in STOP_SIGNALS}


def _start_fork_server(preload: Sequence[str]) -> int:
    """Start it, and multiprocessing's tracker, with the stop signals blocked; what arrives is delivered afterwards.

    Returns its process id.
    """
    multiprocessing.set_forkserver_preload([*PRELOAD, *preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # It inherits the mask too, and would die of a scheduler's SIGUSR1, which it does not ignore.
        resource_tracker.ensure_running()
        # Starting it unblocks SIGTERM and SIGINT, which would reach the fork server then.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before - set(STOP_SIGNALS))
    return int(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]


def _supervise(
    target: Callable[[list[str]], int],
    argv: list[str],
    board: worker.Board,
    local_world: int,
    nnodes: int,
    node_rank: int,
    address: str,
    port: int,
    max_restarts: int,
    timeout: float,
) -> int:
    """Run the elastic agent in this thread until the ranks are done or have failed too often."""
    # The end of a launch over nodes closes node 0's store under the other agents, which log a C++ stack each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Here, not above: it takes seconds, which the fork server spends importing the same in parallel.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "LOGLEVEL" not in os.environ:
        # The agent's own account of a failure is a traceback of itself; `Watch` says what happened.
        for name in ("torch.distributed.elastic", "torch.multiprocessing"):
            logging.getLogger(name).addHandler(logging.NullHandler())
            logging.getLogger(name).propagate = False
    rendezvous: dict[str, object]
    if nnodes == 1:
        # A file needs no listening socket.
        endpoint, rendezvous = str(Path(board.folder, "rendezvous")), {"store_type": "file"}
    else:
        endpoint, rendezvous = f"{address}:{port}", {"is_host": node_rank == 0, "join_timeout": int(timeout)}
        rendezvous_handler_registry.register(BACKEND, meeting)
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=local_world,
        run_id=f"megapre-{port}",
        rdzv_backend="c10d" if nnodes == 1 else BACKEND,
        rdzv_endpoint=endpoint,
        rdzv_configs=rendezvous,
        # On one host the ranks themselves count (`worker.run`): only they know whether an attempt got any further.
        max_restarts=max_restarts if nnodes > 1 else ATTEMPTS,
        start_method="forkserver",
        local_addr=_own_address(nnodes, node_rank, address, port),
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        # The stop signals stay with our handler; the agent turns these two into an end of all ranks.
        signals_to_handle="SIGHUP,SIGQUIT",
        numa_options=_binding(local_world),
    )
    try:
        return combine(elastic_launch(config, worker.run)(target, argv, board).values())
    except (ChildFailedError, SignalException):
        return worker.FAILED
    except RendezvousError as error:
        print(f"megapre: the nodes did not find each other at {endpoint} ({error})", file=sys.stderr)
        return worker.FAILED


def _binding(local_world: int) -> NumaOptions | None:
    """Bind each rank to the cores beside its GPU where a host has one GPU per rank; a CPU's ranks share the cores."""
    import torch
    from torch.numa.binding import AffinityMode, NumaOptions

    if not torch.cuda.is_available() or torch.cuda.device_count() != local_world:
        return None
    # A container may hide the topology: that costs speed, not the run.
    return NumaOptions(affinity_mode=AffinityMode.NODE, should_fall_back_if_binding_fails=True)


def _own_address(nnodes: int, node_rank: int, address: str, port: int) -> str:
    """An address of this host that the other nodes can reach: rank 0's store will listen there."""
    if nnodes == 1:
        return LOOPBACK
    if node_rank == 0:
        return address
    # Connecting a datagram socket sends nothing and picks the interface that leads to node 0.
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
