"""What the tests of layouts share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megapre.config.check import ConfigError, check
from megapre.config.schema import Config
from megapre.verify.cells import Cell, scaled_down
from megapre.verify.run import Prover


def allowed(config: Config, cell: Cell) -> bool:
    """Whether a job of this size may run in a layout."""
    try:
        check(cell.apply(config), cell.world)
    except ConfigError:
        return False
    return True


@pytest.fixture(scope="module")
def provers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prover]:
    """One prover per job of the module's ``JOBS``, with threads for ranks: oracle and baseline are computed once."""
    made: dict[str, Prover] = {}

    def prover(name: str) -> Prover:
        if name not in made:
            made[name] = Prover(*scaled_down(request.module.JOBS[name]), None, Path(tmp_path_factory.mktemp(name)))
        return made[name]

    return prover


@pytest.fixture(scope="module")
def agree(provers: Callable[[str], Prover]) -> Callable[[str, Cell, bool], None]:
    """Holds a job on a layout to the oracle in fp64 and, where asked, in its own number format and kernels."""

    def compare(job: str, cell: Cell, both: bool) -> None:
        prover = provers(job)
        for arm, _, (name, error, limit) in prover.both(cell) if both else [("A", *prover.layout(cell))]:
            assert error <= limit, f"{job} {cell} arm {arm}: {name} is off by {error:.2e}, limit {limit:.2e}"

    return compare
