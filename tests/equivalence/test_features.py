"""Layouts x features, drawn anew in every session: every pair of the engine's axes at once, on models of every kind.

Shapes are hostile by default (``verify/cells.py``): uneven target tokens, a vocabulary and layers that no axis divides,
odd head sizes, at least 3 buckets, active clipping, two epochs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig
from megapre.verify.cells import Cell, scaled_down
from megapre.verify.matrix import candidates, options, pairs
from megapre.verify.run import Prover
from tests.equivalence.conftest import allowed

SEED = random.SystemRandom().randrange(10**6)
RANKS, JOBS, NIGHTLY = 8, 6, 200


def drawn_job(seed: int) -> Config:
    """A model, data and number format put together at random."""
    draw = random.Random(seed).choice
    encoder = draw([False, False, True])
    model = ModelConfig(
        architecture="encoder" if encoder else "decoder",
        norm=draw(["layernorm", "rmsnorm"]),
        activation=draw(["gelu", "swiglu"]),
        positions=draw(["learned", "rope", "none"]),
        heads=4,
        kv_heads=draw([1, 2, 4]),
        bias=draw([True, False]),
        tied_embeddings=draw([True, False]),
        parallel_block=draw([True, False]),
        dropout=draw([0.0, 0.1]),
        attention_dropout=draw([0.0, 0.1]),
    )
    data = DataConfig(objective="masked" if encoder else "causal", seed=seed)
    documents = draw([True, False])
    data = replace(data, reset_positions=documents, reset_attention=documents)
    precision = PrecisionConfig(dtype=draw(["fp32", "bf16", "fp16"]))
    return Config(model=model, data=data, precision=precision, optimizer=OptimizerConfig(lr=3e-3))


MADE = [scaled_down(drawn_job(SEED + n)) for n in range(JOBS)]


def dealt(cells: list[Cell]) -> list[tuple[int, Cell]]:
    """Each cell with the next job that allows it."""
    turns = cycle(range(JOBS))
    found = []
    for cell in cells:
        for number in (next(turns) for _ in range(JOBS)):
            if allowed(MADE[number][0], cell):
                found.append((number, cell))
                break
    return found


# Multi-head attention allows every layout, whatever was drawn.
ANY = scaled_down(Config())[0]
DRAWN = [cell for cell in random.Random(SEED).sample(list(candidates(RANKS)), 1200) if allowed(ANY, cell)]
COVER, MORE = pairs(DRAWN, SEED), DRAWN[:NIGHTLY]


@pytest.fixture(scope="module")
def provers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Prover]:
    made: dict[int, Prover] = {}

    def prover(number: int) -> Prover:
        if number not in made:
            made[number] = Prover(*MADE[number], None, Path(tmp_path_factory.mktemp(f"job{number}")))
        return made[number]

    return prover


def prove(prover: Prover, cell: Cell) -> None:
    for arm, _, (name, error, limit) in prover.both(cell):
        where = f"{cell} arm {arm}: {name} is off by {error:.2e}, limit {limit:.2e}; {SEED=}"
        assert error <= limit, f"{where}\n{prover.config.model}\n{prover.config.data}\n{prover.config.precision}"


@pytest.mark.parametrize(("job", "cell"), dealt(COVER), ids=str)
def test_every_pair_of_axes(job: int, cell: Cell, provers: Callable[[int], Prover]) -> None:
    prove(provers(job), cell)


@pytest.mark.nightly
@pytest.mark.parametrize(("job", "cell"), dealt(MORE), ids=str)
def test_more_layouts(job: int, cell: Cell, provers: Callable[[int], Prover]) -> None:
    prove(provers(job), cell)


def test_the_cover_is_wide() -> None:
    """Hardly a pair is lost to jobs that allow fewer layouts; many cells hold three axes and more."""
    cells = [cell for _, cell in dealt(COVER)]
    assert len(cells) >= 0.8 * len(COVER), f"{SEED=}"
    assert sum(len(options(cell)) >= 3 for cell in cells) >= 6, f"{SEED=}"
