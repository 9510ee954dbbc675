"""The words of a pipeline schedule: compute actions and batches of messages.

A schedule is data: for each rank of the pipeline a list of these. One executor runs it, one simulator predicts it.
A *stage* is a run of layers; a rank holds one stage, or several (chunks) under interleaved schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD, BACKWARD, WEIGHT = "F", "B", "W"


@dataclass(frozen=True)
class Compute:
    """Run one microbatch through one stage: forward (F), backward (B), or weight gradients alone (W).

    In a schedule that has W actions, B leaves the weight gradients of linear layers to them (arXiv 2401.10241).
    """

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Transfer:
    """One message: an activation going forward, or its gradient going backward."""

    send: bool
    forward: bool
    stage: int
    """The stage of this rank that makes it (send) or needs it (receive)."""
    microbatch: int
    peer: int
    """The other rank."""

    @property
    def source(self) -> int:
        """The stage that makes the message."""
        if self.send:
            return self.stage
        return self.stage - 1 if self.forward else self.stage + 1


@dataclass(frozen=True)
class Communicate:
    """Post these messages, in order, without waiting for them to arrive."""

    transfers: tuple[Transfer, ...]


Action = Compute | Communicate


def with_messages(
    compute: Sequence[Sequence[Compute]], owners: Sequence[int], *, ahead: int = 1
) -> list[list[Action]]:
    """Add to every rank's compute actions the messages that they need and make.

    ``owners[stage]`` is the rank that holds a stage. A send is posted right after its data exists. Messages from
    one rank to another share one in-order channel, so a rank posts its receives in the order in which the other
    sends, each at the latest ``ahead`` compute actions before its data is used: it travels meanwhile.
    """
    sends = [[_sends(action, owners) for action in actions] for actions in compute]
    channels: dict[tuple[int, int], list[Transfer]] = {}
    for rank, per_action in enumerate(sends):
        for transfers in per_action:
            for t in transfers:
                target = t.stage + 1 if t.forward else t.stage - 1
                channels.setdefault((rank, t.peer), []).append(Transfer(False, t.forward, target, t.microbatch, rank))
    result: list[list[Action]] = []
    for rank, actions in enumerate(compute):
        incoming = {source: list(queue) for (source, to), queue in channels.items() if to == rank}
        places = {id(t): (source, n) for source, queue in incoming.items() for n, t in enumerate(queue)}
        wanted = {(t.forward, t.stage, t.microbatch): places[id(t)] for queue in incoming.values() for t in queue}
        posted = dict.fromkeys(incoming, 0)
        lowered: list[Action] = []
        for index, action in enumerate(actions):
            receives: list[Transfer] = []
            for soon in actions[index : index + 1 + ahead]:
                source, place = wanted.get((soon.kind == FORWARD, soon.stage, soon.microbatch), (-1, -1))
                if soon.kind != WEIGHT and source >= 0:
                    receives += incoming[source][posted[source] : place + 1]
                    posted[source] = max(posted[source], place + 1)
            if receives:
                lowered.append(Communicate(tuple(receives)))
            lowered.append(action)
            if sends[rank][index]:
                lowered.append(Communicate(tuple(sends[rank][index])))
        result.append(lowered)
    return result


def _sends(action: Compute, owners: Sequence[int]) -> list[Transfer]:
    """What ``action`` makes for another rank; between two stages of one rank nothing is sent."""
    if action.kind == WEIGHT:
        return []
    forward = action.kind == FORWARD
    target = action.stage + 1 if forward else action.stage - 1
    if not 0 <= target < len(owners) or owners[target] == owners[action.stage]:
        return []
    return [Transfer(True, forward, action.stage, action.microbatch, owners[target])]
