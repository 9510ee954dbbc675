"""Where a run's time goes: spans of its phases, then a torch profiler trace, written below ``RUN_DIR/profile``.

After the warm-up some turns of the loop are timed by phase, then some are traced by torch's profiler, whose own cost
must not be in the times. A phase's time is exclusive: what happens in a phase inside it is that phase's. On a GPU spans
lie between events of the current stream, so that nothing waits for the device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMED, TRACED = 5, 2
"""Turns of the loop whose phases are timed; turns that torch's profiler records after them."""
OPS = 24
"""Operations that are listed, those with most time of their own first."""


class HostClock:
    """Seconds on the wall and of this process's CPUs."""

    def now(self) -> tuple[float, float]:
        """A mark."""
        return time.perf_counter(), time.process_time()

    def between(self, begin: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
        """Wall and CPU seconds from one mark to another."""
        return end[0] - begin[0], end[1] - begin[1]


class DeviceClock:
    """Seconds of the current CUDA stream, which count as both."""

    def now(self) -> Any:
        """A mark."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> tuple[float, float]:
        """Seconds from one mark to another; waits for the device to reach them."""
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        return seconds, seconds


@dataclass
class Span:
    """A phase that ran from one mark to another inside another span."""

    name: str
    begin: Any
    parent: int
    end: Any = None


@dataclass
class Message:
    """A collective or a message that this rank had under way, in seconds of `time.perf_counter`."""

    name: str
    nbytes: int
    posted: float
    done: float = 0.0
    """When it was complete; where that is not told, when this rank had waited for it."""
    waited: float = 0.0


@dataclass
class Profile:
    """The profile of one rank. ``turn`` begins each turn of the loop; spans outside of the timed turns cost nothing."""

    folder: Path
    rank: int
    device_type: str
    warmup: int
    spans: list[Span] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = DeviceClock() if self.device_type == "cuda" else HostClock()
        self._seen = 0
        self._open: list[int] = []
        self._tracer: Any = None
        self._ops: list[dict[str, Any]] = []

    @property
    def timing(self) -> bool:
        """Whether phases are timed now."""
        return self.warmup < self._seen <= self.warmup + TIMED

    def span(self, name: str) -> AbstractContextManager[None]:
        """A phase, from here to the end of the block."""
        if self.timing:
            return self._timed(name)
        return self._named(name) if self._tracer is not None else nullcontext()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        index, parent = len(self.spans), self._open[-1] if self._open else -1
        self.spans.append(Span(name, self.clock.now(), parent))
        self._open.append(index)
        try:
            yield
        finally:
            self._open.remove(index)
            self.spans[index].end = self.clock.now()

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        import torch

        with torch.profiler.record_function(name):
            yield

    def message(self, name: str, nbytes: int) -> Message | None:
        """A collective that is about to be posted; None where nothing is timed."""
        if not self.timing:
            return None
        self.messages.append(Message(name, nbytes, time.perf_counter()))
        return self.messages[-1]

    def turn(self) -> None:
        """The loop begins a turn."""
        self._seen += 1
        if self.timing or self._seen == self.warmup + TIMED + 1:
            self.turns.append(self.clock.now())
        if self._seen == self.warmup + TIMED + 1:
            self._trace()
        elif self._seen == self.warmup + TIMED + 1 + TRACED:
            self._stop()

    def _trace(self) -> None:
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device_type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._tracer = torch.profiler.profile(activities=kinds)
        self._tracer.__enter__()

    def _stop(self) -> None:
        if self._tracer is None:
            return
        self._tracer.__exit__(None, None, None)
        tracer, self._tracer = self._tracer, None
        self.folder.mkdir(parents=True, exist_ok=True)
        tracer.export_chrome_trace(str(self.folder / f"trace_{self.rank}.json"))
        own = "self_device_time_total" if self.device_type == "cuda" else "self_cpu_time_total"
        rows = sorted(tracer.key_averages(), key=lambda row: -getattr(row, own))
        self._ops = [
            {"name": row.key, "calls": row.count / TRACED, "seconds": getattr(row, own) / 1e6 / TRACED}
            for row in rows[:OPS]
        ]

    def finish(self) -> list[str]:
        """Write what was seen, also of a run that ended early; the lines to show, none when no turn was timed."""
        self._stop()
        if len(self.turns) < 2:
            whole = self.warmup + TIMED + TRACED + 1
            return [f"no profile: it takes {self.warmup + 2} steps, and {whole} with a trace"]
        found = self.summary()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"phases_{self.rank}.json").write_text(json.dumps(found, indent=1) + "\n")
        return [*table(found), f"profile: {self.folder}"]

    def summary(self) -> dict[str, Any]:
        """Seconds a step of every phase, bytes and waits of every collective, and the spans themselves."""
        last = self.turns[-1]
        count = len(self.turns) - 1
        wall, cpu = self.clock.between(self.turns[0], last)
        closed = [(n, span) for n, span in enumerate(self.spans) if span.end is not None]
        own = {n: list(self.clock.between(span.begin, span.end)) for n, span in closed}
        whole = {n: tuple(times) for n, times in own.items()}
        for n, span in closed:
            if span.parent in own:
                own[span.parent] = [a - b for a, b in zip(own[span.parent], whole[n])]
        phases: dict[str, dict[str, float]] = {}
        for n, span in closed:
            phase = phases.setdefault(span.name, {"wall": 0.0, "cpu": 0.0, "calls": 0.0})
            phase["wall"] += own[n][0] / count
            phase["cpu"] += own[n][1] / count
            phase["calls"] += 1 / count
        rest = [total / count - sum(p[key] for p in phases.values()) for total, key in ((wall, "wall"), (cpu, "cpu"))]
        phases["the loop"] = {"wall": rest[0], "cpu": rest[1], "calls": 1.0}
        collectives: dict[str, dict[str, float]] = {}
        for message in self.messages:
            kind = collectives.setdefault(message.name, dict.fromkeys(("calls", "bytes", "under_way", "waited"), 0.0))
            kind["calls"] += 1 / count
            kind["bytes"] += message.nbytes / count
            kind["under_way"] += max(0.0, message.done - message.posted) / count
            kind["waited"] += message.waited / count
        lanes = [[s.name, self._since(s.begin), self._since(s.end)] for _, s in closed]
        sent = [[m.name, m.nbytes, *(x - self._origin() for x in (m.posted, m.done))] for m in self.messages]
        return {
            "rank": self.rank, "steps": count, "wall": wall / count, "cpu": cpu / count, "phases": phases,
            "collectives": collectives, "ops": self._ops, "spans": lanes, "messages": sent,
            "turns": [self._since(turn) for turn in self.turns],
        }  # fmt: skip

    def _since(self, mark: Any) -> float:
        """Seconds since the first timed turn."""
        return self.clock.between(self.turns[0], mark)[0]

    def _origin(self) -> float:
        first = self.turns[0]
        return float(first[0]) if isinstance(first, tuple) else min(m.posted for m in self.messages)


def table(found: dict[str, Any]) -> list[str]:
    """A profile as lines of text."""
    lines = [f"profile of rank {found['rank']}, {found['steps']} steps of {1e3 * found['wall']:.1f} ms"]
    lines += [f"  {'phase':28} {'ms a step':>10} {'share':>6} {'CPU ms':>8}"]
    for name, phase in sorted(found["phases"].items(), key=lambda item: -item[1]["wall"]):
        share = phase["wall"] / found["wall"]
        lines.append(f"  {name:28} {1e3 * phase['wall']:10.2f} {share:6.1%} {1e3 * phase['cpu']:8.2f}")
    if found["collectives"]:
        lines.append(f"  {'collective':28} {'calls':>6} {'MiB':>9} {'ms waited':>10} {'ms under way':>13}")
    for name, kind in sorted(found["collectives"].items()):
        lines.append(
            f"  {name:28} {kind['calls']:6.1f} {kind['bytes'] / 2**20:9.3f} {1e3 * kind['waited']:10.2f} "
            f"{1e3 * kind['under_way']:13.2f}"
        )
    return lines
