"""Which layouts verify runs: every combination of the engine's axes, or few that hold every pair of options.

An axis is a line of ``AXES``: a new one adds its options there and is then combined with all the others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from megapre.config.check import ConfigError, check
from megapre.config.schema import Config
from megapre.verify.cells import Cell, parse


@dataclass(frozen=True)
class AxisOptions:
    """What one axis may be, in the notation of layouts; ``""`` is its absence."""

    name: str
    options: tuple[str, ...]
    acts: Callable[[Cell], bool]
    """Whether the options do anything on a layout; where they do not, only ``""`` is run."""


AXES = (
    AxisOptions("context", ("", "ring:2", "ring:4", "ulysses:2", "ulysses:4"), lambda cell: True),
    AxisOptions("expert", ("", "ep:2", "ep:4"), lambda cell: cell.tensor * cell.data * cell.context > 1),
    AxisOptions("expert_tensor", ("", "etp:2"), lambda cell: cell.tensor > 1 and cell.expert > 1),
    AxisOptions("sequence", ("", "sp"), lambda cell: cell.tensor > 1),
    AxisOptions("zero", ("", "zero1", "zero2", "zero3"), lambda cell: cell.data * cell.context > 1),
    AxisOptions("offload", ("", "offload", "offload-parameters"), lambda cell: True),
    AxisOptions("schedule", ("", "gpipe", "interleaved:2", "zb-h1", "zb-v:2"), lambda cell: cell.pipeline > 1),
    AxisOptions("recompute", ("", "recompute:selective", "recompute:full"), lambda cell: True),
)
SIZES = ("tensor", "pipeline", "data")


@dataclass(frozen=True)
class Matrix:
    """Layouts to run, and how often each sentence of ``config/check.py`` refused one."""

    cells: list[Cell]
    refused: Counter[str]


def options(cell: Cell) -> dict[str, str]:
    """What ``cell`` uses of each axis, sizes of 1 and absent options left out."""
    used = {name: str(getattr(cell, name)) for name in SIZES if getattr(cell, name) > 1}
    for option in str(cell).split("+")[1:]:
        used[_axis_of(option)] = option
    return used


def _axis_of(option: str) -> str:
    for axis in AXES:
        if option in axis.options or option.split(":")[0] in {known.split(":")[0] for known in axis.options if known}:
            return axis.name
    return option.split(":")[0]


def without(cell: Cell, axis: str) -> Cell:
    """``cell`` with one axis gone, and with it what has nothing left to act on."""
    left = {name: option for name, option in options(cell).items() if name != axis}
    smaller = _cell(left)
    acts = {known.name: known.acts for known in AXES}
    return _cell({name: option for name, option in left.items() if name in SIZES or acts[name](smaller)})


def _cell(used: dict[str, str]) -> Cell:
    sizes = "x".join(used.get(name, "1") for name in SIZES)
    return parse("+".join([sizes, *(option for name, option in used.items() if name not in SIZES)]))


def candidates(ranks: int, experts: bool = False) -> Iterator[Cell]:
    """Every distinct layout of up to ``ranks`` ranks, with those of ``experts`` or without; sizes are powers of two."""
    choices = [axis.options if experts or not axis.name.startswith("expert") else ("",) for axis in AXES]
    sizes = [2**k for k in range(ranks.bit_length()) if 2**k <= ranks]
    for tensor, pipeline, data in product(sizes, repeat=3):
        if tensor * pipeline * data > ranks:
            continue
        for chosen in product(*choices):
            cell = parse("+".join([f"{tensor}x{pipeline}x{data}", *filter(None, chosen)]))
            idle = any(option and not axis.acts(cell) for axis, option in zip(AXES, chosen))
            if cell.world <= ranks and not idle:
                yield cell


def matrix(config: Config, ranks: int) -> Matrix:
    """All layouts of ``candidates`` that ``config`` allows."""
    cells, refused = [], Counter[str]()
    for cell in candidates(ranks, config.model.experts > 0):
        try:
            check(cell.apply(config), cell.world)
            cells.append(cell)
        except ConfigError as problem:
            refused[str(problem)] += 1
    return Matrix(cells, refused)


def pairs(cells: Sequence[Cell], seed: int, done: Iterable[Cell] = ()) -> list[Cell]:
    """Few of ``cells`` in which every two options that occur together in any of them do so at least once.

    A greedy cover (Cohen et al., IEEE TSE 23(7), 1997), drawn from ``seed``: of equals the smaller layout comes first.
    What ``done`` covers already need not be covered again.
    """
    draw = random.Random(seed)
    order = sorted(cells, key=lambda cell: (cell.world, draw.random()))
    covers = {cell: _pairs(cell) for cell in order}
    open_pairs = set[tuple[tuple[str, str], ...]]().union(*covers.values())
    for cell in done:
        open_pairs -= _pairs(cell)
    chosen = []
    while open_pairs:
        best = max(order, key=lambda cell: len(covers[cell] & open_pairs))
        chosen.append(best)
        open_pairs -= covers[best]
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[str, str], ...]]:
    """Pairs of options, and every option alone."""
    used = sorted(options(cell).items())
    return {(one,) for one in used} | set(combinations(used, 2))


def smallest_failure(cell: Cell, fails: Callable[[Cell], bool]) -> Cell:
    """A layout that fails and does not without any one of its axes (Zeller's delta debugging, ESEC/FSE 1999).

    ``fails`` runs a layout; the result is ``cell`` with axes taken away, and sizes of 2 where these fail too.
    """
    while True:
        smaller = [without(cell, axis) for axis in options(cell)]
        smaller += [_cell({**options(cell), axis: "2"}) for axis in SIZES if getattr(cell, axis) > 2]
        failing = next((one for one in smaller if one != cell and fails(one)), None)
        if failing is None:
            return cell
        cell = failing


def blame(cell: Cell) -> str:
    """Which axes a smallest failing layout says are at fault, as a sentence."""
    used = options(cell)
    if not used:
        return "The unsharded run fails too: look at the model, its kernels and its number format, not at an axis."
    names = [name if name in SIZES else f"{name} ({option})" for name, option in used.items()]
    if len(names) == 1:
        return f"Axis at fault: {names[0]}. {cell} fails, the unsharded run does not."
    return f"Axes at fault, only together: {' x '.join(names)}. {cell} fails, without any one of them it does not."

