"""The planner against published runs: benchmarks/planner prints the tables, this holds a part of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "planner"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("rows", "shapes", "sources", "fit", "score"):
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


def test_slopes_of_the_fit_are_those_of_its_errors(benchmarks: None) -> None:
    """A constant that a job was not seen to depend on is not tried again on it."""
    import numpy as np
    from fit import NAMES, Frozen, Problem, timed
    from rows import read

    runs = [run for run in timed(read()) if run.job.layout.pipeline == 1][::60]
    problem, x = Problem(runs, Frozen()), np.full(len(NAMES), 0.02)
    first, again = problem.slopes(x), problem.slopes(x)
    assert np.array_equal(first, again) and (first == 0).mean() > 0.2
    for column in range(len(NAMES)):
        step = np.zeros(len(NAMES))
        step[column] = 1e-2
        assert np.allclose((problem.errors(x + step) - problem.errors(x)) / 1e-2, first[:, column]), NAMES[column]


def test_sweeps_are_runs_of_one_table(benchmarks: None) -> None:
    from rows import read
    from score import sweeps, tables

    runs = [run for run in read() if run.family == "bigscience-tr11" and run.source.rpartition(":")[2].isdigit()]
    found = tables(runs)
    lines = {run.id: int(run.source.rpartition(":")[2]) for run in runs}
    for a, b in zip(sorted(lines, key=lines.__getitem__), sorted(lines, key=lines.__getitem__)[1:]):
        assert (found[a] == found[b]) == (lines[b] - lines[a] < 4), (a, b)
    for groups in sweeps([run for run in runs if run.seconds]).values():
        for group in groups.values():
            assert len({found[run.id] for run in group}) == 1 and len({run.job for run in group}) > 1


def test_schedules_are_ordered_as_published(benchmarks: None, capsys: pytest.CaptureFixture[str]) -> None:
    from score import print_schedules

    print_schedules()
    shown = capsys.readouterr().out
    assert "Kendall tau mean 1.00 lowest 1.00" in shown, shown


def test_runs_of_one_recipe_recompute_alike(benchmarks: None, tmp_path: Path) -> None:
    """The fewest GPUs need full recomputation, so the same layout on more of them is taken to do the same."""
    from rows import RAW, read_raw

    row = dict.fromkeys(RAW, "")
    row |= {
        "source": "a page:7", "model_name": "GPT", "layers": "96", "hidden": "12288", "heads": "96", "vocab": "51200",
        "seq_len": "2048", "arch": "gpt", "gpu": "A100-80", "tp": "4", "pp": "8", "vpp_interleave": "12",
        "micro_batch": "1", "global_batch": "2048", "precision": "bf16", "attention_impl": "no flash",
        "zero_stage": "1", "step_time_s": "100", "sequence_parallel": "yes",
    }  # fmt: skip
    rows = [row | {"id": f"x-{gpus}", "num_gpus": str(gpus), "dp": str(gpus // 32)} for gpus in (64, 256)]

    def policies(rows: list[dict[str, str]]) -> list[str]:
        table = tmp_path / "raw.csv"
        table.write_text("\n".join(",".join(line) for line in [list(row), *(list(r.values()) for r in rows)]) + "\n")
        return [run.job.layout.recompute for run in read_raw(table)[0]]

    assert policies(rows[1:]) == ["selective"] and policies(rows) == ["full", "full"]
    assert policies([rows[0], rows[1] | {"recompute": "none"}]) == ["full", "none"], "what is printed stays"
