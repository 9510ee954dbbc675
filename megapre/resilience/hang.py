"""Which rank of a host has hung: silent for too long, and not because it waits for a peer."""

from __future__ import annotations

import linecache
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FACTOR = 12
"""A rank may be silent for this many times its longest silence so far: one that is 10 times slower lives."""
SETTLED = 20
"""Beats after which a rank has started; before, it may load and compile for as long as a collective may take."""
FRAME = re.compile(r'File "(.*)", line (\d+) in (\S+)')

PHASES = (
    ("data/loader.py", "", "loader"),
    ("training/trainer.py", "_write", "save"),
    ("checkpoint/", "", "save"),
    ("training/trainer.py", "evaluate", "eval"),
    ("pipeline/executor.py", "forward", "forward"),
    ("pipeline/executor.py", "backward", "backward"),
    ("pipeline/executor.py", "weight", "backward"),
    ("optim/", "", "optimizer"),
)
"""Phase of a stack: the first row, from its innermost frame outwards, whose file and function match."""


@dataclass
class Silence:
    """What is known of one rank's beats."""

    beats: int = -1
    since: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def look(self, beats: int) -> float:
        """Seconds since the last beat."""
        now = time.monotonic()
        if beats != self.beats:
            if self.beats > 0 and beats > self.beats:
                self.longest = max(self.longest, now - self.since)
            else:  # another attempt
                self.longest = 0.0
            self.beats, self.since = beats, now
        return now - self.since

    def limit(self, heartbeat: float, starting: float) -> float:
        """Seconds that it may be silent."""
        return max(heartbeat, FACTOR * self.longest) if self.beats >= SETTLED else max(heartbeat, starting)


def phase(stack: str) -> str:
    """As `phase_of`, of a stack as faulthandler writes it."""
    return phase_of([(file, int(line), function) for file, line, function in FRAME.findall(stack)])


def phase_of(frames: Sequence[tuple[str, int | None, str]]) -> str:
    """Forward, backward, loader, eval, save, optimizer or start; ``collective`` when it waits for peers.

    ``frames`` are (file, line, function), the innermost first; generated code has no line.
    """
    if not frames:
        return "an unknown phase"
    file, line, _ = frames[0]
    waits = "wait(" in linecache.getline(file, line or 0) or "distributed_c10d" in file or "parallel/comm.py" in file
    if waits:
        return "collective"
    for file, _, function in frames:
        for part, name, found in PHASES:
            if part in file and name in ("", function):
                return found
    return "start"


def state_of(pid: int) -> str:
    """The kernel's letter for a process: R, S, D, T (stopped), Z; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def culprit(
    silent: Sequence[tuple[int, int]], stack_of: Callable[[int], Path], patience: float = 2.0
) -> tuple[int, str, str] | None:
    """The first of ``silent`` ranks, as (slot, pid) by falling silence, that is to blame: (slot, phase, stack).

    A stopped rank is. Of the others the first whose stack does not wait for a peer; None when all wait: then
    whoever they wait for is on another host, and its own supervisor sees it. Every rank writes its stack from a signal
    handler in C, which needs no interpreter; a stopped one writes it when it is continued, which is done here.
    """
    stopped = [slot for slot, pid in silent if state_of(pid) in ("T", "t")]
    for slot, pid in silent:
        stack_of(slot).write_text("")
        os.kill(pid, signal.SIGUSR2)
        if slot in stopped:
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not all(stack_of(slot).read_text() for slot, _ in silent):
        time.sleep(0.05)
    stacks = {slot: stack_of(slot).read_text() for slot, _ in silent}
    for slot, _ in silent:
        if slot in stopped:
            return slot, f"{phase(stacks[slot])} (stopped by a signal)", stacks[slot]
    for slot, _ in silent:
        if phase(stacks[slot]) != "collective":
            return slot, phase(stacks[slot]), stacks[slot]
    return None
