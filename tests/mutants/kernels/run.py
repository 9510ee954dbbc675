"""Seeded mutants of csrc: each patch is applied to a copy, and every test that it names must fail on it.

python -m tests.mutants.kernels.run [PATCH ...] prints one line a mutant and exits 1 where a patch does not apply, a
mutant does not compile, or a named test passes. A patch begins with lines ``Killed-by: [asan|tsan|early] CASE`` naming
cases of tests/kernels/simt/cases.py; without a sanitizer's name the case's own comparison must fail, with ``early``
when cp.async lands as it is issued.
"""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megapre.kernels import cuda
from tests.kernels.simt import build, cases, tape
from tests.kernels.simt.conftest import Machine
from tests.kernels.simt.test_sanitizers import replay, runtime

HERE = Path(__file__).resolve().parent
PATCHES = sorted(path.stem for path in HERE.glob("*.patch"))
CASES = {**cases.SHORT, **cases.LONG}


class Unusable(Exception):
    """The mutant proves nothing: its patch does not apply, or its code does not compile."""


def names(patch: str) -> list[str]:
    """What must kill a mutant."""
    text = (HERE / f"{patch}.patch").read_text()
    return [line.removeprefix("Killed-by: ") for line in text.splitlines() if line.startswith("Killed-by: ")]


def mutate(patch: str, folder: Path) -> Path:
    """csrc with the patch applied, under ``folder``."""
    csrc = folder / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    command = ["patch", "-p1", "--fuzz=0", "-s", "-i", str(HERE / f"{patch}.patch")]
    result = subprocess.run(command, cwd=csrc, capture_output=True, text=True)
    if result.returncode:
        raise Unusable(f"does not apply: {result.stdout.strip()}")
    return csrc


def passes(library: Path, case: str, early: bool = False) -> bool:
    """Whether a case passes on a library, in a process of its own: a mutant may crash."""
    process = multiprocessing.get_context("fork").Process(target=_check, args=(library, case, early))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def _check(library: Path, case: str, early: bool) -> None:
    sys.stdout = sys.stderr = None
    torch.use_deterministic_algorithms(True)  # torch.empty holds NaN
    with pytest.MonkeyPatch.context() as patch:
        _machine(library, patch).configure(early=early)
        try:
            cases.check(CASES[case])
        except AssertionError:
            sys.exit(1)


def _machine(library: Path, patch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(library)
    patch.setattr(cuda, "_call", machine.call)
    patch.setattr(cuda, "multiprocessors", lambda device: 2)
    return machine


def clean_under(kind: str, library: Path, case: str, folder: Path) -> bool:
    """Whether the calls of a case, recorded on the true library, replay without a report."""
    recorded = folder / "tape"
    with pytest.MonkeyPatch.context() as patch:
        machine = _machine(build.build(), patch)
        machine.recording = tape.Tape()
        cases.check(CASES[case])
        machine.recording.write(recorded)
    result = replay(kind, library, recorded)
    return result.returncode == 0 and "Sanitizer" not in result.stderr


def survivors(patch: str) -> list[str]:
    """The named tests that a mutant survives; Unusable where the mutant proves nothing."""
    alive = []
    with tempfile.TemporaryDirectory() as name:
        csrc = mutate(patch, Path(name))
        for killer in names(patch):
            kind, _, case = killer.rpartition(" ")
            early, kind = kind == "early", kind.removeprefix("early")
            if kind and runtime(kind) is None:
                continue
            try:
                library, true = build.build(kind or "plain", csrc), build.build(kind or "plain")
            except RuntimeError as error:
                raise Unusable(str(error)) from error

            def run(lib: Path, kind: str = kind, case: str = case, early: bool = early) -> bool:
                return clean_under(kind, lib, case, Path(name)) if kind else passes(lib, case, early)

            if not run(true):
                raise Unusable(f"{killer} fails without the mutant too")
            if run(library):
                alive.append(killer)
    return alive


def main(patches: list[str]) -> int:
    """Exit code: 0 when every mutant is killed by all that it names."""
    code = 0
    for patch in patches or PATCHES:
        try:
            alive = survivors(patch)
            verdict = f"SURVIVES {alive}" if alive or not names(patch) else f"killed by {names(patch)}"
            code |= bool(alive) or not names(patch)
        except Unusable as error:
            verdict, code = f"UNUSABLE: {error}", 1
        print(f"{patch}: {verdict}", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
