"""The comparison with other stacks, on a tiny model: that it compares like with like, and refuses where it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "benchmarks" / "train"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """The module ``benchmarks/train/table.py``, as its scripts see it."""
    monkeypatch.syspath_prepend(str(TRAIN))
    import table

    return table


def compare(work: Path, *arguments: str, peers: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TRAIN / "run.py", "--quick", "--threads", "1", "--steps", "3", "--work", work]
    return subprocess.run(
        [*map(str, command), "--python", peers, *arguments], capture_output=True, text=True, timeout=900
    )


def test_a_tiny_comparison_tracks_its_peers(tmp_path):
    """Three processes take turns from equal weights on equal batches; a peer that is not installed is a line."""
    done = compare(tmp_path, "--jobs", "J1", "--dtypes", "fp32", "--peers", "plain", "transformers", "deepspeed")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split(" | ")[0].strip("| "): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert {"megapre", "plain", "transformers"} <= set(found)
    for peer in ("plain", "transformers"):
        cells = [cell.strip() for cell in found[peer].strip("|").split("|")]
        assert float(cells[8]) < 1e-4 and cells[9] == "3"  # from equal weights fp32 differs by rounding
    assert "deepspeed: No module named 'deepspeed'" in done.stdout or "deepspeed" in found


def test_other_weights_are_no_comparison(tmp_path):
    """A peer that starts elsewhere has no speed, nor has megapre where nobody is left to compare with."""
    wrapper = tmp_path / "python"
    wrapper.write_text(
        f'#!/bin/sh\nsed -i \'s/"lr": [0-9.e-]*/"lr": 1.0/; s/"rates": \\[[^]]*\\]/"rates": [1,1,1,1,1]/\' "$3"\n'
        f'exec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    done = compare(tmp_path, "--jobs", "J1", "--dtypes", "fp32", "--peers", "plain", peers=str(wrapper))
    assert done.returncode == 1
    assert "plain: losses are" in done.stdout and "no speed" in done.stdout and "tokens/s" not in done.stdout


def test_ratios_pair_the_steps_of_a_round(table):
    class Arm:
        def __init__(self, times: list[float], losses: list[float]) -> None:
            self.turns = [{"cpu": time, "loss": loss} for time, loss in zip(times, losses)]
            self.name = "peer"

        def counted(self, key: str) -> list[float]:
            return [turn[key] for turn in self.turns]

    ours, peer = Arm([1.0, 2.0, 4.0], [5.0, 4.0, 3.0]), Arm([3.0, 4.0, 4.0], [5.0, 4.0, 3.2])
    assert table.ratios(peer, ours, "cpu") == [1.0, 2.0, 3.0]
    assert table.apart(peer, ours) == pytest.approx(0.2)
    cell = table.Cell("J1", "bf16", 1, 1, 100, 1e9)
    assert table.judge(cell, ours, [peer])[0] == []
    assert table.judge(cell, ours, []) == ([], ["no peer took part: no losses to compare, no speed."])
    flat = Arm([1.0, 1.0], [5.0, 5.0])
    assert table.judge(cell, flat, [flat])[0] == []
