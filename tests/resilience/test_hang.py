"""Ranks that hang without dying: found, named with their phase and stack, ended; slow ones left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from megapre.resilience.hang import FACTOR, SETTLED, Silence, phase
from megapre.resilience.pulse import ATTEMPTS, RING, PulseFile
from tests.resilience.test_launcher import Start, gone, start

__all__ = ["start"]


@pytest.fixture
def watched(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A heartbeat of 2 s and a folder for the event log."""
    log = tmp_path_factory.mktemp("log")
    monkeypatch.setenv("HEARTBEAT", "2")
    monkeypatch.setenv("LOG", str(log))
    return log


@pytest.mark.parametrize("how", ["stopped", "spin"])
def test_a_rank_that_hangs_is_named_and_all_start_again(how: str, start: Start, watched: Path) -> None:
    """Stopped by a signal, or in native code that holds the interpreter: two of three ranks wait in a collective."""
    job = start(3, "loop" if how == "stopped" else "spin")
    job.until(lambda: len(job.pids()) == 3)
    first = job.pids()
    if how == "stopped":
        time.sleep(2)
        os.kill(job.pids(rank=1)[0], signal.SIGSTOP)
    job.until(lambda: "hung" in job.text())
    end = time.monotonic() + 5
    while not all(gone(pid) for pid in first):
        assert time.monotonic() < end, "the attempt outlives the one that hung by more than 5 s"
        time.sleep(0.02)
    job.until(lambda: len(job.pids()) == 6)
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75, job.text()
    text = job.text()
    assert text.count("rank 1 hung for ") == 1 and "rank 0 hung" not in text and "rank 2 hung" not in text, text
    assert "killed by a signal" not in text and "Traceback" not in text, "one headline: the rest is its consequence"
    assert "stopped by a signal" in text if how == "stopped" else "in hold_the_interpreter" in text, text
    events = [json.loads(line) for line in (watched / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["rank"]) for event in events] == [("hang", 1)]
    assert len(events[0]["flight"]["0"]) > 10 and events[0]["flight"]["0"][-1].endswith("world all_reduce 4")


def test_a_nodes_log_holds_all_and_the_event_log_the_ends_of_each_rank(start: Start, watched: Path) -> None:
    job = start(3, "speak")
    assert job.code() == 1, job.text()
    log, said = (watched / "node_0.log").read_text(), job.text()
    for rank in range(3):
        assert log.count(f"last words of rank {rank}\n") == said.count(f"last words of rank {rank}\n") == 3
        assert len(re.findall(rf"^up rank={rank} pid=\d+ ", log, re.MULTILINE)) == 3
    assert said.count("half a line") == 3
    event = json.loads((watched / "events.jsonl").read_text().splitlines()[0])
    assert event["event"] == "killed" and event["rank"] == 1 and event["host"] == socket.gethostname()
    assert event["tails"]["1"][-1] == "last words of rank 1" and event["tails"]["0"][-1] == "last words of rank 0"


def test_a_rank_that_is_ten_times_slower_lives(start: Start, watched: Path) -> None:
    job = start(2, "slow")
    job.until(lambda: len(job.pids()) == 2)
    time.sleep(8)
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75, job.text()
    assert "hung" not in job.text() and "restart" not in job.text()


def test_a_pause_that_ends_in_time_costs_nothing(start: Start, watched: Path) -> None:
    job = start(2, "loop")
    job.until(lambda: len(job.pids()) == 2)
    time.sleep(2)
    os.kill(job.pids(rank=1)[0], signal.SIGSTOP)
    time.sleep(0.8)
    os.kill(job.pids(rank=1)[0], signal.SIGCONT)
    time.sleep(2)
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75 and "hung" not in job.text(), job.text()


def test_restarts_that_lead_nowhere_are_counted_and_others_are_not(start: Start) -> None:
    stuck, moving = start(2, "no-progress"), start(2, "progress")
    assert stuck.code() == 1 and len(stuck.pids()) == 6, stuck.text()
    assert "3 attempts in a row began at the same step: giving up" in stuck.text()
    assert moving.code() == 0 and len(moving.pids()) == 10, moving.text()
    assert "giving up" not in moving.text() and "restart 1 of 2, 4 in all" in moving.text()


def test_the_limit_grows_with_the_longest_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    silence = Silence()
    assert silence.limit(2.0, 600.0) == 600, "a rank that loads and compiles"
    for beat in range(1, SETTLED + 2):
        silence.look(beat)
        now[0] += 1.0
    assert silence.look(SETTLED + 1) == 1.0
    assert silence.limit(2.0, 600.0) == FACTOR * 1.0 and silence.limit(30.0, 600.0) == 30.0
    silence.look(0)
    assert silence.limit(2.0, 600.0) == 600, "another attempt starts anew"


def test_the_record_keeps_the_last_operations_and_the_attempts(tmp_path: Path) -> None:
    PulseFile(tmp_path / "pulse", 2)
    mine, theirs = PulseFile(tmp_path / "pulse"), PulseFile(tmp_path / "pulse")
    for number in range(RING + 5):
        mine.note(1, f"data all_reduce {number}" + "x" * 100 * (number == 60))
    assert theirs.beats(1) == RING + 5 and theirs.beats(0) == 0 and theirs.flight(0) == []
    assert len(theirs.flight(1)) == RING and theirs.flight(1)[-1] == f"{RING + 5} data all_reduce {RING + 4}"
    theirs.clear(1)
    assert mine.beats(1) == 0 and mine.flight(1) == []
    for attempt, step in enumerate([0, 0, 10, 10, 10]):
        mine.resumed(attempt, step)
    assert [theirs.fruitless(attempt) for attempt in range(6)] == [0, 1, 2, 1, 2, 3]
    mine.resumed(ATTEMPTS + 5, 3)


def test_the_phase_of_a_stack() -> None:
    def stack(*frames: tuple[str, str]) -> str:
        return "Current thread 0x1 (most recent call first):\n" + "\n".join(
            f'  File "/x/megapre/{file}", line 1 in {function}' for file, function in frames
        )

    trainer = ("training/trainer.py", "run")
    assert phase(stack(("models/block.py", "f"), ("parallel/pipeline/executor.py", "forward"), trainer)) == "forward"
    assert phase(stack(("parallel/pipeline/executor.py", "backward"), trainer)) == "backward"
    assert phase(stack(("data/loader.py", "__next__"), trainer)) == "loader"
    assert phase(stack(("checkpoint/format.py", "stage"), ("training/trainer.py", "_write"), trainer)) == "save"
    assert phase(stack(("models/block.py", "f"), ("training/trainer.py", "evaluate"), trainer)) == "eval"
    assert phase(stack(("parallel/comm.py", "all_reduce"), ("training/step.py", "f"), trainer)) == "collective"
    assert phase(stack(("models/build.py", "f"))) == "start" and phase("") == "an unknown phase"
