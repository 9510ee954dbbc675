"""preprocess_data under real launchers of MPI: MPICH's, and the machine's own where there is one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.extras import FOLDER, ROOT, environment, extra_python

pytestmark = pytest.mark.nightly
LAUNCHERS = {
    "mpich": [str(FOLDER / "bin" / "mpiexec")],
    "openmpi": ["mpirun", "--allow-run-as-root", "--oversubscribe"],
}
ABI: dict[str, dict[str, str]] = {"mpich": {}, "openmpi": {"MPI4PY_MPIABI": "openmpi"}}
"""mpi4py takes the MPI of its own environment, MPICH, unless told otherwise."""


def launcher(name: str) -> list[str]:
    command = LAUNCHERS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    said = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    if ("Open MPI" in said) != (name == "openmpi"):
        pytest.skip(f"{command[0]} is not of {name}: {said[:40]!r}")
    return command


def corpus(folder: Path) -> list[str]:
    """Three files of more than one piece in all (8 MiB)."""
    rng = random.Random(5)
    for number in range(3):
        rows = ("".join(rng.choices("abc def\n", k=rng.randrange(1, 3000))) for _ in range(4000))
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows) + "{broken\n")
    return [str(folder / f"{number}.jsonl") for number in range(3)]


def arguments(prefix: Path, inputs: list[str]) -> list[str]:
    tool = str(ROOT / "tools" / "preprocess_data.py")
    return [
        tool,
        "--tokenizer-type",
        "ByteTokenizer",
        "--append-eod",
        "--output-prefix",
        str(prefix),
        "--input",
        *inputs,
    ]


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("mpi4py", [True, False])
def test_ranks_write_the_bytes_of_one_process(tmp_path, name, mpi4py):
    """With mpi4py the ranks meet by MPI, without it by files; both give the bytes of a process alone."""
    command, python = launcher(name), extra_python("mpi4py")
    inputs = corpus(tmp_path)
    alone = subprocess.run(
        [python, *arguments(tmp_path / "a", inputs)], env=environment(), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    blocked = tmp_path / "blocked" / "mpi4py"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not here')\n")
    found = environment(**ABI[name])
    if not mpi4py:
        found |= {"PYTHONPATH": f"{blocked.parent}:{found['PYTHONPATH']}", "MEGAPRE_LAUNCH": "one"}
    ranks = subprocess.run(
        [*command, "-n", "3", python, *arguments(tmp_path / "b", inputs), "--workers", "2"],
        env=found, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ranks.returncode == 0, ranks.stderr
    assert ("ranks meet by MPI" in ranks.stderr) == mpi4py and ("ranks meet by files" in ranks.stderr) == (not mpi4py)
    assert ranks.stdout.count("12000 documents") == 1 and "3 bad lines" in ranks.stdout
    for suffix in (".bin", ".idx", ".json"):
        pair = [Path(f"{tmp_path}/{side}_text_document{suffix}").read_bytes() for side in "ab"]
        assert pair[0] == pair[1], suffix
    assert sorted(path.name for path in tmp_path.glob("b*")) == [
        "b_text_document.bin", "b_text_document.idx", "b_text_document.json", "blocked",
    ]  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_rank_that_fails_ends_all(tmp_path, name):
    command, python = launcher(name), extra_python("mpi4py")
    inputs = corpus(tmp_path)
    (tmp_path / "2.jsonl").write_text("\n{broken\n")
    done = subprocess.run(
        [*command, "-n", "2", python, *arguments(tmp_path / "b", inputs), "--on-bad-line", "fail"],
        env=environment(**ABI[name]), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and "jsonl:" in done.stderr and "(--on-bad-line skip" in done.stderr
    assert not list(tmp_path.glob("b_*")) and not (tmp_path / "b.lock").exists()
