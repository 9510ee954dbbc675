"""Which layouts verify runs, and what it says of one that fails."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from megapre.config.limits import CHOICES
from megapre.config.schema import Config
from megapre.verify.cells import Cell, parse, scaled_down
from megapre.verify.matrix import AXES, blame, candidates, matrix, options, pairs, smallest_failure, without
from megapre.verify.table import Row, choose, describe, explain

SMALL = scaled_down(Config())[0]


def used(cells: list[Cell]) -> set[tuple[tuple[str, str], ...]]:
    return {pair for cell in cells for pair in combinations(sorted(options(cell).items()), 2)}


def test_names_say_all() -> None:
    cells = list(candidates(8))
    assert len({str(cell) for cell in cells}) == len(set(cells)) == len(cells) > 500
    assert all(parse(str(cell)) == cell for cell in cells)


def test_pairs_hold_every_pair_with_few_cells() -> None:
    seed = random.randrange(10**6)
    cells = matrix(SMALL, 4).cells
    few = pairs(cells, seed)
    assert used(few) == used(cells), seed
    assert len(few) < len(cells) / 10
    assert pairs(cells, seed) == few


def test_every_choice_of_the_schema_is_an_option() -> None:
    """A new schedule, ZeRO stage or policy must be added to ``AXES``."""
    known = {option.split(":")[0] for axis in AXES for option in axis.options}
    assert set(CHOICES["parallel.schedule"]) - {"1f1b"} <= known
    assert set(CHOICES["parallel.context_method"]) <= known
    assert {f"zero{stage}" for stage in CHOICES["parallel.zero"] if stage} <= known
    policies = {option.partition(":")[2] for axis in AXES for option in axis.options if axis.name == "recompute"}
    assert set(CHOICES["parallel.recompute"]) - {"none"} <= policies


def test_what_is_not_allowed_is_counted_with_its_sentence() -> None:
    found = matrix(SMALL, 4)
    assert found.refused.total() + len(found.cells) == len(list(candidates(4)))
    assert any("model.layers (5)" in sentence for sentence in found.refused)
    with pytest.raises(ValueError, match="needs a block"):
        choose(SMALL, "1x8x1", 8, 0)


@pytest.mark.parametrize(
    ("culprits", "layout", "smallest", "said"),
    [
        ({"sequence"}, "2x2x2+sp+zero1+zb-h1", "2x1x1+sp", "tensor x sequence (sp)"),
        ({"zero", "schedule"}, "2x2x2+sp+zero1+zb-v:2", "1x2x2+zero1+zb-v:2", "pipeline x data x zero (zero1)"),
        ({"context"}, "2x1x2+ring:2+sp", "1x1x1+ring:2", "Axis at fault: context (ring:2)"),
        (set(), "2x2x1+sp", "1x1x1", "not at an axis"),
    ],
)
def test_a_failure_is_stripped_to_the_axes_at_fault(culprits: set[str], layout: str, smallest: str, said: str) -> None:
    found = smallest_failure(parse(layout), lambda cell: culprits <= set(options(cell)))
    assert str(found) == smallest
    assert said in blame(found)


def test_taking_an_axis_away_takes_what_acts_on_it() -> None:
    assert str(without(parse("2x2x2+sp+zero1+zb-h1"), "tensor")) == "1x2x2+zero1+zb-h1"
    assert str(without(parse("2x2x1+sp+zb-h1"), "pipeline")) == "2x1x1+sp"


def test_explanations_name_parameter_layer_and_axis_once_each() -> None:
    def run(cell: Cell) -> list[Row]:
        bad = "sequence" in options(cell)
        error = 0.5 if bad else 1e-12
        return [Row(cell, "A fp64", "gradient/blocks.3.mlp_norm.weight", error, 1e-9, 0.1, {})]

    cells = [parse(text) for text in ("2x2x2+sp+zero1", "4x1x1+sp", "2x1x1")]
    failed = [row for cell in cells for row in run(cell) if not row.good]
    (line,) = explain(failed, run)
    assert "mlp_norm.weight in layer 4 (blocks.3)" in line and "sequence (sp)" in line and line.startswith("2x1x1+sp")


def test_a_layout_that_stops_is_reported_as_such() -> None:
    row = Row(Cell(2), "both", "", float("nan"), 0.0, 0.1, {}, "Mismatch: send on pipeline")
    assert not row.good and "stopped with Mismatch" in describe(row)
