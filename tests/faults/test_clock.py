"""A wall clock that jumps changes nothing: time is measured by monotonic clocks, and the newest is the highest step."""

from __future__ import annotations

import ast
import json
import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest

import megapre
from megapre.verify.pool import RankPool
from tests.faults.chaos import Run

DAY = 86_400
STAMPS = {
    ("monitor/events.py", "append"), ("monitor/sinks.py", "write"), ("monitor/sinks.py", "event"),
    ("resilience/memory.py", "snapshot"),
}  # fmt: skip
"""Functions that write the time of day for people; nobody reads it back."""


def of_the_wall(path: Path) -> set[str]:
    """Functions of a file that ask for the time of day."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    "time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "time.localtime", "datetime.today",
                ):  # fmt: skip
                    found.add(function.name)
    return found


def test_nothing_is_decided_by_the_time_of_day() -> None:
    root = Path(megapre.__file__).parent
    asks = {(str(path.relative_to(root)), name) for path in root.rglob("*.py") for name in of_the_wall(path)}
    assert asks == STAMPS


@pytest.mark.nightly
def test_jumps_of_days_cost_no_step_and_no_restart(tmp_path: Path, pool: RankPool) -> None:
    """Every process of a launch under a clock that is set back and forth, then a kill, then a stop."""
    library, clock = tmp_path / "clock.so", tmp_path / "clock"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    clock.write_bytes(struct.pack("q", 0))

    def jump(seconds: int) -> None:
        with clock.open("r+b") as file:
            file.write(struct.pack("q", seconds))

    job = Run(tmp_path / "job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("WALL_CLOCK", str(clock))
        job.start()
    try:
        job.until(lambda: job.lines() > 10)
        for seconds in (-DAY, DAY, -7200, 30 * DAY):
            jump(seconds)
            job.more(10)
        saved = job.newest()
        os.kill(job.ranks()[0], signal.SIGKILL)
        jump(-5 * DAY)
        job.more(10)
        assert job.stop() == 75, job.tail()
    finally:
        job.close()
    rows = [json.loads(line) for line in (job.run_dir / "log" / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["start", "killed", "start", "end"], job.tail()
    assert rows[2]["step"] >= saved and rows[2]["time"] < rows[0]["time"] - 4 * DAY, "an older one was taken"
    job.equals_undisturbed(pool)
