"""Real ranks: exit codes, restarts after kill -9, signals, no orphans, loopback only."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from megapre.resilience.launcher import combine

SCRIPT = Path(__file__).with_name("launched.py")
Start = Callable[..., "Job"]


class Job:
    """A launched job whose output grows in a file."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.log = folder / f"{len(list(folder.iterdir()))}.txt"
        env = {k: v for k, v in os.environ.items() if k != "LOGLEVEL"} | {"PYTHONPATH": str(SCRIPT.parents[2])}
        with self.log.open("wb") as log:
            command = [sys.executable, str(SCRIPT), *map(str, arguments)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self, rank: int | None = None) -> list[int]:
        return [int(pid) for r, pid in re.findall(r"up rank=(\d+) pid=(\d+)", self.text()) if rank in (None, int(r))]

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.text()
            time.sleep(0.02)

    def code(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def begin(*arguments: object) -> Job:
        jobs.append(Job(tmp_path, *arguments))
        return jobs[-1]

    yield begin
    for job in jobs:
        try:
            os.killpg(job.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody reaped counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def process_named(part: str, parent: int) -> int:
    """The child of ``parent`` whose command line holds ``part``."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (path / "stat").read_text(), (path / "cmdline").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and part in command:
            return int(path.name)
    raise AssertionError(f"{parent} has no child {part}")


def dies_of(pid: int, number: int) -> bool:
    """Whether a signal would end a process: it neither blocks, ignores nor handles it."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return not any(int(status[name], 16) >> (number - 1) & 1 for name in ("SigBlk", "SigIgn", "SigCgt"))


def test_codes_combine() -> None:
    assert combine([0, 0]) == 0
    assert combine([0, 75]) == 75
    assert combine([75, 2]) == 2
    assert combine([2, 75, 3]) == 1


def test_returned_codes_are_final(start: Start) -> None:
    jobs = {code: start(2, "return", code) for code in (0, 2, 75)}
    for code, job in jobs.items():
        assert job.code() == code, job.text()
        assert len(job.pids()) == 2 and "restart" not in job.text() and "killed" not in job.text()
        assert set(re.findall(r"threads=(\d+)", job.text())) == {"1"}


def test_kill_9_restarts_every_rank_and_then_a_stop_saves(start: Start) -> None:
    job = start(3, "loop")
    for attempt in (1, 2):
        job.until(lambda n=attempt: len(job.pids()) == 3 * n)  # type: ignore[misc]
        before = time.monotonic()
        os.kill(job.pids(rank=1)[-1], signal.SIGKILL)
        job.until(lambda n=attempt: len(job.pids()) == 3 * (n + 1))  # type: ignore[misc]
        assert time.monotonic() - before < 15
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75, job.text()
    assert "rank 1 was killed by a signal" in job.text() and "restart 2 of 2" in job.text()
    assert "saved after SIGTERM" in job.text()


def test_a_rank_that_dies_before_it_is_known_does_not_leave_the_others_waiting(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent alone would wait for 30 s: its SIGTERM means nothing to a rank that waits for its peers."""
    monkeypatch.setenv("DIE_EARLY", str(tmp_path / "died"))
    job = start(3, "loop")
    job.until((tmp_path / "died").exists)
    before = time.monotonic()
    job.until(lambda: len(job.pids()) == 3)
    assert time.monotonic() - before < 20, job.text()
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75, job.text()
    text = job.text()
    assert text.count("was killed by a signal as it started") == 1 and "restart 1 of 2" in text, text
    assert "Traceback" not in text and text.count("restart") == 1, text


def test_a_node_waits_for_node_0_as_long_as_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that copies its data first (`data.stage`) comes minutes later than the others."""
    from torch.distributed.elastic.rendezvous.api import RendezvousParameters

    from megapre.resilience import rendezvous

    waits: list[float] = []

    class Store:
        def __init__(self, *place: object, timeout: timedelta, **options: object) -> None:
            waits.append(timeout.total_seconds())

        def set_timeout(self, timeout: timedelta) -> None:
            waits.append(timeout.total_seconds())

    monkeypatch.setattr("torch.distributed.TCPStore", Store)
    monkeypatch.setattr("torch.distributed.elastic.rendezvous.dynamic_rendezvous.create_handler", lambda *told: told)
    backend = "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend.C10dRendezvousBackend.__init__"
    monkeypatch.setattr(backend, lambda self, store, run: None)
    parameters = RendezvousParameters(rendezvous.BACKEND, "127.0.0.1:1", "run", 2, 2, is_host=False, join_timeout=345)
    rendezvous.meeting(parameters)
    assert waits == [345, 60]


@pytest.mark.nightly
def test_a_survivor_that_does_not_notice_is_ended_within_the_grace(start: Start) -> None:
    job = start(2, "deaf")
    job.until(lambda: len(job.pids()) == 2)
    before = time.monotonic()
    os.kill(job.pids(rank=1)[0], signal.SIGKILL)
    job.until(lambda: len(job.pids()) == 4)
    assert time.monotonic() - before < 20


def test_signals_reach_the_ranks_even_when_every_process_gets_them(start: Start) -> None:
    """A scheduler signals the fork server too, which must not die of it: its ranks would."""
    jobs = {number: start(2, "loop") for number in (signal.SIGUSR1, signal.SIGTERM)}
    for number, job in jobs.items():
        job.until(lambda job=job: len(job.pids()) == 2)  # type: ignore[misc]
        for helper in ("resource_tracker", "forkserver"):
            assert not dies_of(process_named(helper, job.process.pid), signal.SIGUSR1), helper
        os.killpg(job.process.pid, number)
    for number, job in jobs.items():
        assert job.code() == 75, job.text()
        assert f"saved after {number.name}" in job.text() and "killed" not in job.text(), job.text()
        assert "Traceback" not in job.text() and "unexpectedly" not in job.text(), job.text()


def test_a_stop_that_came_before_the_launcher_took_over_is_passed_on(start: Start) -> None:
    job = start(2, "early-stop")
    assert job.code() == 75, job.text()
    assert "saved after SIGTERM" in job.text()


def test_a_stop_during_the_start_is_not_lost(start: Start) -> None:
    jobs = [start(2, "loop") for _ in range(3)]
    for number, job in enumerate(jobs):
        job.until(lambda job=job: _catches(job.process.pid))  # type: ignore[misc]
        time.sleep(0.3 * number)
        os.kill(job.process.pid, signal.SIGUSR1)
    for job in jobs:
        assert job.code() == 75, job.text()


def _catches(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def test_a_crash_that_all_share_is_printed_once_an_attempt(start: Start) -> None:
    job = start(3, "all-raise")
    assert job.code() == 1
    assert job.text().count("Traceback") == 3 and job.text().count("invalid for input of size") == 3, job.text()
    assert "restart 2 of 2" in job.text()


def test_a_refusal_is_final_even_when_the_others_wait(start: Start) -> None:
    job = start(2, "refuse-one")
    assert job.code() == 2, job.text()
    assert job.text().count("megapre: the job is bad on one rank") == 1 and "Traceback" not in job.text()


def test_no_orphans_when_the_supervisor_is_killed(start: Start) -> None:
    job = start(2, "loop")
    job.until(lambda: len(job.pids()) == 2)
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    end = time.monotonic() + 10
    while not all(gone(pid) for pid in job.pids()):
        assert time.monotonic() < end, "ranks outlive their supervisor"
        time.sleep(0.05)


def test_one_host_listens_on_loopback_only(start: Start) -> None:
    job = start(2, "loop")
    job.until(lambda: len(job.pids()) == 2)
    links = [link for pid in [job.process.pid, *job.pids()] for link in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = {os.readlink(link) for link in links if link.is_symlink()}
    inodes = {text[8:-1] for text in sockets if text.startswith("socket:[")}
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert listening and set(listening) <= {"0100007F"}, listening
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75


def test_two_supervisors_share_a_world(tmp_path: Path) -> None:
    """Two nodes on one host: ranks 0-1 and 2-3, a kill on one node restarts both, a stop on one ends both."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import launched; from megapre.resilience.launcher import launch;"
        "sys.exit(launch(4, launched.rank_main, ['loop'], nnodes=2, node_rank=int(sys.argv[2]), port=int(sys.argv[3]),"
        "max_restarts=2, threads=1))"
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{SCRIPT.parents[2]}:{SCRIPT.parent}"}
    logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    nodes = [
        subprocess.Popen([sys.executable, "-c", code, str(SCRIPT.parent), str(n), str(port)], env=env,
                         stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True)
        for n, log in enumerate(logs)
    ]

    def up(rank: int) -> list[int]:
        return [int(p) for log in logs for p in re.findall(rf"up rank={rank} pid=(\d+)", log.read_text())]

    def wait_for(count: int) -> None:
        end = time.monotonic() + 90
        while not all(len(up(rank)) >= count for rank in range(4)):
            assert time.monotonic() < end, [log.read_text() for log in logs]
            time.sleep(0.1)

    try:
        wait_for(1)
        os.kill(up(3)[-1], signal.SIGKILL)
        wait_for(2)
        nodes[1].send_signal(signal.SIGTERM)
        assert [node.wait(60) for node in nodes] == [75, 75], [log.read_text() for log in logs]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
