"""``RUN_DIR/log/events.jsonl``: what happened to a run, one line of JSON each; ranks and supervisors append."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path


def append(folder: Path, event: str, **fields: object) -> None:
    """Add a line with the time (Unix, seconds) and the host to ``folder/events.jsonl``; OSError when it cannot be."""
    line = json.dumps({"time": time.time(), "host": socket.gethostname(), "event": event, **fields})
    folder.mkdir(parents=True, exist_ok=True)
    # One write, at the end: lines of several hosts do not mix.
    file = os.open(folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)
