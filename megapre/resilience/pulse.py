"""What a rank shows its supervisor while it runs: a mapped file, so neither a collective nor the interpreter is asked.

A rank counts a beat whenever it hands something to an axis; the supervisor reads the counter, whatever the rank is
doing. The last operations of each rank stand beside it: a flight record that outlives the rank.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "MEGAPRE_PULSE"
"""Environment variable that names the file; set by the launcher."""
ATTEMPTS, RING, LINE = 1024, 64, 64
_HEADER = 8 * ATTEMPTS
_SLOT = 8 + RING * LINE


class PulseFile:
    """The file: for each attempt the step that it resumed from, for each rank of this host its beats and record."""

    def __init__(self, path: Path, slots: int | None = None) -> None:
        """Open the file, or create it for ``slots`` ranks."""
        self.path = path
        if slots is not None:
            path.write_bytes(struct.pack("<q", -1) * ATTEMPTS + bytes(slots * _SLOT))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def beats(self, slot: int) -> int:
        """Operations that a rank has begun."""
        return int(struct.unpack_from("<q", self._map, _HEADER + slot * _SLOT)[0])

    def flight(self, slot: int) -> list[str]:
        """The last operations of a rank, the oldest first, each with its number."""
        first = _HEADER + slot * _SLOT + 8
        lines = [self._map[first + n * LINE : first + (n + 1) * LINE] for n in range(RING)]
        texts = [line.rstrip(b"\0").decode(errors="replace") for line in lines if line.strip(b"\0")]
        return sorted(texts, key=lambda text: int(text.split()[0]))

    def clear(self, slot: int) -> None:
        """Forget a rank of an earlier attempt."""
        first = _HEADER + slot * _SLOT
        self._map[first : first + _SLOT] = bytes(_SLOT)

    def note(self, slot: int, text: str) -> None:
        """Count a beat and remember what it was."""
        first = _HEADER + slot * _SLOT
        number = self.beats(slot) + 1
        line = f"{number} {text}".encode()[: LINE - 1]
        place = first + 8 + number % RING * LINE
        self._map[place : place + LINE] = line.ljust(LINE, b"\0")
        struct.pack_into("<q", self._map, first, number)

    def resumed(self, attempt: int, step: int) -> None:
        """An attempt begins to train at ``step``."""
        if attempt < ATTEMPTS:
            struct.pack_into("<q", self._map, 8 * attempt, step)

    def fruitless(self, attempt: int) -> int:
        """Attempts just before this one that began where the last one began: restarts that led nowhere."""
        steps = struct.unpack_from(f"<{min(attempt, ATTEMPTS)}q", self._map, 0)
        return next((n for n, step in enumerate(reversed(steps)) if step != steps[-1]), len(steps))


class Pulse:
    """One rank's place in the file of its launch; does nothing where nobody watches."""

    def __init__(self, env: Mapping[str, str]) -> None:
        path = env.get(VARIABLE)
        self._file = PulseFile(Path(path)) if path and Path(path).exists() else None
        self._slot = int(env.get("LOCAL_RANK", "0"))
        self._attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))

    @property
    def watched(self) -> bool:
        """Whether a supervisor reads it."""
        return self._file is not None

    def beat(self, text: str) -> None:
        """The rank is alive and begins ``text``."""
        if self._file is not None:
            self._file.note(self._slot, text)

    def resumed(self, step: int) -> None:
        """Training begins at ``step``."""
        if self._file is not None:
            self._file.resumed(self._attempt, step)
