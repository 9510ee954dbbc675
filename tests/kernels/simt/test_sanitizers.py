"""The short list again under AddressSanitizer and ThreadSanitizer, each in a process of its own.

The calls are recorded here and replayed there. ASan sees accesses outside global buffers and shared arrays; TSan sees
two threads of a launch, of one block or of two, that touch one place without a barrier between.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.kernels.simt import build, cases, tape
from tests.kernels.simt.conftest import Machine

OPTIONS = {
    "asan": {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
    "tsan": {"TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66:history_size=3"},
}


def runtime(kind):
    """Path of the sanitizer's runtime, or None."""
    found = subprocess.run(
        [build.compiler(), f"-print-file-name=lib{kind}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A tape of the short list."""
    if build.missing():
        pytest.skip(build.missing())
    machine, path = Machine(build.build(csrc=build.HEALTHY)), tmp_path_factory.mktemp("tape") / "tape"
    with pytest.MonkeyPatch.context() as patch:
        from megapre.kernels import cuda

        patch.setattr(cuda, "_call", machine.call)
        patch.setattr(cuda, "multiprocessors", lambda device: 2)
        machine.recording = tape.Tape()
        for case in cases.SHORT.values():
            cases.check(case)
        machine.recording.write(path)
    return path


def replay(kind, library, recorded, order="forward", early=False, seed=1):
    """Result of a replay; the address space is not randomised, which TSan's shadow of older releases needs."""
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "replay.py"), str(recorded), str(library)]
    command += [str(build.ORDERS[order]), str(seed), str(int(early))]
    if shutil.which("setarch") and kind == "tsan":
        command = ["setarch", "-R", *command]
    environment = {**os.environ, **OPTIONS[kind], "LD_PRELOAD": runtime(kind)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def check(kind, recorded, order, early):
    if runtime(kind) is None:
        pytest.skip(f"this compiler has no lib{kind}")
    result = replay(kind, build.build(kind), recorded, order, early)
    report = result.stdout[-500:] + result.stderr[-4000:]
    assert result.returncode == 0 and "replayed" in result.stdout and "Sanitizer" not in result.stderr, report


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_short_list(kind, recorded):
    check(kind, recorded, "forward", early=False)


@pytest.mark.nightly
@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_short_list_in_other_orders(kind, order, recorded):
    check(kind, recorded, order, early=True)
