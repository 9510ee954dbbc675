"""Seeded faults of the Triton kernels: each must apply, and the tests named in its patch must fail with it.

    python tests/mutants/triton/check.py [NAME ...]

Every patch is applied to a copy of the tree, where its tests run in triton's interpreter. Exits with 1, and a line for
each, when a patch no longer applies or a fault survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def survives(patch: Path) -> str:
    """Why ``patch`` is not killed, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        skip = shutil.ignore_patterns("__pycache__", "mutants", "*.pyc")
        for part in ("megapre", "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", root)
        done = subprocess.run(["git", "apply", str(patch)], cwd=root, capture_output=True, text=True)
        if done.returncode:
            return f"does not apply: {done.stderr.strip()}"
        tests = re.findall(r"^Killed by: (\S+)", patch.read_text(), re.M)
        command = [sys.executable, "-m", "pytest", "-x", "-m", "not nightly and not gpu", "-W", "ignore", *tests]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        failed = done.returncode == 1 and "1 failed" in done.stdout
        return "" if failed else f"survives {' '.join(tests)} (pytest exit {done.returncode})"


def main(names: list[str]) -> int:
    """Check the named patches, or all; the exit status."""
    patches = [HERE / f"{name}.patch" for name in names] or sorted(HERE.glob("*.patch"))
    alive = 0
    for patch in patches:
        fault = survives(patch)
        print(f"{patch.stem}: {fault or 'killed'}", flush=True)
        alive += bool(fault)
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
