"""A row of the doctor's table: what was looked at, what was found, whether the node may run a job."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OK, NOTE, NONE, BAD = "ok", "note", "n/a", "BAD"
"""Fine; worth a look; does not apply to this machine or cannot be read here; the node is refused."""


@dataclass(frozen=True)
class Row:
    """One finding."""

    name: str
    status: str
    text: str
    nodes: tuple[str, ...] = ()
    """Of a refusal that ranks on several nodes found together: the nodes that it means."""


def node_name() -> str:
    """What the scheduler calls this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def guarded(name: str, look: Callable[[], Sequence[Row]]) -> list[Row]:
    """The rows of a look; one that fails is a row that says so, as a doctor must outlive what it examines."""
    try:
        return list(look())
    except Exception as error:
        return [Row(name, NOTE, f"could not be looked at: {type(error).__name__}: {error}")]
