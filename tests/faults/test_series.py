"""The short lane: kills and signals counted; hangs, damage, crashes and numbers have their cases in other rooms."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megapre.verify.pool import RankPool
from tests.faults import chaos
from tests.faults.series import ROWS, play

SEED = random.SystemRandom().randrange(10**6)


@pytest.mark.parametrize("name,count", [("kills", 10), ("signals", 3)])
def test_a_run_survives(name: str, count: int, tmp_path: Path, pool: RankPool) -> None:
    body = {"kills": chaos.kills, "signals": chaos.signals}[name]
    try:
        print(body(count, random.Random(SEED), tmp_path, pool))
    except BaseException as error:
        raise AssertionError(f"seed {SEED}: {error}") from error


def test_a_row_that_fails_is_counted_as_failed(capsys: pytest.CaptureFixture[str]) -> None:
    def body(count: int, rng: random.Random, folder: Path, pool: RankPool) -> str:
        raise AssertionError("it broke\nhere")

    with RankPool(1) as pool:
        held, note, _ = play(ROWS[0].__class__("x", "x", body, 1, 1), 1, pool, 7)
    assert not held and note.startswith("FAILED with seed 7 in ") and note.endswith("it broke")
    assert len({row.name for row in ROWS}) == len(ROWS) and all(row.full >= row.nightly for row in ROWS)
