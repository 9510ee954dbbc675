"""Stragglers: how long each rank computes by itself, compared with the ranks that do the same work.

A synchronous step takes as long on every rank as on the slowest. What tells them apart is the time that a rank does not
spend waiting for peers: the step's time less that of ``Work.wait`` (on a GPU less what its stream waits, by events).
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from types import FrameType

import torch

from megapre.parallel.comm import Axis, Work
from megapre.parallel.grid import Grid
from megapre.resilience.hang import phase_of

WINDOW = 8
"""Steps between comparisons of the ranks' medians. A rank is named when two windows in a row find it slow."""
SLOW = 1.15
"""Times as long as its peers' median: the least that makes a rank a straggler."""
SLOWER = 1.5
"""Times as long as its own best window: for a rank whose work no other rank does."""
SAMPLE = 0.02
"""Seconds between looks at what a suspect does."""
LEAST = 1e-3
"""Seconds a step: shorter ones are noise."""


Event = torch.cuda.Event
Lap = tuple[Event, Event, list[tuple[Event, Event]]]
"""Begin and end of a step, and of every wait in it."""


class Waits:
    """Adds up what this rank waits for its peers, and so what a step takes without it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._waited = 0.0
        self._since = time.perf_counter()
        self._events: list[tuple[Event, Event]] = []
        self._mark = self._now() if self._cuda else None
        self._lap: Lap | None = None

    def around(self, work: Work) -> Work:
        """``work`` whose wait is counted."""
        return TimedWork(work, self)

    def wait(self, work: Work) -> object:
        """Wait and count it."""
        if self._cuda:
            before = self._now()
            result = work.wait()
            self._events.append((before, self._now()))
            return result
        began = time.perf_counter()
        result = work.wait()
        self._waited += time.perf_counter() - began
        return result

    def lap(self) -> float | None:
        """Seconds that this rank worked for itself since the last call.

        On a GPU those before the last call, None at first: what was queued by then has ended by now, so nobody waits.
        """
        if self._cuda:
            assert self._mark is not None
            ended, self._lap = self._lap, (self._mark, self._now(), self._events)
            self._mark, self._events = self._lap[1], []
            if ended is None:
                return None
            first, last, events = ended
            last.synchronize()
            waited = sum(before.elapsed_time(after) for before, after in events)
            return (first.elapsed_time(last) - waited) / 1e3
        now_s = time.perf_counter()
        own, self._since, self._waited = now_s - self._since - self._waited, now_s, 0.0
        return own

    @staticmethod
    def _now() -> Event:
        event = Event(enable_timing=True)
        event.record()
        return event


class TimedWork:
    """Work whose wait is counted."""

    def __init__(self, work: Work, waits: Waits) -> None:
        self.work, self._waits = work, waits

    def wait(self) -> object:
        """As Work."""
        return self._waits.wait(self.work)


class Pace:
    """Compares the ranks every `WINDOW` steps; all ranks call `step` together."""

    def __init__(self, grid: Grid, waits: Waits, say: Callable[[str], None]) -> None:
        self._host: Axis = grid.host
        self._stage, self._waits, self._say = grid.pipeline.rank, waits, say
        self._laps: deque[float] = deque(maxlen=WINDOW)
        self._best: dict[int, float] = {}
        self._suspects: set[int] = set()
        self._named: set[int] = set()
        self._sampler: Sampler | None = None

    def step(self, index: int) -> None:
        """Count step ``index``, compare when a window is full."""
        if self._host.size == 1:
            return
        own = self._waits.lap()
        if own is None:
            return
        self._laps.append(own)
        if len(self._laps) < WINDOW:
            return
        mine = torch.tensor([float(self._stage), statistics.median(self._laps)], dtype=torch.float64)
        every = mine.new_empty(2 * self._host.size)
        self._host.all_gather(every, mine).wait()
        self._laps.clear()
        found = slow([(int(stage), own) for stage, own in every.view(-1, 2).tolist()], self._best)
        sure = {rank: told for rank, told in found.items() if rank in self._suspects and rank not in self._named}
        seen = self.close()
        if sure:
            doing = self._host.gather_text(seen)
            for rank, told in sure.items():
                where = f", mostly in {doing[rank]}" if doing[rank] else ""
                self._say(f"step {index + 1}: rank {rank} is slow: {told}{where}")
        self._suspects = set(found)
        self._named = (self._named | set(sure)) & set(found)  # one that was well again is told anew
        if self._host.rank in self._suspects - self._named:
            self._sampler = Sampler()

    def close(self) -> str:
        """Look no longer at what this rank does, if it is a suspect; what it did mostly."""
        sampler, self._sampler = self._sampler, None
        return sampler.stop() if sampler else ""


def slow(laps: list[tuple[int, float]], best: dict[int, float]) -> dict[int, str]:
    """Ranks that are slow, each with how much, of every rank's (pipeline stage, own seconds a step).

    Ranks of one stage have the same work: they are compared with the lower median of their stage. ``best`` holds the
    least of each rank so far, which a rank without peers is compared with.
    """
    found = {}
    for rank, (stage, own) in enumerate(laps):
        peers = sorted(lap for s, lap in laps if s == stage)
        best[rank] = min(best.get(rank, own), own)
        alone = len(peers) == 1
        usual = best[rank] if alone else peers[(len(peers) - 1) // 2]
        if own > (SLOWER if alone else SLOW) * usual and own - usual > LEAST:
            whom = "its own best" if alone else f"the median of the {len(peers)} ranks of its stage"
            found[rank] = f"{own * 1e3:.0f} ms a step for itself, {own / usual:.2f} times {whom}"
    return found


class Sampler:
    """Looks at the stack of the main thread, which makes it, until `stop`.

    A timer's signal has the thread look at itself between two of its instructions: the frames of a thread that runs on
    meanwhile cannot be walked from another one without the risk of reading freed memory.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._last = time.monotonic()
        self._before = signal.signal(signal.SIGALRM, self._look)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, SAMPLE, SAMPLE)

    def _look(self, _: int, frame: FrameType | None) -> None:
        frames = []
        while frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        now, before = time.monotonic(), self._last
        self._last = now
        self._seen[phase_of(frames)] += round(1e6 * (now - before))  # a call into C is interrupted at its end alone

    def stop(self) -> str:
        """The phase it was seen in longest but for waiting; empty when it was seen in none."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before or signal.SIG_DFL)
        self._seen.pop("collective", None)
        return self._seen.most_common(1)[0][0] if self._seen else ""
