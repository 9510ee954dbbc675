"""Signals that ask a run to stop: they set a flag, and the run saves and ends with exit code 75.

Imports no torch, so that the handlers stand before the seconds that importing torch takes: a SIGUSR1 in
those seconds would otherwise end the process.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Preemption (SIGTERM), the warning before a time limit (SIGUSR1) and Ctrl-C (SIGINT)."""


class StopRequest:
    """A flag that SIGTERM, SIGUSR1 or one Ctrl-C sets and ``requested()`` tells the training loop once a step."""

    def __init__(self) -> None:
        self._signal = 0
        self._interrupts = 0

    def install(self) -> StopRequest:
        """Take the stop signals from here on, those sent while they were blocked included."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal != 0

    @property
    def reason(self) -> str:
        """Name of the first signal, such as ``SIGUSR1``; empty when none came."""
        return signal.Signals(self._signal).name if self._signal else ""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        # A second Ctrl-C is a person who will not wait for the checkpoint; a second SIGTERM is routine, as
        # a scheduler signals every process of a job and the supervisor forwards its own besides.
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
