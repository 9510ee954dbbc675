"""Predict a schedule without running it: time, bubble, activations in flight, and whether it can deadlock.

The model is the strict one of NCCL: a message completes only when both sides have posted it (rendezvous), each
pair of stages has one first-in-first-out channel per direction, and a stage does not post a message while its
previous one in that channel is under way (the executor keeps one activation, not many, alive for sending).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, WEIGHT, Action, Communicate, Compute, Transfer


@dataclass(frozen=True)
class Prediction:
    """What a schedule costs."""

    time: float
    """Makespan, in the unit of the given costs."""
    bubble: float
    """Share of all ranks' time in which they do not compute."""
    in_flight: tuple[int, ...]
    """Per rank, the most microbatch-stages whose forward has run and whose last backward action (B, or W) has not."""
    spans: tuple[tuple[tuple[float, float, Compute], ...], ...]
    """Per rank, (start, end, action) of every compute action."""


@dataclass
class _Rank:
    actions: Sequence[Action]
    next: int = 0
    """Index of the action to run."""
    part: int = 0
    """Index of the transfer inside a batch."""
    clock: float = 0.0
    live: int = 0
    peak: int = 0
    done: dict[Compute, float] = field(default_factory=dict)
    """When each compute action ended."""
    spans: list[tuple[float, float, Compute]] = field(default_factory=list)


Message = tuple[bool, int, int]
"""(forward, stage that makes it, microbatch)."""


@dataclass
class _Channel:
    """Messages from one rank to another, in the order of posting on each side."""

    sends: list[tuple[Message, float]] = field(default_factory=list)
    receives: list[tuple[Message, float]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)

    def settle(self, latency: float, name: str) -> None:
        """Complete the messages that both sides have posted."""
        while len(self.arrived) < min(len(self.sends), len(self.receives)):
            (sent, a), (expected, b) = self.sends[len(self.arrived)], self.receives[len(self.arrived)]
            if sent != expected:
                raise ValueError(f"{name}: {_told(sent)} is sent where {_told(expected)} is received.")
            self.arrived.append(max(a, b) + latency)


def _told(message: Message) -> str:
    forward, stage, microbatch = message
    return f"the {'activation' if forward else 'gradient'} of microbatch {microbatch} from stage {stage}"


def simulate(
    plans: Sequence[Sequence[Action]],
    forward: float = 1.0,
    backward: float = 2.0,
    weight: float = 1.0,
    latency: float = 0.0,
) -> Prediction:
    """Run ``plans`` (one per rank) against a clock; raises ValueError where they deadlock or cross messages.

    ``forward``, ``backward`` and ``weight`` are the costs of F, B and W on one stage.
    """
    ranks = [_Rank(plan) for plan in plans]
    channels: dict[tuple[int, int], _Channel] = {}
    cost = {FORWARD: forward, BACKWARD: backward, WEIGHT: weight}
    split = any(isinstance(a, Compute) and a.kind == WEIGHT for plan in plans for a in plan)
    frees = WEIGHT if split else BACKWARD
    progress = True
    while progress:
        progress = False
        for index, rank in enumerate(ranks):
            while rank.next < len(rank.actions) and _advance(index, rank, channels, cost, frees):
                progress = True
            for (source, target), channel in channels.items():
                channel.settle(latency, f"rank {source} to rank {target}")
    stuck = [f"rank {i} at {r.actions[r.next]}" for i, r in enumerate(ranks) if r.next < len(r.actions)]
    unmatched = any(len(c.sends) != len(c.receives) for c in channels.values())
    if stuck or unmatched:
        raise ValueError("the schedule deadlocks: " + "; ".join(stuck or ["a message has no partner"]))
    time = max(rank.clock for rank in ranks)
    busy = sum(end - start for rank in ranks for start, end, _ in rank.spans)
    return Prediction(
        time,
        1 - busy / (time * len(ranks)),
        tuple(rank.peak for rank in ranks),
        tuple(tuple(rank.spans) for rank in ranks),
    )


def _advance(
    index: int, rank: _Rank, channels: dict[tuple[int, int], _Channel], cost: dict[str, float], frees: str
) -> bool:
    """Run the rank's next action (or part of one) if nothing holds it up."""
    action = rank.actions[rank.next]
    if isinstance(action, Communicate):
        if not _post(index, rank, action.transfers[rank.part], channels):
            return False
        rank.part += 1
        if rank.part == len(action.transfers):
            rank.next, rank.part = rank.next + 1, 0
        return True
    ready = _input_ready(index, rank, action, channels)
    if ready is None:
        return False
    start = max(rank.clock, ready)
    rank.clock = start + cost[action.kind]
    rank.spans.append((start, rank.clock, action))
    rank.done[action] = rank.clock
    rank.live += (action.kind == FORWARD) - (action.kind == frees)
    rank.peak = max(rank.peak, rank.live)
    rank.next += 1
    return True


def _post(index: int, rank: _Rank, transfer: Transfer, channels: dict[tuple[int, int], _Channel]) -> bool:
    key = (index, transfer.peer) if transfer.send else (transfer.peer, index)
    channel = channels.setdefault(key, _Channel())
    message = (transfer.forward, transfer.source, transfer.microbatch)
    if not transfer.send:
        channel.receives.append((message, rank.clock))
        return True
    if len(channel.arrived) < len(channel.sends):
        return False  # the previous send on this channel is under way
    rank.clock = max([rank.clock, *channel.arrived[-1:]])
    channel.sends.append((message, rank.clock))
    return True


def _input_ready(
    index: int, rank: _Rank, action: Compute, channels: dict[tuple[int, int], _Channel]
) -> float | None:
    """When the action's input is there: 0 when it needs none, None when it is not known yet."""
    if action.kind == WEIGHT:
        return rank.done.get(Compute(BACKWARD, action.stage, action.microbatch))
    forward = action.kind == FORWARD
    if not forward and Compute(FORWARD, action.stage, action.microbatch) not in rank.done:
        return None
    message = (forward, action.stage - 1 if forward else action.stage + 1, action.microbatch)
    for (_, target), channel in channels.items():
        if target == index:
            posted = [known for known, _ in channel.receives]
            if message in posted:
                place = posted.index(message)
                return channel.arrived[place] if place < len(channel.arrived) else None
    local = Compute(action.kind, message[1], action.microbatch)
    return rank.done.get(local, 0.0)
