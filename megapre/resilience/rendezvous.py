"""The store through which ranks find each other, listening only where its address says."""

from __future__ import annotations

import errno
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from megapre.resilience.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import TCPStore


def open_store(ranks: Ranks, timeout: int) -> TCPStore:
    """Connect to the store of the launch, for ``init_process_group(store=...)``; rank 0 serves it.

    torch's own server listens on every interface, and whoever reaches it may write keys. This one is bound
    to ``ranks.address`` when that is an address of this host. ``timeout`` is in seconds. Raises ValueError
    when the port is taken.
    """
    from torch.distributed import TCPStore

    wait = timedelta(seconds=timeout)
    if ranks.rank != 0:
        return TCPStore(ranks.address, ranks.port, ranks.world, is_master=False, timeout=wait)
    listener = _listen(ranks.address, ranks.port)
    if listener is None:
        return TCPStore(ranks.address, ranks.port, ranks.world, is_master=True, timeout=wait, wait_for_workers=False)
    port = listener.getsockname()[1]
    # The store closes the descriptor that it is given.
    return TCPStore(
        ranks.address,
        port,
        ranks.world,
        is_master=True,
        timeout=wait,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


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
