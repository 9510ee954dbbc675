"""Crafted files are refused in a sentence: no code runs, nothing is written elsewhere, memory stays bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 300
"""MiB that reading one may take: a block of text, its longest line, a chunk of a shard."""


def test_crafted_files_run_no_code_and_take_no_memory(tmp_path: Path) -> None:
    """`hostile.CASES`, under an audit hook and a limit on memory, in a process of their own."""
    command = [sys.executable, "-m", "tests.faults.hostile", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) >= 20, done.stderr
    for row in rows:
        assert row["outcome"].startswith("refused: ") and not row["events"] and not row["new"], row
        assert row["mib"] < MOST and row["seconds"] < 60, row
    assert not list(tmp_path.rglob("pwned")) and not Path("/tmp/megapre-escaped").exists()


def test_the_guard_notices_what_it_is_there_for(tmp_path: Path) -> None:
    """The same process with a reader that unpickles: the hook sees it."""
    code = (
        "import sys; from pathlib import Path; from tests.faults import hostile as h; import pickle\n"
        "def evil(folder):\n"
        "    (folder / 'x').write_bytes(pickle.dumps(h.Payload(folder / 'pwned')))\n"
        "    return lambda: pickle.loads((folder / 'x').read_bytes())\n"
        "def outside(folder):\n"
        "    return lambda: open(folder.parent / 'escaped', 'w').write('x')\n"
        "h.CASES = {'evil': evil, 'outside': outside}\n"
        "h.main(Path(sys.argv[1]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    evil, outside = map(json.loads, done.stdout.splitlines())
    assert any("pickle.find_class" in event for event in evil["events"]) and evil["new"], done.stderr
    assert any("escaped" in event for event in outside["events"])
