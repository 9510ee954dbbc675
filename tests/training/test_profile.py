"""``megapre train --profile``: the parts are the whole, bytes are the closed form's, and the run is the same run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megapre.monitor.profile import TIMED, TRACED, Profile
from megapre.resilience.ranks import Ranks
from megapre.resilience.signals import StopRequest
from megapre.train import run
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import corpus, job, losses

WARMUP = 3
STEPS = WARMUP + TIMED + TRACED + 1


def both(ranks: Ranks, config, profile: bool) -> int:
    return run(config, ranks, StopRequest(), profile=profile)


@pytest.mark.parametrize("layout", ["1x1x1", "1x2x1", "1x1x2+zero1"])
def test_a_profiled_run(layout: str, tmp_path: Path, pool: RankPool) -> None:
    """Phases add up to the step, a trace names them, losses have the bits of the run without."""
    cell, text = parse(layout), corpus(tmp_path / "text")
    found = {}
    for profile in (False, True):
        config = job(text, tmp_path / f"run{profile}", cell, steps=STEPS, interval=0)
        config = replace(config, train=replace(config.train, eval_interval=0))
        assert set(pool.run(cell.world, both, config, profile)) == {0}
        found[profile] = losses(tmp_path / f"run{profile}")
    assert found[True] == found[False]

    folder = tmp_path / "runTrue" / "profile"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"{kind}_{rank}.json" for kind in ("phases", "trace") for rank in range(cell.world)
    )
    for rank in range(cell.world):
        seen = json.loads((folder / f"phases_{rank}.json").read_text())
        assert seen["steps"] == TIMED and len(seen["turns"]) == TIMED + 1
        phases = seen["phases"]
        assert {"data", "blocks forward", "backward", "optimizer", "norm and clip", "the loop"} <= set(phases)
        assert ("embedding" in phases) == (rank == 0 or layout != "1x2x1")
        assert all(phase["wall"] >= 0 for phase in phases.values())
        assert sum(phase["wall"] for phase in phases.values()) == pytest.approx(seen["wall"])
        assert seen["ops"] and seen["ops"][0]["seconds"] > 0
        assert "blocks forward" in (folder / f"trace_{rank}.json").read_text()
        wire = {name: kind["bytes"] for name, kind in seen["collectives"].items()}
        if layout == "1x2x1":
            activation = 4 * 16 * 2 * 32 * 4  # microbatches, sequence, microbatch, hidden, fp32
            sent, received = ("pipeline send", "backward recv") if rank == 0 else ("backward send", "pipeline recv")
            assert wire[sent] == wire[received] == pytest.approx(activation)
        if "zero1" in layout:
            assert wire["data reduce_scatter"] == pytest.approx(wire["data all_gather"]) and wire["data all_gather"] > 0
        for message in seen["messages"]:
            assert message[3] >= message[2]


def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path) -> None:
    profile = Profile(tmp_path / "profile", 0, "cpu", WARMUP)
    for _ in range(WARMUP + 1):
        profile.turn()
        with profile.span("data"):
            pass
    assert profile.finish() == ["no profile: it takes 5 steps, and 11 with a trace"]
    assert not (tmp_path / "profile").exists()


def test_a_phase_inside_another_is_not_counted_twice(tmp_path: Path) -> None:
    class Clock:
        at = 0.0

        def now(self):
            Clock.at += 1.0
            return Clock.at, Clock.at

        def between(self, begin, end):
            return end[0] - begin[0], end[1] - begin[1]

    profile = Profile(tmp_path, 0, "cpu", 0)
    profile.clock = Clock()
    profile.turn()  # at 1
    with profile.span("outer"):  # 2 to 5
        with profile.span("inner"):  # 3 to 4
            pass
    profile.turn()  # at 6
    found = profile.summary()
    assert {name: phase["wall"] for name, phase in found["phases"].items()} == {"outer": 2, "inner": 1, "the loop": 2}
    assert found["wall"] == 5
