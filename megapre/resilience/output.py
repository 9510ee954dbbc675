"""What the ranks of a host print: shown as before, kept whole in one log per node, its end kept for each rank.

Every rank writes into a pipe of its own that the supervisor holds open, so what native code wrote before a rank died is
there too. A rank whose output is a terminal keeps that: a progress bar needs it.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import threading
from collections import deque
from pathlib import Path

TAIL = 20
"""Last lines of a rank that are kept for the event log."""
STREAMS = (1, 2)
"""stdout and stderr."""
PIPE = 1 << 20
"""Bytes that a rank may be ahead of its supervisor."""


def pipe(folder: str | Path, slot: int, stream: int) -> Path:
    """The pipe of one rank's stdout (1) or stderr (2)."""
    return Path(folder, f"output_{slot}_{stream}")


def redirect(folder: str | Path, slot: int) -> None:
    """Let this rank write into its pipes from here on."""
    for stream in STREAMS:
        if pipe(folder, slot, stream).exists() and not os.isatty(stream):
            descriptor = os.open(pipe(folder, slot, stream), os.O_WRONLY)
            os.dup2(descriptor, stream)
            os.close(descriptor)


class Outputs(threading.Thread):
    """The supervisor's end of the pipes."""

    def __init__(self, folder: str | Path, slots: int, log: Path | None = None) -> None:
        """Make the pipes of ``slots`` ranks; all that comes is appended to the file ``log``."""
        super().__init__(name="rank-output", daemon=True)
        self._tails = [deque[bytes](maxlen=TAIL) for _ in range(slots)]
        self._rest = {(slot, stream): b"" for slot in range(slots) for stream in STREAMS}
        self._open: dict[int, tuple[int, int]] = {}
        self._finished = threading.Event()
        self._log = -1
        if log is not None:
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                print(f"megapre: {log} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        for place in self._rest:
            os.mkfifo(pipe(folder, *place), 0o600)
            # For reading and writing: it never ends, however many ranks come and go.
            descriptor = os.open(pipe(folder, *place), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.fcntl(descriptor, 1031, PIPE)  # F_SETPIPE_SZ
            except OSError:
                pass  # more than this user's pipes may hold: the usual size does, too
            self._open[descriptor] = place

    def run(self) -> None:
        """Thread body."""
        while not self._finished.is_set():
            ready, _, _ = select.select(list(self._open), [], [], 0.2)
            for descriptor in ready:
                self._forward(descriptor)

    def finish(self) -> None:
        """Show what is left, and stop."""
        self._finished.set()
        self.join()
        for descriptor, (_, stream) in self._open.items():
            while self._forward(descriptor):
                pass
            for target in (stream, self._log):  # a line that never ended
                self._write(target, self._rest[self._open[descriptor]])
            os.close(descriptor)
        if self._log >= 0:
            os.close(self._log)

    def tail(self, slot: int) -> list[str]:
        """The last lines of a rank."""
        return [line.decode(errors="replace") for line in list(self._tails[slot])]

    def _forward(self, descriptor: int) -> bool:
        """Pass on what waits in a pipe; whether there was anything."""
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:
            return False
        slot, stream = self._open[descriptor]
        # Whole lines only: ranks write at the same time.
        *lines, self._rest[slot, stream] = (self._rest[slot, stream] + data).split(b"\n")
        if len(self._rest[slot, stream]) > PIPE:
            lines, self._rest[slot, stream] = [*lines, self._rest[slot, stream]], b""
        if lines:
            self._tails[slot].extend(lines)
            text = b"\n".join(lines) + b"\n"
            for target in (stream, self._log):
                self._write(target, text)
        return bool(data)

    def _write(self, target: int, text: bytes) -> None:
        while text and target >= 0:
            try:
                text = text[os.write(target, text) :]
            except BlockingIOError:
                select.select([], [target], [], 1.0)
            except OSError:
                return  # a closed terminal or a full disk is no reason to stop the run
