"""Every job of examples/objectives is what the oracle computes: each on one layout, in the nightly lane on four.

The nightly test is the command of docs/learning.md that anyone can run on a job file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megapre.config.load import load
from megapre.verify.cells import parse, scaled_down
from megapre.verify.run import Prover
from tests.equivalence.conftest import allowed

ROOT = Path(__file__).resolve().parents[2]
JOBS = {path.stem: load(path) for path in sorted((ROOT / "examples" / "objectives").glob("*.toml"))}
LAYOUTS = ("2x1x1+sp", "1x2x2+zero3", "1x1x1+ring:2", "2x2x1+zb-h1", "1x1x4+zero1+recompute:full")
EACH = 4


def four(name: str) -> list[str]:
    """The first of ``LAYOUTS`` that the job allows."""
    small = scaled_down(JOBS[name])[0]
    return [layout for layout in LAYOUTS if allowed(small, parse(layout))][:EACH]


@pytest.mark.parametrize("name", JOBS)
def test_an_example_agrees_with_the_oracle(name: str, provers: Callable[[str], Prover]) -> None:
    quantity, error, limit = provers(name).layout(parse(LAYOUTS[1]))[1]
    assert error <= limit, f"{name}: {quantity} is off by {error:.2e}, limit {limit:.2e}"


@pytest.mark.nightly
@pytest.mark.parametrize("name", JOBS)
def test_verify_proves_an_example_on_four_layouts(name: str) -> None:
    job, layouts = f"examples/objectives/{name}.toml", ",".join(four(name))
    command = [sys.executable, "-m", "megapre", "verify", job, "--layouts", layouts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"layouts: {EACH}, failures: 0" in done.stdout, done.stdout + done.stderr


def test_every_example_allows_four_layouts() -> None:
    assert all(len(four(name)) == EACH for name in JOBS)
