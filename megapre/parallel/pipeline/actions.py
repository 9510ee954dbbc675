"""The words of a pipeline schedule: compute actions and batches of messages.

A schedule is data: for each stage a list of these. One executor runs it, one simulator predicts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FORWARD, BACKWARD = "F", "B"


@dataclass(frozen=True)
class Compute:
    """Run the forward (F) or backward (B) of one microbatch on this stage."""

    kind: str
    microbatch: int


@dataclass(frozen=True)
class Transfer:
    """One message: the activation of ``microbatch`` going forward, or its gradient going backward."""

    send: bool
    forward: bool
    microbatch: int
    peer: int
    """The other stage."""


@dataclass(frozen=True)
class Communicate:
    """Post these messages, in order, without waiting for them to arrive."""

    transfers: tuple[Transfer, ...]


Action = Compute | Communicate


def with_messages(compute: Iterable[Compute], stage: int, stages: int, *, ahead: int = 1) -> list[Action]:
    """Add to one stage's compute actions the messages that they need and produce.

    A receive is posted ``ahead`` compute actions before its data is used, so that it travels meanwhile; a
    send right after its data exists. Receives on one direction keep the order of the compute actions, which
    is the order in which the neighbour sends: the simulator checks that this is so.
    """
    actions = list(compute)
    result: list[Action] = []
    posted = 0
    for index, action in enumerate(actions):
        soon = actions[posted : index + 1 + ahead]
        wanted = [receive for later in soon for receive in _receives(later, stage, stages)]
        posted = max(posted, index + 1 + ahead)
        if wanted:
            result.append(Communicate(tuple(wanted)))
        result.append(action)
        sends = _sends(action, stage, stages)
        if sends:
            result.append(Communicate(tuple(sends)))
    return result


def _receives(action: Compute, stage: int, stages: int) -> list[Transfer]:
    if action.kind == FORWARD:
        return [Transfer(False, True, action.microbatch, stage - 1)] if stage > 0 else []
    return [Transfer(False, False, action.microbatch, stage + 1)] if stage < stages - 1 else []


def _sends(action: Compute, stage: int, stages: int) -> list[Transfer]:
    if action.kind == FORWARD:
        return [Transfer(True, True, action.microbatch, stage + 1)] if stage < stages - 1 else []
    return [Transfer(True, False, action.microbatch, stage - 1)] if stage > 0 else []
