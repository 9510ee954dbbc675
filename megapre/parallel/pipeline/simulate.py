"""Predict a schedule without running it: time, bubble, activations in flight, and whether it can deadlock.

The model is the strict one of NCCL: a message completes only when both sides have posted it (rendezvous), each
pair of stages has one first-in-first-out channel per direction, and a stage does not post a message while its
previous one in that channel is under way (the executor keeps one activation, not many, alive for sending).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megapre.parallel.pipeline.actions import FORWARD, Action, Communicate, Compute, Transfer


@dataclass(frozen=True)
class Prediction:
    """What a schedule costs."""

    time: float
    """Makespan, in the unit of the given costs."""
    bubble: float
    """Share of all stages' time in which they do not compute."""
    in_flight: tuple[int, ...]
    """Per stage, the most microbatches whose forward has run and whose backward has not."""
    spans: tuple[tuple[tuple[float, float, Compute], ...], ...]
    """Per stage, (start, end, action) of every compute action."""


@dataclass
class _Stage:
    actions: Sequence[Action]
    next: int = 0
    """Index of the action to run."""
    part: int = 0
    """Index of the transfer inside a batch."""
    clock: float = 0.0
    live: int = 0
    peak: int = 0
    spans: list[tuple[float, float, Compute]] = field(default_factory=list)


@dataclass
class _Channel:
    """Messages between two neighbouring stages in one direction, in the order of posting on each side."""

    sends: list[tuple[int, float]] = field(default_factory=list)
    receives: list[tuple[int, float]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)

    def settle(self, latency: float, name: str) -> None:
        """Complete the messages that both sides have posted."""
        while len(self.arrived) < min(len(self.sends), len(self.receives)):
            (sent, a), (expected, b) = self.sends[len(self.arrived)], self.receives[len(self.arrived)]
            if sent != expected:
                raise ValueError(f"{name}: microbatch {sent} is sent where microbatch {expected} is received.")
            self.arrived.append(max(a, b) + latency)


def simulate(
    plans: Sequence[Sequence[Action]], forward: float = 1.0, backward: float = 2.0, latency: float = 0.0
) -> Prediction:
    """Run ``plans`` (one per stage) against a clock; raises ValueError where they deadlock or cross messages."""
    stages = [_Stage(plan) for plan in plans]
    channels: dict[tuple[int, bool], _Channel] = {}
    cost = {FORWARD: forward}
    progress = True
    while progress:
        progress = False
        for index, stage in enumerate(stages):
            while stage.next < len(stage.actions) and _advance(index, stage, channels, cost, backward):
                progress = True
            for (source, ahead), channel in channels.items():
                channel.settle(latency, f"stage {source} sending {'forward' if ahead else 'backward'}")
    stuck = [f"stage {i} at {s.actions[s.next]}" for i, s in enumerate(stages) if s.next < len(s.actions)]
    unmatched = any(len(c.sends) != len(c.receives) for c in channels.values())
    if stuck or unmatched:
        raise ValueError("the schedule deadlocks: " + "; ".join(stuck or ["a message has no partner"]))
    time = max(stage.clock for stage in stages)
    busy = sum(end - start for stage in stages for start, end, _ in stage.spans)
    return Prediction(
        time,
        1 - busy / (time * len(stages)),
        tuple(stage.peak for stage in stages),
        tuple(tuple(stage.spans) for stage in stages),
    )


def _channel(channels: dict[tuple[int, bool], _Channel], index: int, transfer: Transfer) -> _Channel:
    source = index if transfer.send else transfer.peer
    return channels.setdefault((source, transfer.forward), _Channel())


def _advance(
    index: int, stage: _Stage, channels: dict[tuple[int, bool], _Channel], cost: dict[str, float], backward: float
) -> bool:
    """Run the stage's next action (or part of one) if nothing holds it up."""
    action = stage.actions[stage.next]
    if isinstance(action, Communicate):
        transfer = action.transfers[stage.part]
        channel = _channel(channels, index, transfer)
        if transfer.send:
            if len(channel.arrived) < len(channel.sends):
                return False  # the previous send on this channel is under way
            stage.clock = max([stage.clock, *channel.arrived[-1:]])
            channel.sends.append((transfer.microbatch, stage.clock))
        else:
            channel.receives.append((transfer.microbatch, stage.clock))
        stage.part += 1
        if stage.part == len(action.transfers):
            stage.next, stage.part = stage.next + 1, 0
        return True
    ready = _input_ready(index, action, channels)
    if ready is None:
        return False
    start = max(stage.clock, ready)
    stage.clock = start + cost.get(action.kind, backward)
    stage.spans.append((start, stage.clock, action))
    stage.live += 1 if action.kind == FORWARD else -1
    stage.peak = max(stage.peak, stage.live)
    stage.next += 1
    return True


def _input_ready(index: int, action: Compute, channels: dict[tuple[int, bool], _Channel]) -> float | None:
    """When the action's input has arrived; 0 when it needs none; None when it has not."""
    forward = action.kind == FORWARD
    channel = channels.get((index - 1 if forward else index + 1, forward))
    if channel is None:
        return 0.0
    posted = [microbatch for microbatch, _ in channel.receives]
    if action.microbatch not in posted:
        return None
    place = posted.index(action.microbatch)
    return channel.arrived[place] if place < len(channel.arrived) else None
