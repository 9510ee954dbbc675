"""Schedules: complete, deadlock-free under the strict model, and as good as the papers say."""

from __future__ import annotations

import pytest

from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, WEIGHT, Communicate, Compute, Transfer, with_messages
from megapre.parallel.pipeline.schedules import SCHEDULES, in_order, plans
from megapre.parallel.pipeline.simulate import simulate

SHAPES = [(ranks, m) for ranks in (1, 2, 3, 4, 7, 8) for m in (1, 2, 3, 4, 8, 13)]
CHUNKS = {"interleaved": (2, 3), "zb-v": (2,)}
CASES = [
    (name, ranks, chunks, m)
    for name in SCHEDULES
    for ranks, m in SHAPES
    for chunks in CHUNKS.get(name, (1,))
    if name != "interleaved" or m % ranks == 0
]


@pytest.mark.parametrize(("name", "ranks", "chunks", "microbatches"), CASES)
def test_every_microbatch_runs_once_on_every_stage(name: str, ranks: int, chunks: int, microbatches: int) -> None:
    for training in (True, False):
        made = plans(name, ranks, chunks, microbatches, training=training)
        simulate(made)  # raises where it deadlocks or crosses messages
        done = [action for actions in made for action in actions if isinstance(action, Compute)]
        kinds = [FORWARD, BACKWARD] if training else [FORWARD]
        if training and name.startswith("zb"):
            kinds.append(WEIGHT)
        stages = ranks * chunks
        expected = {Compute(kind, s, m) for kind in kinds for s in range(stages) for m in range(microbatches)}
        assert len(done) == len(expected) and set(done) == expected
        owners = SCHEDULES[name].owners(ranks, chunks)
        assert all(
            owners[a.stage] == rank for rank, actions in enumerate(made) for a in actions if isinstance(a, Compute)
        )


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
def test_bubble_and_memory_are_those_of_the_papers(ranks: int, microbatches: int) -> None:
    warm = microbatches >= ranks
    one = simulate(plans("1f1b", ranks, 1, microbatches))
    assert one.in_flight == tuple(min(ranks - rank, microbatches) for rank in range(ranks))
    gpipe = simulate(plans("gpipe", ranks, 1, microbatches))
    assert gpipe.in_flight == (microbatches,) * ranks
    assert gpipe.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    if warm:
        assert one.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    for chunks in (2, 3) if microbatches % ranks == 0 else ():
        inter = simulate(plans("interleaved", ranks, chunks, microbatches))
        assert inter.bubble == pytest.approx((ranks - 1) / (chunks * microbatches + ranks - 1))
    zero = simulate(plans("zb-h1", ranks, 1, microbatches), backward=1)
    assert max(zero.in_flight) <= max(one.in_flight)
    if warm:
        assert zero.time == 3 * microbatches + ranks - 1
    v = simulate(plans("zb-v", ranks, 2, microbatches), backward=1)
    assert max(v.in_flight) <= 2 * ranks  # half-size stages: 1F1B's memory
    if warm:  # the greedy search is at most 3 ticks a rank from no bubble at all
        assert v.time <= 6 * microbatches + 3 * (ranks - 1)


def test_the_simulator_sees_a_deadlock() -> None:
    """Rank 0 waits for a gradient that rank 1 never sends."""
    waits_forever = [
        [Compute(FORWARD, 0, 0), Communicate((Transfer(True, True, 0, 0, 1), Transfer(False, False, 0, 0, 1))),
         Compute(BACKWARD, 0, 0)],
        [Communicate((Transfer(False, True, 1, 0, 0),)), Compute(FORWARD, 1, 0)],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="deadlock"):
        simulate(waits_forever)


def test_the_simulator_sees_a_second_send_that_waits_for_the_first() -> None:
    """Rank 1 wants both activations only after a gradient that rank 0 makes after its second send."""
    late = [
        [Compute(FORWARD, 0, 0), Communicate((Transfer(True, True, 0, 0, 1),)), Compute(FORWARD, 0, 1),
         Communicate((Transfer(True, True, 0, 1, 1),)), Communicate((Transfer(True, True, 0, 2, 1),))],
        [Communicate((Transfer(False, False, 1, 9, 2),)), Compute(BACKWARD, 1, 9),
         Communicate((Transfer(False, True, 1, 0, 0), Transfer(False, True, 1, 1, 0), Transfer(False, True, 1, 2, 0)))],
        [],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="deadlock"):
        simulate(late)


def test_the_simulator_sees_crossed_messages() -> None:
    crossed = [
        [Compute(FORWARD, 0, 0), Communicate((Transfer(True, True, 0, 0, 1),)), Compute(FORWARD, 0, 1),
         Communicate((Transfer(True, True, 0, 1, 1),))],
        [Communicate((Transfer(False, True, 1, 1, 0), Transfer(False, True, 1, 0, 0))), Compute(FORWARD, 1, 0),
         Compute(FORWARD, 1, 1)],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="microbatch 0 from stage 0 is sent where the activation of microbatch 1"):
        simulate(crossed)


def test_receives_follow_the_order_of_sends_even_when_the_data_is_used_in_another() -> None:
    compute = [
        [Compute(FORWARD, 0, 0), Compute(FORWARD, 0, 1)],
        [Compute(FORWARD, 1, 1), Compute(FORWARD, 1, 0)],
    ]
    made = with_messages(compute, in_order(2, 1))
    simulate(made)
    receives = [t.microbatch for a in made[1] if isinstance(a, Communicate) for t in a.transfers]
    assert receives == [0, 1]
