"""Schedules: complete, deadlock-free under the strict model, and as good as the papers say."""

from __future__ import annotations

import pytest

from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, Communicate, Compute, Transfer
from megapre.parallel.pipeline.schedules import plan
from megapre.parallel.pipeline.simulate import simulate

SHAPES = [(stages, m) for stages in (1, 2, 3, 4, 7, 8) for m in (1, 2, 3, 4, 8, 13)]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward"])
@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_every_microbatch_runs_once_on_every_stage(name: str, stages: int, microbatches: int) -> None:
    plans = [plan(name, stage, stages, microbatches) for stage in range(stages)]
    simulate(plans)  # raises where it deadlocks or crosses messages
    for actions in plans:
        for kind in (FORWARD, BACKWARD):
            done = [a.microbatch for a in actions if isinstance(a, Compute) and a.kind == kind]
            assert sorted(done) == (list(range(microbatches)) if kind == FORWARD or name != "forward" else [])


@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_1f1b_has_the_bubble_and_memory_of_the_paper(stages: int, microbatches: int) -> None:
    predicted = simulate([plan("1f1b", stage, stages, microbatches) for stage in range(stages)])
    assert predicted.in_flight == tuple(min(stages - stage, microbatches) for stage in range(stages))
    if microbatches >= stages:
        assert predicted.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    gpipe = simulate([plan("gpipe", stage, stages, microbatches) for stage in range(stages)])
    assert gpipe.in_flight == (microbatches,) * stages
    assert gpipe.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_the_simulator_sees_a_deadlock() -> None:
    """Both stages send before they receive, which rendezvous never completes, if the receive is posted later."""
    waits_forever = [
        [Compute(FORWARD, 0), Communicate((Transfer(True, True, 0, 1),)), Communicate((Transfer(False, False, 0, 1),)),
         Compute(BACKWARD, 0)],
        [Communicate((Transfer(False, True, 0, 0),)), Compute(FORWARD, 0)],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="deadlock"):
        simulate(waits_forever)


def test_the_simulator_sees_crossed_messages() -> None:
    crossed = [
        [Compute(FORWARD, 0), Communicate((Transfer(True, True, 0, 1),)), Compute(FORWARD, 1),
         Communicate((Transfer(True, True, 1, 1),))],
        [Communicate((Transfer(False, True, 1, 0), Transfer(False, True, 0, 0))), Compute(FORWARD, 0),
         Compute(FORWARD, 1)],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="microbatch 0 is sent where microbatch 1"):
        simulate(crossed)
