"""The supervisor's thread: ends what is left of a failed attempt, and says once why it failed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from megapre.monitor import events
from megapre.resilience.hang import Silence, culprit
from megapre.resilience.output import Outputs
from megapre.resilience.peers import Peers
from megapre.resilience.pulse import PulseFile
from megapre.resilience.worker import Board

GRACE = 3.0
"""Seconds between the end of one rank and SIGKILL for the others."""
PATIENCE = 2.0
"""Seconds between two births of ranks, at most."""
POLL = 0.2


class Watch(threading.Thread):
    """Looks at the ranks of a `Board` until `finish`.

    The elastic agent sends SIGTERM to the survivors of a failure and SIGKILL 30 s later. SIGTERM means
    "save and stop" to a rank, which it cannot do without its peers, and nothing to one that has
    returned, so the survivors get `GRACE` seconds.
    """

    def __init__(
        self,
        board: Board,
        first_rank: int,
        *,
        server: int = 0,
        heartbeat: float = 0.0,
        starting: float = 600.0,
        log: Path | None = None,
        peers: Peers | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        """``server`` is the process id of the fork server, whose children the ranks are; 0: unknown.

        ``heartbeat`` is the least silence in seconds that makes a rank suspect, 0 for none; ``log`` a folder.
        """
        super().__init__(name="rank-watch", daemon=True)
        self._board = board
        self._first_rank = first_rank
        self._server = server
        self._born: set[int] = set()
        self._since = time.monotonic()
        self._heartbeat, self._starting, self._log = heartbeat, starting, log
        self._peers, self._outputs = peers, outputs
        self._pulse = PulseFile(board.pulse)
        self._silence = [Silence() for _ in board.pids]
        self._asked = 0.0
        self._hung: set[int] = set()
        self._finished = threading.Event()

    def run(self) -> None:
        """Thread body."""
        while not self._finished.wait(POLL):
            pids = list(self._board.pids)
            working = [pid for pid, returned in zip(pids, self._board.returned) if pid and not returned]
            if any(not alive(pid) for pid in working) or (self._board.refused.value and working):
                self._end_attempt(pids)
            elif self._lost_early(pids):
                self._end_attempt(pids, early=True)
            elif self._peers and working and (lost := self._peers.lost()):
                self._cut_off(lost, working)
            elif self._heartbeat:
                self._listen({slot: pid for slot, pid in enumerate(pids) if pid and not self._board.returned[slot]})

    def _lost_early(self, pids: list[int]) -> bool:
        """Whether a rank ended before it made itself known: its peers wait for it, and only the kernel can tell.

        It is when the fork server has fewer children than there are ranks, the same ones for `PATIENCE` seconds.
        """
        now = children(self._server)
        if now != self._born or not now or all(pids) or len(now) >= len(pids):
            self._born, self._since = now, time.monotonic()
        return time.monotonic() - self._since > PATIENCE

    def _listen(self, working: dict[int, int]) -> None:
        """End a rank that has hung, which ends the attempt: at most one look at the stacks every `heartbeat`."""
        waits = {slot: self._silence[slot].look(self._pulse.beats(slot)) for slot in working}
        over = any(
            seconds > self._silence[slot].limit(self._heartbeat, self._starting) for slot, seconds in waits.items()
        )
        if not over or time.monotonic() - self._asked < self._heartbeat:
            return
        self._asked = time.monotonic()
        longest = sorted((slot for slot in waits if waits[slot] > self._heartbeat / 2), key=lambda slot: -waits[slot])
        found = culprit([(slot, working[slot]) for slot in longest], self._board.stack)
        if found is None:
            return
        slot, phase, stack = found
        rank = self._first_rank + slot
        _say(f"megapre: rank {rank} hung for {waits[slot]:.0f} s in {phase}\n{stack}")
        self._event("hang", rank=rank, seconds=round(waits[slot], 1), phase=phase, stack=stack)
        self._hung.add(slot)
        send(working[slot], signal.SIGKILL)

    def _cut_off(self, lost: dict[int, float], working: list[int]) -> None:
        """Nodes are silent: end the attempt here, since collectives with them would wait for their timeout."""
        assert self._peers is not None
        for node, seconds in lost.items():
            _say(f"megapre: node {node} has not been heard for {seconds:.0f} s: its host is down or its link is cut\n")
            self._event("unheard", node=node, seconds=round(seconds, 1))
        self._peers.forget()
        self._hung |= {slot for slot, pid in enumerate(self._board.pids) if pid in working}
        for pid in working:
            send(pid, signal.SIGKILL)

    def _event(self, event: str, **fields: object) -> None:
        """A line of ``events.jsonl``, with the last operations and lines of each rank of this host."""
        if self._log is None:
            return
        slots = {str(self._first_rank + slot): slot for slot in range(len(self._silence))}
        flight = {rank: self._pulse.flight(slot) for rank, slot in slots.items()}
        tails = {rank: self._outputs.tail(slot) for rank, slot in slots.items()} if self._outputs else {}
        try:
            events.append(self._log, event, **fields, flight=flight, tails=tails)
        except OSError as error:
            _say(f"megapre: {self._log}/events.jsonl cannot be written: {error.strerror}\n")

    def finish(self) -> None:
        """Stop looking and report a failure that has not been reported yet."""
        self._finished.set()
        self.join()
        if self._peers:
            self._peers.finish()
        self._report([pid for pid in self._board.pids])

    def _end_attempt(self, pids: list[int], early: bool = False) -> None:
        nameless = children(self._server) - set(pids) if early else set()
        deadline = time.monotonic() + (0 if early else GRACE)
        while time.monotonic() < deadline and any(pid and alive(pid) for pid in pids):
            if self._finished.wait(POLL / 2):
                return
        for slot, pid in enumerate(pids):
            if pid and self._board.pids[slot] == pid and alive(pid):
                send(pid, signal.SIGKILL)
                pids[slot] = 0
                self._board.pids[slot] = 0
        for pid in nameless:
            send(pid, signal.SIGKILL)
        self._report(pids, early)

    def _report(self, pids: list[int], early: bool = False) -> None:
        """Print the oldest error once, under the lowest rank that shares it, and forget this attempt."""
        silent = []
        for slot, pid in enumerate(pids):
            if pid and not self._board.returned[slot] and not alive(pid) and self._board.pids[slot] == pid:
                self._board.pids[slot] = 0
                if not (Path(self._board.folder) / f"rank_{self._first_rank + slot}.txt").exists():
                    silent.append(self._first_rank + slot)
        hung = {self._first_rank + slot for slot in self._hung}
        self._hung.clear()
        # One headline: of a hang, it has been said, and what follows is its consequence.
        for rank in silent if not hung else ():
            self._event("killed", rank=rank)
            _say(f"megapre: rank {rank} was killed by a signal (the kernel sends one when memory runs out)\n")
        if early and not silent and not hung:
            self._event("killed", rank=None)
            _say("megapre: a rank was killed by a signal as it started (the kernel sends one when memory runs out)\n")
        files = sorted(Path(self._board.folder).glob("rank_*.txt"), key=lambda path: path.stat().st_mtime_ns)
        texts = {int(path.stem.partition("_")[2]): path.read_text(encoding="utf-8") for path in files}
        for path in files:
            path.unlink()
        # After a kill, the other ranks only report that a peer is gone.
        if texts and not silent and not hung and not early:
            first = _last_line(next(iter(texts.values())))
            sharing = [rank for rank, text in texts.items() if _last_line(text) == first]
            text = texts[min(sharing)]
            self._event("failed", rank=min(sharing), ranks=sharing, error=first)
            _say(text if text.startswith("megapre: ") else f"megapre: rank {min(sharing)} failed\n{text}")


def children(pid: int) -> set[int]:
    """Processes whose parent a process is, those of all its threads."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found.update(map(int, path.read_text().split()))
        except OSError:
            continue  # the thread has ended meanwhile
    return found


def alive(pid: int) -> bool:
    """Whether process ``pid`` exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
