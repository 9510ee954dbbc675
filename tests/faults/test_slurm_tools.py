"""preprocess_data under a real srun: two nodes, two tasks each, share the input and write the bytes of one process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.faults.slurm import Cluster

pytestmark = pytest.mark.nightly
TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def test_tasks_of_srun_share_the_input(tmp_path: Path) -> None:
    rng = random.Random(7)
    inputs = []
    for number in range(4):
        rows = ("".join(rng.choices("abc def\n", k=rng.randrange(1, 3000))) for _ in range(5000))
        inputs.append(tmp_path / f"{number}.jsonl")
        inputs[-1].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    command = [sys.executable, str(TOOL), "--tokenizer-type", "ByteTokenizer", "--input", *map(str, inputs)]
    alone = subprocess.run([*command, "--output-prefix", str(tmp_path / "a")], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as cluster:
        said = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", *command, "--output-prefix", str(tmp_path / "b"))
        assert said == alone.stdout.strip().replace(str(tmp_path / "a"), str(tmp_path / "b"))
        odd = cluster.run(
            "srun", "--ntasks=2", *command, "--tokenizer-model=/nowhere", "--tokenizer-type=HuggingFaceTokenizer",
            "--output-prefix", str(tmp_path / "c"), check=False,
        )  # fmt: skip
    assert odd == "" and not list(tmp_path.glob("c_*"))
    for suffix in (".bin", ".idx", ".json"):
        assert (
            Path(f"{tmp_path}/a_text_document{suffix}").read_bytes()
            == Path(f"{tmp_path}/b_text_document{suffix}").read_bytes()
        )
    assert len(list(tmp_path.glob("b*"))) == 3
