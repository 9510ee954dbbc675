"""The sweep under a real Slurm: the tasks of an array share the combinations, each run one srun over two nodes."""

import csv
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_sweep import JOB, ROOT
from tests.faults.slurm import Cluster
from tests.training.jobs import corpus

pytestmark = pytest.mark.nightly


def test_an_array_sweeps(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    corpus(tmp_path / "text")
    (tmp_path / "job.toml").write_text(JOB.format(data=tmp_path / "text"))
    command = f"{sys.executable} {ROOT / 'benchmarks' / 'sweep.py'} job.toml --output out --steps 5 --vary"
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        for name in ("MASTER_PORT", "MASTER_ADDR"):
            cluster.env.pop(name, None)
        number = cluster.submit(
            tmp_path, "--nodes=2", "--array=1-2%1", "--output=%a.out", "--wrap",
            f"{command} parallel.data=2,3 train.microbatch=1,2", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1",
        )  # fmt: skip
        for task in (1, 2):
            cluster.ended(f"{number}_{task}", 400)
    said = "\n".join(path.read_text() for path in tmp_path.glob("*.out"))
    logs = "\n".join(path.read_text() for path in tmp_path.glob("out/trials/*/log.txt"))
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["ok", "ok", "refused", "refused"], said + logs
    assert {row["parallel.data"] for row in rows[:2]} == {"2"} and float(rows[0]["tokens_per_s"]) > 0
