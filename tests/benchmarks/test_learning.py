"""benchmarks/learning.py calls nothing learning that may be chance, and sees all processor time of a command."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "learning.py"
spec = importlib.util.spec_from_file_location("benchmark_learning", SCRIPT)
assert spec is not None and spec.loader is not None
learning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(learning)


@pytest.mark.parametrize(
    ("held_out", "error", "verdict"),
    [(0.60, 0.01, True), (0.60, 0.04, False), (0.685, 0.0001, False), (0.7, 0.01, False), (float("nan"), 0.0, False)],
)
def test_below_is_clear_of_chance_and_of_noise(held_out: float, error: float, verdict: bool) -> None:
    loss = {"name": "sentences", "held_out": held_out, "error": error, "chance": 0.693}
    assert learning.below(loss) == verdict
    row = {"layout": "DP=2", "steps": 1, "cpu": learning.BUDGET - 1, "wall": 900.0, "losses": [loss]}
    assert learning.good(row) == verdict and not learning.good({**row, "cpu": learning.BUDGET + 1})
    (line,) = learning.lines({"x": {**row, "cpu": learning.BUDGET + 1}})
    assert "above 360 CPU s" in line and ("not shown" in line) != verdict


def test_processor_time_of_orphans_counts() -> None:
    """What a command starts and does not wait for, as the launcher does not wait for its fork server."""
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('learning', {str(SCRIPT)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"print(module.timed([sys.executable, '-c', {leave!r}])[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) >= 0.5
