"""Plants every seeded bug and runs the tests that must notice it.

    python -m tests.museum.run [--quick | --healthy] [--jobs N] [NAME ...]

Each mutant is planted in a copy of megapre/, tests/ and csrc/ and judged in a child forked from this process, which
has torch loaded but nothing of megapre: the child imports the mutated tree and runs the named tests with pytest. Exits
with 1 when a mutant no longer applies, a named test does not exist or cannot run, or a mutant survives one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.museum.mutant import Mutant
from tests.museum.table import ALL, QUICK

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("megapre", "tests", "csrc")
SECONDS = 600
CONTROL = Mutant(
    "control", "megapre/parallel/placement.py", "import", "import", "tests/parallel/test_layout.py", "changes nothing"
)


@dataclass
class Verdict:
    """What became of a mutant: "" when every named test failed, else why it proves nothing."""

    name: str
    fault: str
    seconds: float


def plant(mutant: Mutant, folder: Path) -> None:
    """Make ``folder`` a tree with the mutant in it; ValueError when it does not apply."""
    source = ROOT / mutant.file
    text = source.read_text() if source.exists() else ""
    if mutant is not CONTROL and (text.count(mutant.old) != 1 or mutant.old == mutant.new):
        raise ValueError(f"does not apply: its text is {text.count(mutant.old)} times in {mutant.file}")
    for entry in ROOT.iterdir():
        if entry.name in COPIED or entry.name == Path(mutant.file).parts[0]:  # never write through a link
            shutil.copytree(entry, folder / entry.name)
        elif not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    if mutant is not CONTROL:
        (folder / mutant.file).write_text(text.replace(mutant.old, mutant.new))


class Count:
    """Outcome of every test, by its name; a test that fails before or after its body is an error."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.broken: list[str] = []
        self.passed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            (self.failed if report.failed else self.passed).append(report.nodeid)
        elif report.failed:
            self.broken.append(report.nodeid)


def child(tree: Path, tests: list[str], result: Path) -> None:
    """Run ``tests`` on ``tree`` and write what happened; never returns."""
    os.setsid()
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "MEGAPRE_HEALTHY_CSRC": str(ROOT / "csrc")}
    if any("triton" in test for test in tests):
        os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "megapre")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, tree))]
    torch.set_num_threads(1)
    import megapre.verify.pool

    assert Path(megapre.__file__).is_relative_to(tree), f"{megapre.__file__} is not the mutant"
    megapre.verify.pool.START = "fork"  # ranks inherit what is loaded here
    count = Count()
    code = pytest.main(["-q", "-x", "--tb=short", f"--rootdir={tree}", "-o", "pythonpath=", *tests], plugins=[count])
    result.write_text(json.dumps([int(code), count.failed, count.broken, count.passed]))
    os._exit(0)


def judge(mutant: Mutant, folder: Path) -> str:
    """"" when every named test fails on ``mutant``, else why not."""
    try:
        plant(mutant, folder / "tree")
    except ValueError as problem:
        return str(problem)
    for number, test in enumerate(mutant.tests):
        result = folder / str(number)
        outcome = outcome_of(folder / "tree", [test], result)
        if outcome is None:
            return f"{test} did not end: {_tail(result)}"
        code, failed, broken, passed = outcome
        if failed:
            continue
        if broken or not passed:
            return f"{test} does not exist or cannot run (pytest {code}): {_tail(result)}"
        return f"survives {test}"
    return ""


def outcome_of(tree: Path, tests: list[str], result: Path) -> tuple[int, list[str], list[str], list[str]] | None:
    """Pytest's exit code and the tests that failed, broke and passed; None when the child gave no answer."""
    pid = os.fork()
    if not pid:
        try:
            child(tree, tests, result)
        finally:
            os._exit(1)
    deadline = time.monotonic() + SECONDS
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.05)
    status = ended[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        return 1, tests, [], []  # a rank, which is a thread of the child, read memory that was freed
    try:
        os.killpg(pid, signal.SIGKILL)  # ranks that a failed test left behind
    except ProcessLookupError:
        pass
    return tuple(json.loads(result.read_text())) if result.exists() else None


def _tail(result: Path) -> str:
    log = result.with_suffix(".log")
    return log.read_text(errors="replace")[-1500:] if log.exists() else ""


def judged(mutants: list[Mutant], jobs: int) -> list[Verdict]:
    """A verdict for each mutant, ``jobs`` at a time, told as they come."""
    waiting, running, verdicts = list(mutants), dict[int, tuple[Mutant, Path, float]](), []
    with tempfile.TemporaryDirectory() as base:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop(0)
                folder = Path(tempfile.mkdtemp(dir=base))
                (folder / "tree").mkdir()
                pid = os.fork()
                if not pid:
                    fault = "the judge failed"
                    try:
                        fault = judge(mutant, folder)
                    finally:
                        (folder / "fault").write_text(fault)
                        os._exit(0)
                running[pid] = (mutant, folder, time.monotonic())
            pid, _ = os.wait()
            mutant, folder, start = running.pop(pid)
            verdicts.append(Verdict(mutant.name, (folder / "fault").read_text(), time.monotonic() - start))
            shutil.rmtree(folder)
            last = verdicts[-1]
            print(f"{last.name}: {last.fault or 'killed by ' + ' and '.join(mutant.tests)} ({last.seconds:.0f} s)",
                  flush=True)  # fmt: skip
    return verdicts


def healthy(mutants: list[Mutant]) -> int:
    """Run every named test on the healthy tree, in this process' place; pytest's exit code."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    plain = [test for test in tests if "triton" not in test]
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", *plain], cwd=ROOT).returncode
    if len(plain) < len(tests):
        rest = [test for test in tests if "triton" in test]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", *rest]
        code = code or subprocess.run(command, cwd=ROOT, env=environment).returncode
    return code


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="plant seeded bugs and see which tests notice them")
    parser.add_argument("names", nargs="*", help="mutants; all when none is named")
    parser.add_argument("--quick", action="store_true", help="those of `make test`")
    parser.add_argument("--healthy", action="store_true", help="run the named tests on the healthy tree instead")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known = {mutant.name: mutant for mutant in ALL}
    unknown = set(args.names) - set(known)
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [known[name] for name in (args.names or (QUICK if args.quick else known))]
    if args.healthy:
        return healthy(chosen)
    verdicts = judged([CONTROL, *chosen], args.jobs)
    control = next(verdict for verdict in verdicts if verdict.name == CONTROL.name)
    bad = [verdict for verdict in verdicts if verdict.fault and verdict is not control]
    if not control.fault.startswith("survives"):
        print(f"the control, which changes nothing, did not survive: {control.fault}")
        return 1
    print(f"mutants: {len(chosen)}, killed: {len(chosen) - len(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
