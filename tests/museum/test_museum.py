"""Seeded bugs are noticed by the tests that they name: a few in `make test`, all in `make nightly LANE=layouts`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.museum import report
from tests.museum.exhibits import EXHIBITS
from tests.museum.run import CONTROL, plant
from tests.museum.table import ALL, QUICK

ROOT = Path(__file__).resolve().parents[2]
NAMES = {mutant.name for mutant in ALL}


def museum(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.museum.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_few_mutants_are_killed() -> None:
    done = museum("--quick")
    assert done.returncode == 0 and f"killed: {len(QUICK)}" in done.stdout, done.stdout + done.stderr


@pytest.mark.nightly
def test_all_mutants_are_killed() -> None:
    done = museum()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_the_healthy_tree_passes_every_named_test() -> None:
    done = museum("--healthy")
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_every_mutant_applies(mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1 and mutant.old != mutant.new
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert f"def {function.partition('[')[0]}" in (ROOT / file).read_text()


def test_names_are_unique_and_every_exhibit_is_accounted_for() -> None:
    assert len(NAMES) == len(ALL)
    assert [exhibit.number for exhibit in EXHIBITS] == list(range(1, 83))
    for exhibit in EXHIBITS:
        assert set(exhibit.mutants) <= NAMES, exhibit
        assert bool(exhibit.mutants) != bool(exhibit.later), exhibit


def test_a_stale_mutant_is_refused(tmp_path: Path) -> None:
    stale = replace(CONTROL, name="stale", old="text that is not there")
    with pytest.raises(ValueError, match="0 times"):
        plant(stale, tmp_path)


def test_a_mutant_is_planted_in_the_copy_alone(tmp_path: Path) -> None:
    for mutant in {mutant.file.split("/")[0]: mutant for mutant in ALL if mutant is not CONTROL}.values():
        folder = tmp_path / mutant.file.split("/")[0]
        folder.mkdir()
        before = (ROOT / mutant.file).read_text()
        plant(mutant, folder)
        assert (folder / mutant.file).read_text() != before == (ROOT / mutant.file).read_text(), mutant.name


def test_the_table_of_the_docs_is_the_museum() -> None:
    assert report.table() in (ROOT / "docs" / "museum.md").read_text(), "run python -m tests.museum.report --write"
