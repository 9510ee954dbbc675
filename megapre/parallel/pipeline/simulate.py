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
    done: dict[tuple[str, int, int], float] = field(default_factory=dict)
    """When each compute action (kind, stage, microbatch) ended."""
    spans: list[tuple[float, float, Compute]] = field(default_factory=list)


Message = tuple[bool, int, int]
"""(forward, stage that makes it, microbatch)."""


@dataclass
class _Channel:
    """Messages from one rank to another, in the order of posting on each side."""

    sends: list[tuple[Message, float]] = field(default_factory=list)
    receives: list[tuple[Message, float]] = field(default_factory=list)
    arrived: dict[Message, float] = field(default_factory=dict)
    """When each message arrived, in order."""
    last: float = 0.0

    def settle(self, latency: float, name: str) -> None:
        """Complete the messages that both sides have posted."""
        while len(self.arrived) < min(len(self.sends), len(self.receives)):
            (sent, a), (expected, b) = self.sends[len(self.arrived)], self.receives[len(self.arrived)]
            if sent != expected:
                raise ValueError(f"{name}: {_told(sent)} is sent where {_told(expected)} is received.")
            self.arrived[sent] = self.last = max(a, b) + latency


def _told(message: Message) -> str:
    forward, stage, microbatch = message
    return f"the {'activation' if forward else 'gradient'} of microbatch {microbatch} from stage {stage}"


Cost = float | Sequence[float]
"""The cost of one kind of action: the same on every stage, or one for each."""


@dataclass
class _Network:
    """All channels, and for each message that a rank expects the channel on which it comes."""

    latency: float
    channels: dict[tuple[int, int], _Channel] = field(default_factory=dict)
    expected: dict[tuple[int, Message], _Channel] = field(default_factory=dict)

    def between(self, source: int, target: int) -> _Channel:
        return self.channels.setdefault((source, target), _Channel())

    def post(self, index: int, rank: _Rank, transfer: Transfer) -> bool:
        """Post one transfer of rank ``index``; False while its previous send on this channel is under way."""
        ends = (index, transfer.peer) if transfer.send else (transfer.peer, index)
        channel = self.between(*ends)
        message = (transfer.forward, transfer.source, transfer.microbatch)
        if transfer.send:
            if len(channel.arrived) < len(channel.sends):
                return False
            rank.clock = max(rank.clock, channel.last)
            channel.sends.append((message, rank.clock))
        else:
            channel.receives.append((message, rank.clock))
            self.expected[index, message] = channel
        channel.settle(self.latency, f"rank {ends[0]} to rank {ends[1]}")
        return True

    def input_ready(self, index: int, rank: _Rank, action: Compute) -> float | None:
        """When the action's input is there: 0 when it needs none, None when it is not known yet."""
        if action.kind == WEIGHT:
            return rank.done.get((BACKWARD, action.stage, action.microbatch))
        forward = action.kind == FORWARD
        if not forward and (FORWARD, action.stage, action.microbatch) not in rank.done:
            return None
        message = (forward, action.stage - 1 if forward else action.stage + 1, action.microbatch)
        channel = self.expected.get((index, message))
        if channel is not None:
            return channel.arrived.get(message)
        return rank.done.get((action.kind, message[1], action.microbatch), 0.0)


def simulate(
    plans: Sequence[Sequence[Action]],
    forward: Cost = 1.0,
    backward: Cost = 2.0,
    weight: Cost = 1.0,
    latency: float = 0.0,
) -> Prediction:
    """Run ``plans`` (one per rank) against a clock; raises ValueError where they deadlock or cross messages.

    ``forward``, ``backward`` and ``weight`` are the costs of F, B and W, of every stage or one for each.
    """
    ranks = [_Rank(plan) for plan in plans]
    network = _Network(latency)
    computes = [a for plan in plans for a in plan if isinstance(a, Compute)]
    stages = 1 + max((a.stage for a in computes), default=0)
    cost = {
        kind: [float(given)] * stages if isinstance(given, int | float) else list(given)
        for kind, given in ((FORWARD, forward), (BACKWARD, backward), (WEIGHT, weight))
    }
    frees = WEIGHT if any(a.kind == WEIGHT for a in computes) else BACKWARD
    progress = True
    while progress:
        progress = False
        for index, rank in enumerate(ranks):
            while rank.next < len(rank.actions) and _advance(index, rank, network, cost, frees):
                progress = True
    stuck = [f"rank {i} at {r.actions[r.next]}" for i, r in enumerate(ranks) if r.next < len(r.actions)]
    unmatched = any(len(c.sends) != len(c.receives) for c in network.channels.values())
    if stuck or unmatched:
        raise ValueError("the schedule deadlocks: " + "; ".join(stuck or ["a message has no partner"]))
    time = max(rank.clock for rank in ranks)
    busy = sum(end - start for rank in ranks for start, end, _ in rank.spans)
    return Prediction(
        time,
        1 - busy / (time * len(ranks)) if time else 0.0,
        tuple(rank.peak for rank in ranks),
        tuple(tuple(rank.spans) for rank in ranks),
    )


def _advance(index: int, rank: _Rank, network: _Network, cost: dict[str, list[float]], frees: str) -> bool:
    """Run the rank's next action (or part of one) if nothing holds it up."""
    action = rank.actions[rank.next]
    if isinstance(action, Communicate):
        if not network.post(index, rank, action.transfers[rank.part]):
            return False
        rank.part += 1
        if rank.part == len(action.transfers):
            rank.next, rank.part = rank.next + 1, 0
        return True
    ready = network.input_ready(index, rank, action)
    if ready is None:
        return False
    start = max(rank.clock, ready)
    rank.clock = start + cost[action.kind][action.stage]
    rank.spans.append((start, rank.clock, action))
    rank.done[action.kind, action.stage, action.microbatch] = rank.clock
    rank.live += (action.kind == FORWARD) - (action.kind == frees)
    rank.peak = max(rank.peak, rank.live)
    rank.next += 1
    return True
