"""The checker is checked: what must not pass does not."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from megapre.config.check import check
from megapre.config.schema import Config
from megapre.data.loader import Counts
from megapre.parallel.grid import Grid
from megapre.training.engine import build
from megapre.verify import threads
from megapre.verify.cells import batches, parse, scaled_down, share
from megapre.verify.run import EXACT, Report, _digests, _disagreements, _limit, _merge

SEED = random.SystemRandom().randrange(10**6)


def report(errors: dict[str, float]) -> Report:
    return Report(errors, {}, [], [])


def test_one_wrong_quantity_among_many_is_enough() -> None:
    """With 1, 2, 50 and 100 of a hundred quantities wrong, and with the last one alone."""
    names = [f"gradient/{n}" for n in range(100)]
    assert report(dict.fromkeys(names, 1e-12)).worst(lambda name: EXACT)[1] <= EXACT
    for wrong in ([*names[:1]], [*names[:2]], [*names[:50]], names, [*names[-1:]]):
        errors = {**dict.fromkeys(names, 1e-12), **dict.fromkeys(wrong, 1e-8)}
        name, error, limit = report(errors).worst(lambda _: EXACT)
        assert name in wrong and error > limit


def test_nan_is_the_worst() -> None:
    name, error, _ = report({"a": 0.5, "b": float("nan"), "c": 0.1}).worst(lambda name: EXACT)
    assert name == "b" and not error <= EXACT


def test_a_baseline_that_overflows_allows_nothing() -> None:
    base = {"gradient/a": float("inf"), "gradient/b": 1e-7, "gradient/c": 1e-7, "loss/0": 1e-8}
    assert _limit("gradient/a", base, 2.0**-24) == 0.0
    assert _limit("gradient/b", base, 2.0**-24) == 2e-7


def test_a_tensor_of_two_numbers_is_held_to_the_worst_of_all() -> None:
    base = {"parameter/a": 9e-7, "parameter/b": 2e-7, "parameter/c": 1e-7, "parameter/c.bias": 1e-9}
    assert _limit("parameter/c.bias", base, 2.0**-24) == 2 * 1.5e-7
    assert _limit("parameter/c.bias", base, 2.0**-24, {"c.bias"}) == 2 * 9e-7
    assert _limit("parameter/c", base, 2.0**-24, {"c.bias"}) == 2 * 1.5e-7


def test_one_rank_with_another_loss_is_enough() -> None:
    right, wrong = {"loss/0": [0.0, 4.0, 0.0]}, {"loss/0": [1e-2, 4.0, 0.0]}
    for order in ([right, right, wrong], [wrong, right, right]):
        assert _merge(order)["loss/0"] > 0.01


def corrupted(grid: Grid, device: torch.device, config: Config, vocab_size: int, victim: int) -> dict[str, int]:
    """Digests after a step, one bit of one weight of rank ``victim`` being flipped before."""
    engine = build(config, grid, device, vocab_size)
    batch = batches(config, vocab_size, 1)[0]
    engine.step(share(batch, grid.data.rank, grid.data.size, 1), Counts(50), 0, 1e-3)
    if grid.world.rank == victim:
        draw = random.Random(SEED)
        flat = engine.model.flat
        norms = [
            (index, bucket.place(slot)) for index, bucket in enumerate(flat.layout.buckets) for slot in bucket.slots
            if slot.spec.name.endswith("norm.weight")
        ]  # fmt: skip
        index, place = draw.choice(norms)
        with flat.weights.whole(index) as whole:
            whole[place][:1].view(torch.int32)[0] ^= 1 << draw.randrange(32)
    return _digests(engine)


def test_one_flipped_bit_in_one_replica_is_seen() -> None:
    cell = parse("2x1x2+zero1")
    config, vocab_size = scaled_down(Config())
    config = check(cell.apply(replace(config, data=replace(config.data, seed=SEED))), cell.world)
    for victim in (-1, 0, 3):
        found = threads.run(config, cell.world, corrupted, config, vocab_size, victim)
        assert _disagreements(found) == (victim >= 0), f"{victim=} {SEED=}"
