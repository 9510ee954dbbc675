"""The environment that `make nightly LANE=data` makes: MPI, and an S3 server on this machine."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "extras"


def extra_python(*modules: str) -> str:
    """A Python that has ``modules`` beside this one's packages; skips, with the reason, where it is not there."""
    python = FOLDER / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{FOLDER} is missing: make nightly LANE=data makes it")
    done = subprocess.run([python, "-c", f"import {', '.join(modules)}"], env=environment(), capture_output=True)
    if done.returncode:
        pytest.skip(f"{FOLDER} has not all of {', '.join(modules)}")
    return str(python)


def environment(**more: str) -> dict[str, str]:
    """This process's variables, with this project and the packages of this Python behind those of the extra one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")]), **more}
