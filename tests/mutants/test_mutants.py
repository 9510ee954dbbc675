"""Every seeded bug is noticed by the test that its row names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS, QUICK, Mutant

ROOT = Path(__file__).resolve().parents[2]


def run_test(tree: Path, test: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", test]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)


def copy_of_the_tree(folder: Path) -> Path:
    for name in ("megapre", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=() if m.name in QUICK else pytest.mark.nightly) for m in MUTANTS],
)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    source = tree / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name} does not apply to {mutant.file} any more"
    source.write_text(text.replace(mutant.old, mutant.new))
    done = run_test(tree, mutant.test)
    # 1 is "tests ran and failed"; anything else means that the named test does not exist or could not run.
    assert done.returncode == 1 and "1 failed" in done.stdout, f"survived {mutant.test}:\n{done.stdout[-2000:]}"
    noticed = (str(tree), "AssertionError", "the process died")  # the last: a rank read memory that was freed
    assert any(text in done.stdout for text in noticed)


@pytest.mark.nightly
@pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS}))
def test_the_healthy_tree_passes(test: str, tmp_path: Path) -> None:
    done = run_test(copy_of_the_tree(tmp_path), test)
    assert done.returncode == 0, done.stdout[-2000:]
