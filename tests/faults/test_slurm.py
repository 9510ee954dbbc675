"""The scripts of examples/slurm under a real Slurm: signals, time limits, requeues, other numbers of nodes, arrays."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megapre.checkpoint import store
from megapre.config.load import to_toml
from megapre.config.schema import Config
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.faults.slurm import Cluster
from tests.training.jobs import corpus, job, losses, run, same

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
FOREVER = 10**6


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, cluster: Cluster) -> Path:
    """A folder to submit from: a command called megapre, a corpus, the examples."""
    command = tmp_path / "megapre"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megapre "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    corpus(tmp_path / "text")
    for name in ("OMP_NUM_THREADS", "MASTER_PORT"):
        cluster.env.pop(name, None)
    places = {"MEGAPRE": str(command), "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    cluster.env |= places | {"OMP_NUM_THREADS": "1", "DOCTOR": "0"}
    return tmp_path


def small(site: Path, steps: int, layout: str = "1x1x2", run_dir: str = "run") -> Config:
    """A job whose learning rate does not depend on how long it runs, so that its end can be moved."""
    config = job(str(site / "text"), site / run_dir, parse(layout), steps=steps, interval=0)
    config = replace(config, schedule=replace(config.schedule, decay=100_000, warmup=5))
    return replace(config, train=replace(config.train, eval_interval=0))


def write(site: Path, config: Config) -> Path:
    (site / "job.toml.new").write_text(to_toml(config))
    os.replace(site / "job.toml.new", site / "job.toml")
    return site / "job.toml"


def said(site: Path) -> str:
    """All that the job and its nodes wrote."""
    return "\n".join(f"{p}:\n{p.read_text()}" for p in sorted([*site.glob("*.out"), *site.glob("logs/*/*.txt")]))


def steps_done(run_dir: Path) -> int:
    return max(losses(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def saved(run_dir: Path) -> int:
    """Step of the newest finished checkpoint, 0 without one."""
    entries = store.list_checkpoints(run_dir / "checkpoints")
    return max((entry.step for entry in entries if entry.problem is None), default=0)


def run_until_stopped(cluster: Cluster, site: Path, number: int, run_dir: Path, layout: str = "1x1x2") -> int:
    """Signal a running job's batch shell; the step that it saved. Moves the job's end to 5 steps after that."""
    cluster.until(lambda: steps_done(run_dir) > 5, 120, lambda: said(site))
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    return stopped(cluster, site, run_dir, layout)


def stopped(cluster: Cluster, site: Path, run_dir: Path, layout: str = "1x1x2", seconds: float = 120) -> int:
    cluster.until(lambda: saved(run_dir) > 0, seconds, lambda: said(site))
    write(site, small(site, saved(run_dir) + 5, layout, run_dir.name))
    return saved(run_dir)


def equal_to_uninterrupted(pool: RankPool, site: Path, steps: int, run_dir: Path) -> None:
    assert pool.run(2, run, small(site, steps, run_dir="whole")) == [0, 0]
    assert losses(run_dir) == losses(site / "whole")
    last = Path("checkpoints") / store.step_name(steps)
    same(site / "whole" / last, run_dir / last)


@pytest.mark.parametrize("script,nodes", [("pretrain.sbatch", 2), ("one_node.sbatch", 1)])
def test_a_signal_saves_requeues_and_resumes_bitwise(
    script: str, nodes: int, cluster: Cluster, site: Path, pool: RankPool
) -> None:
    write(site, small(site, FOREVER))
    number = cluster.submit(site, "--time=10", SCRIPTS / script, "job.toml", DOCTOR="1")
    step = run_until_stopped(cluster, site, number, site / "run")
    ended = cluster.ended(number)
    text = said(site)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    assert ended["NumNodes"] == str(nodes)
    assert "megapre ended with exit code 75" in text and f"at step {step}" in text and "Traceback" not in text
    assert len(list(site.glob(f"logs/{number}/node-*-attempt-1.txt"))) == nodes
    assert len(list(site.glob(f"logs/{number}/doctor-node-*.txt"))) == nodes and "free space" in text
    assert "all-reduce over data" in text and "right on every rank and axis" in text
    equal_to_uninterrupted(pool, site, step + 5, site / "run")


def test_the_time_limit_itself_saves_and_requeues(cluster: Cluster, site: Path, pool: RankPool) -> None:
    """Nobody but Slurm sends the signal."""
    write(site, small(site, FOREVER))
    number = cluster.submit(site, "--time=1", "--signal=B:USR1@15", SCRIPTS / "pretrain.sbatch", "job.toml")
    cluster.until(lambda: steps_done(site / "run") > 5, 120, lambda: said(site))
    step = stopped(cluster, site, site / "run", seconds=90)
    ended = cluster.ended(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said(site)
    equal_to_uninterrupted(pool, site, step + 5, site / "run")


def test_another_number_of_nodes_resumes_by_resharding(cluster: Cluster, site: Path, pool: RankPool) -> None:
    """Two nodes of one rank, then one node of two ranks bitwise, then one rank, then two nodes of two."""
    write(site, small(site, FOREVER))
    first = cluster.submit(site, "--no-requeue", SCRIPTS / "pretrain.sbatch", "job.toml")
    step = run_until_stopped(cluster, site, first, site / "run")
    cluster.ended(first)
    again = cluster.submit(site, SCRIPTS / "one_node.sbatch", "job.toml")
    assert cluster.ended(again)["JobState"] == "COMPLETED", said(site)
    equal_to_uninterrupted(pool, site, step + 5, site / "run")
    for layout, script, more in (("1x1x1", "one_node.sbatch", 10), ("1x1x4+zero1", "pretrain.sbatch", 15)):
        write(site, small(site, step + more, layout))
        number = cluster.submit(site, SCRIPTS / script, "job.toml")
        assert cluster.ended(number)["JobState"] == "COMPLETED", said(site)
        assert saved(site / "run") == step + more
    assert pool.run(2, run, small(site, step + 15, run_dir="whole")) == [0, 0]
    mine, whole = losses(site / "run"), losses(site / "whole")
    for at in range(step + 6, step + 16):
        assert abs(float.fromhex(mine[at]) - float.fromhex(whole[at])) < 1e-4, at


def sick(site: Path, *nodes: str, hang: bool = False) -> None:
    """The command, of which the doctor finds a GPU too few on some nodes, or never ends there."""
    command = site / "megapre"
    ill = "sleep 1000" if hang else 'set -- "$@" --gpus 99'
    names = "|".join(f"doctor\\ {node}" for node in nodes)
    command.write_text(
        f'#!/bin/sh\ncase "$1 $SLURMD_NODENAME" in {names}) {ill} ;; esac\n'
        f'exec {sys.executable} -m megapre "$@"\n'
    )


@pytest.mark.parametrize("hang", [False, True])
def test_a_node_that_the_doctor_refuses_is_left_out_and_the_job_runs_elsewhere(
    hang: bool, cluster: Cluster, site: Path
) -> None:
    write(site, small(site, 5))
    sick(site, "n1", hang=hang)
    number = cluster.submit(site, SCRIPTS / "one_node.sbatch", "job.toml", DOCTOR="1", DOCTOR_MINUTES="1")
    ended = cluster.ended(number, 300)
    text = said(site)
    assert (ended["JobState"], ended["Restarts"], ended["BatchHost"]) == ("COMPLETED", "1", "n2"), text
    assert ended["ExcNodeList"] == "n1" and "back into the queue without n1" in text
    assert hang or "megapre: node n1 is refused: GPUs: " in text
    assert saved(site / "run") == 5


def test_nodes_are_left_out_a_bounded_number_of_times_and_never_all(cluster: Cluster, site: Path) -> None:
    write(site, small(site, 5))
    sick(site, "n1", "n2")
    both = cluster.submit(site, SCRIPTS / "pretrain.sbatch", "job.toml", DOCTOR="1")
    ended = cluster.ended(both)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), said(site)
    assert "all nodes were refused" in said(site)
    one = cluster.submit(site, SCRIPTS / "one_node.sbatch", "job.toml", DOCTOR="1", EXCLUDE="1")
    ended = cluster.ended(one)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1"), said(site)
    assert "more than EXCLUDE=1 nodes of this job were refused: n1 n2" in said(site)
    sick(site, "n1")
    few = cluster.submit(site, SCRIPTS / "pretrain.sbatch", "job.toml", DOCTOR="1")
    ended = cluster.ended(few)
    assert (ended["ExitCode"], ended["Restarts"], ended["ExcNodeList"]) == ("1:0", "0", "(null)"), said(site)
    assert "the partition debug has 1 other nodes and the job needs 2" in said(site)
    (site / "job.toml").write_text("[parallel]\ntensor = 3\n")
    bad = cluster.submit(site, SCRIPTS / "one_node.sbatch", "job.toml", DOCTOR="1")
    ended = cluster.ended(bad)
    assert (ended["ExitCode"], ended["Restarts"], ended["ExcNodeList"]) == ("2:0", "0", "(null)"), said(site)


def test_a_sweep_runs_one_job_a_line_and_each_resumes(cluster: Cluster, site: Path) -> None:
    config = small(site, FOREVER, "1x1x1")
    write(site, config)
    (site / "sweep.txt").write_text("optimizer.lr=1e-3\noptimizer.lr=2e-3 train.seed=7\n")
    script = SCRIPTS / "sweep.sbatch"
    number = cluster.submit(site, "--array=1-2", script, "sweep.txt", "job.toml")
    runs = [site / "runs" / f"sweep-{number}" / str(task) for task in (1, 2)]
    cluster.until(lambda: all(steps_done(path) > 5 for path in runs), 120, lambda: said(site))
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    cluster.until(lambda: all(saved(path) for path in runs), 120, lambda: said(site))
    write(site, small(site, max(map(saved, runs)) + 5, "1x1x1"))
    for task, path in enumerate(runs, start=1):
        ended = cluster.ended(f"{number}_{task}")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said(site)
        assert f"lr = 0.00{task}" in (path / "job.toml").read_text()
    assert losses(runs[0]) != losses(runs[1])
    beyond = cluster.submit(site, "--array=3", script, "sweep.txt", "job.toml")
    assert cluster.ended(f"{beyond}_3")["ExitCode"] == "2:0" and "sweep.txt has 2 lines" in said(site)
    alone = cluster.submit(site, "--array=0", "--wrap", f"unset SLURM_ARRAY_TASK_ID; bash {script} sweep.txt job.toml")
    assert cluster.ended(f"{alone}_0")["ExitCode"] == "2:0" and "SLURM_ARRAY_TASK_ID is not set" in said(site)


@pytest.mark.parametrize(
    "command,told",
    [
        ("srun env -u SLURM_NNODES $MEGAPRE train job.toml", "SLURM_NNODES is not set"),
        ("srun env -u SLURM_NTASKS $MEGAPRE train job.toml", "SLURM_NTASKS is not set"),
        ("srun env -u MASTER_ADDR -u SLURM_JOB_NODELIST $MEGAPRE train job.toml", "SLURM_JOB_NODELIST is not set"),
        (
            "srun --ntasks=3 --overcommit $MEGAPRE train job.toml",
            "the grid has 2 ranks but Slurm started 3 tasks on 2 nodes",
        ),
        ("$MEGAPRE train job.toml", "start it with srun"),
    ],
)
def test_missing_variables_and_odd_launches_are_refused(command: str, told: str, cluster: Cluster, site: Path) -> None:
    write(site, small(site, 5))
    number = cluster.submit(site, "--nodes=2", "--ntasks=2", "--output=job.out", "--wrap", command)
    ended = cluster.ended(number)
    text = (site / "job.out").read_text()
    assert ended["ExitCode"] == "2:0" and told in text and "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("megapre: ")]
    assert len(set(lines)) == 1 and len(lines) <= 2, "once a node: a variable may be missing on one alone"
