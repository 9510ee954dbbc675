"""The planner against published runs: benchmarks/planner prints the tables, this holds a part of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "planner"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("rows", "shapes", "fit", "score"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_single_stage_runs_are_within_five_percent(benchmarks: None) -> None:
    """Runs without a pipeline need no simulation, so they fit the time of a test."""
    import numpy as np
    from fit import timed
    from rows import read
    from score import naive, noise, step_errors

    from megapre.planner.constants import load

    runs = [run for run in timed(read()) if run.job.layout.pipeline == 1]
    errors = np.abs(list(step_errors(runs, load()).values()))
    assert len(runs) > 300
    assert np.median(errors) < 0.045 and errors.mean() < 0.065 and np.quantile(errors, 0.9) < 0.14
    assert np.median(errors) < np.median(np.abs(list(naive(runs).values())))
    assert np.median(noise(runs)) < 0.02


def test_a_raw_row_becomes_a_job(benchmarks: None, tmp_path: Path) -> None:
    from rows import RAW, flat, read, read_raw

    row = dict.fromkeys(RAW, "")
    row |= {
        "id": "x-0001", "source": "a paper", "model_name": "GPT", "layers": "24", "hidden": "2048", "heads": "16",
        "vocab": "50304", "seq_len": "2048", "arch": "gpt", "gpu": "A100-80", "num_gpus": "16", "tp": "2", "pp": "2",
        "dp": "4", "micro_batch": "2", "global_batch": "64", "precision": "bf16", "step_time_s": "1.5",
        "recompute": "full", "inter_node_network": "4 * 100Gb",
    }  # fmt: skip
    table = tmp_path / "raw.csv"
    table.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    runs, rest = read_raw(table)
    assert not rest and runs[0].seconds == 1.5 and runs[0].job.layout.microbatches == 8
    assert runs[0].job.nic == 6.25e9 and runs[0].job.assumed == ("attention",)
    import csv

    resolved = tmp_path / "resolved.csv"
    with resolved.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(flat(runs[0])))
        writer.writeheader()
        writer.writerow(flat(runs[0]))
    assert read(resolved) == runs
    row["num_gpus"] = "17"
    table.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    assert read_raw(table)[1] == [("x-0001", "the layout does not multiply to the GPUs")]


def test_rank_correlation_counts_pairs_that_differ(benchmarks: None) -> None:
    from score import tau

    assert tau([(1, 1), (2, 2), (3, 3)]) == 1 and tau([(3, 1), (2, 2), (1, 3)]) == -1
    assert tau([(1, 1), (2, 1.001)]) != tau([(1, 1), (2, 2)])
