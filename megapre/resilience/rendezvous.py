"""The stores through which ranks, and the agents of several hosts, find each other: they listen where told alone."""

from __future__ import annotations

import errno
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from megapre.resilience.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters


def open_store(ranks: Ranks, timeout: int) -> TCPStore:
    """Connect to the store of the launch, for ``init_process_group(store=...)``; rank 0 serves it.

    torch's own server listens on every interface, and whoever reaches it may write keys. This one is bound
    to ``ranks.address`` when that is an address of this host. ``timeout`` is in seconds. Raises ValueError
    when the port is taken.
    """
    return _open(ranks.address, ranks.port, ranks.world, ranks.rank == 0, timeout)


def _open(address: str, port: int, world: int, serves: bool, timeout: int) -> TCPStore:
    from torch.distributed import TCPStore

    wait = timedelta(seconds=timeout)
    if not serves:
        return TCPStore(address, port, world, is_master=False, timeout=wait)
    listener = _listen(address, port)
    if listener is None:
        return TCPStore(address, port, world, is_master=True, timeout=wait, wait_for_workers=False)
    port = listener.getsockname()[1]
    # The store closes the descriptor that it is given.
    descriptor = listener.detach()
    return TCPStore(
        address, port, world, is_master=True, timeout=wait, wait_for_workers=False, master_listen_fd=descriptor
    )


BACKEND = "megapre"
"""Name under which torch's launcher knows `meeting`."""


def meeting(parameters: RendezvousParameters) -> RendezvousHandler:
    """torch's rendezvous of agents over a store of ours; its own ``c10d`` backend listens on every interface.

    Options: ``is_host``, whether this agent serves the store; ``join_timeout``, the seconds that it waits for the other
    agents. ValueError when the port is taken.
    """
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    class Backend(C10dRendezvousBackend):
        """Under the name that was asked for, as torch demands."""

        @property
        def name(self) -> str:
            return BACKEND

    address, _, port = parameters.endpoint.rpartition(":")
    wait, serves = parameters.get_as_int("join_timeout") or 600, bool(parameters.get_as_bool("is_host"))
    store = _open(address.strip("[]"), int(port), parameters.max_nodes, serves, wait)
    store.set_timeout(timedelta(seconds=60))  # of a question, once all are there
    return create_handler(store, Backend(store, parameters.run_id), parameters)


def _listen(address: str, port: int) -> socket.socket | None:
    """A socket bound to ``address`` alone; None when that is no address of this host (NAT)."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise ValueError(f"MASTER_ADDR={address} is unknown to this host ({error.strerror})") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE or isinstance(error, PermissionError):
            raise ValueError(f"port {port} of {address} cannot be used ({error.strerror}): set MASTER_PORT") from None
        return None
