"""The comparison with other stacks, on a tiny model: that it compares like with like, and refuses where it does not."""

import re
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


def cells_of(text: str) -> dict[str, list[str]]:
    """Cells of the table by stack."""
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| ")
    return {row[0]: row[1:] for row in rows}


def test_one_peer_tracks_one_learns_otherwise_one_is_missing(tmp_path):
    """Three processes take turns from equal weights on equal batches; the table holds those whose losses agree."""
    wrapper = tmp_path / "python"
    wrapper.write_text(
        '#!/bin/sh\nif [ "$2" = plain ]; then\n'
        '  sed \'s/"rates": \\[[^]]*\\]/"rates": [1, 1, 1, 1, 1]/\' "$3" >"$3.other"\n'
        f'  exec {sys.executable} "$1" plain "$3.other"\nfi\n'
        f'[ "$2" = deepspeed ] && exec {sys.executable} "$1" missing "$3"\n'
        f'exec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    peers = ("plain", "transformers", "deepspeed")
    done = compare(tmp_path, "--jobs", "J1", "--dtypes", "fp32", "--peers", *peers, peers=str(wrapper))
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^plain: losses are [\d.]+ apart, more than 0.01: no speed.$", done.stdout, re.MULTILINE)
    assert re.search(r"^deepspeed: ended with exit code 1: KeyError: 'missing'$", done.stdout, re.MULTILINE)
    found = cells_of(done.stdout)
    assert {"megapre", "transformers"} <= set(found) and "plain" not in found
    assert float(found["transformers"][7]) < 1e-4 and found["transformers"][8] == "3"  # fp32 differs by rounding


@pytest.mark.nightly
@pytest.mark.parametrize("job", ["J1", "J2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_tiny_comparison_tracks_its_peers(job: str, dtype: str, tmp_path):
    done = compare(tmp_path, "--jobs", job, "--dtypes", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"megapre", "transformers"} <= set(cells_of(done.stdout))


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
