"""The wrappers of megapre/kernels/cuda.py on CPU tensors: their library is the SIMT tier's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megapre.kernels import cuda
from tests.kernels.simt import build, tape


class Machine:
    """The SIMT machine: settings, and every call made on it."""

    def __init__(self, path: Path) -> None:
        self.library = build.load(path)
        self.recording: tape.Tape | None = None
        self.configure()

    def configure(self, order: str = "forward", early: bool = False, seed: int = 0, limit: int = build.SHARED_LIMIT):
        self.library.simt_configure(build.ORDERS[order], seed, int(early), limit)

    def call(self, name, *arguments, refusal=0):
        """In place of ``cuda._call``: on tensors of the CPU, and a failure of the machine is an AssertionError."""
        if self.recording is not None:
            self.recording.add(name, arguments)
        code = getattr(self.library, name)(*tape.raw(arguments), None)
        error = self.library.simt_take_error().decode()
        assert not error, error
        assert code in (0, refusal)
        return code


@pytest.fixture(scope="session")
def machine() -> Machine:
    if build.missing():
        pytest.skip(build.missing())
    return Machine(build.build())


@pytest.fixture
def simt(machine, monkeypatch):
    """The machine in forward order with late copies and two multiprocessors; a test may reconfigure it."""
    monkeypatch.setattr(cuda, "_call", machine.call)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 2)
    machine.configure()
    return machine
