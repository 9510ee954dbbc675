"""The sweep: combinations, refusals with their sentence, resuming, the shares of an array's tasks, the tables."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import sweep
from tests.training.jobs import corpus

ROOT = Path(__file__).parents[2]
JOB = """
[model]
hidden = 16
heads = 2
sequence = 16
vocab_size = 67
[data]
paths = ["{data}"]
[schedule]
warmup = 50
[train]
global_batch = 4
microbatch = 2
threads = 1
"""


@pytest.fixture
def job(tmp_path):
    corpus(tmp_path / "text")
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(data=tmp_path / "text"))
    return path


def test_a_sweep_ranks_refuses_and_resumes(job, tmp_path, monkeypatch, capsys):
    """Two runs, one refused layout; a second call starts nothing that is done."""
    output = tmp_path / "out"
    call = [str(job), "--vary", "parallel.tensor=1,3", "train.microbatch=1,2", "--steps", "5", "--output", str(output)]
    assert sweep.main(call) == 0
    rows = list(csv.DictReader((output / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["ok", "ok", "refused", "refused"]
    speeds = [float(row["tokens_per_s"]) for row in rows[:2]]
    assert speeds == sorted(speeds, reverse=True) and speeds[1] > 0 and float(rows[0]["memory_gib"]) > 0
    assert rows[2]["reason"] == "model.heads (2) must be a multiple of parallel.tensor (3)"
    told = (output / "sweep.html").read_text()
    assert "must be a multiple of parallel.tensor (3)" in told and "plotly" in told
    assert not list(output.glob("trials/*/run/checkpoints"))

    started = []
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **_: started.append(command))
    assert sweep.main(call) == 0 and started == []
    capsys.readouterr()


def test_a_failed_run_is_listed_and_tried_again(job, tmp_path, monkeypatch):
    output = tmp_path / "out"
    call = [str(job), "--vary", "train.microbatch=2", "--steps", "5", "--output", str(output), "--timeout", "0.2"]
    for _ in range(2):
        assert sweep.main(call) == 0
        found = json.loads(next(output.glob("trials/*/result.json")).read_text())
        assert found["status"] == "failed" and found["reason"] == "not done after 0 s"


def test_what_a_sweep_refuses(job, capsys):
    assert sweep.main([str(job), "--vary", "tensor"]) == 2
    assert "--vary takes table.key=a,b,..., not 'tensor'" in capsys.readouterr().err
    assert sweep.main([str(job), "--vary", "train.microbatch=1", "--steps", "3"]) == 2
    assert "give at least 5" in capsys.readouterr().err


def test_lists_are_one_value():
    assert sweep.combinations(["parallel.layers_per_stage=[1,2],[2,1]", "train.microbatch=1"]) == [
        ["parallel.layers_per_stage=[1,2]", "train.microbatch=1"],
        ["parallel.layers_per_stage=[2,1]", "train.microbatch=1"],
    ]


def test_tasks_of_an_array_share_the_combinations():
    trials = sweep.combinations(["train.microbatch=1,2,3,4,5"])
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    first, second = (sweep.mine(trials, {**array, "SLURM_ARRAY_TASK_ID": task}) for task in "12")
    assert sorted(first + second) == trials and len(first) == 3


def test_slurm_gets_one_supervisor_a_node():
    assert sweep.launcher(4, {}) == []
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    assert sweep.launcher(4, env)[:3] == ["srun", "--nodes=2", "--ntasks=2"]
    assert sweep.launcher(1, env)[:3] == ["srun", "--nodes=1", "--ntasks=1"]
