"""Processes that take turns: one step each, when the driver hands over the token. Needs only the standard library.

A process reads its token from the file descriptor BENCH_IN and answers on BENCH_OUT with a line of JSON, so that what
a framework prints does not matter. Between turns it sleeps in a read; a closed pipe ends it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT = 1200
"""Seconds that a start or a step may take, compilation included."""
RESET = "reset"
"""A token that also begins the count of peak memory anew: start-up and compilation are over."""


class Turns:
    """The process's side: `begin` before every step; the time of a step reaches to the next `begin`."""

    def __init__(self) -> None:
        self._tokens = os.fdopen(int(os.environ["BENCH_IN"]), "r")
        self._answers = os.fdopen(int(os.environ["BENCH_OUT"]), "w")
        self._since: tuple[float, float] | None = None

    def begin(self, **result: Any) -> None:
        """Report the step before, which gave ``result``, and wait for the token."""
        if self._since is not None:
            wall, cpu = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
            result |= {"wall": wall, "cpu": cpu, "peak": peak_bytes()}
        self.say(**result)
        token = self._tokens.readline().strip()
        if not token:
            os._exit(0)
        if token == RESET:
            reset_peak()
        self._since = time.perf_counter(), time.process_time()

    def say(self, **values: Any) -> None:
        """One line to the driver."""
        try:
            self._answers.write(json.dumps(values) + "\n")
            self._answers.flush()
        except OSError:
            os._exit(0)


def reset_peak() -> None:
    """Let the peak of memory begin at what is in use now."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """Peak of resident memory since `reset_peak`, on a GPU of its memory, in bytes."""
    if (cuda := _cuda()) is not None:
        return int(cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cuda() -> Any:
    """torch.cuda where this process uses a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


class Absent(Exception):
    """A framework that cannot take part; the text says why, in one line."""


class Arm:
    """The driver's side: one framework, of one process or of one for each rank."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, ranks: int = 1, port: int = 0
    ) -> None:
        """Start it and wait until it can take its first step. Raises `Absent` with what it said instead."""
        self.name, self.turns, self._log = name, [], log
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[tuple[Any, Any]] = []
        self.turns: list[dict[str, Any]]
        for rank in range(ranks):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            launched = {key: str(value) for key, value in told.items()} if ranks > 1 else {}
            self._start(command, {**env, **launched}, log.with_suffix(f".{rank}.log"))
        try:
            self._receive()
        except Absent:
            self.close()
            raise

    def _start(self, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        token_in, token_out = os.pipe()
        answer_in, answer_out = os.pipe()
        env |= {"BENCH_IN": str(token_in), "BENCH_OUT": str(answer_out)}
        with open(log, "wb") as file:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    pass_fds=(token_in, answer_out),
                )
            )
        os.close(token_in)
        os.close(answer_out)
        self._pipes.append((os.fdopen(token_out, "w"), os.fdopen(answer_in, "r")))

    def turn(self, *, reset: bool = False, counted: bool = True) -> None:
        """Let every rank take one step, unless it was stopped."""
        if not self._pipes:
            return
        try:
            for token, _ in self._pipes:
                token.write(f"{RESET if reset else 'go'}\n")
                token.flush()
        except BrokenPipeError:
            raise Absent(self._ended(0)) from None
        found = self._receive()
        both = {key: [answer[key] for answer in found] for key in ("wall", "cpu", "peak", "loss")}
        whole = {"wall": max(both["wall"]), "cpu": sum(both["cpu"]), "peak": sum(both["peak"])}
        self.turns.append({**found[0], **whole, "loss": both["loss"][-1], "counted": counted})

    def stop(self) -> None:
        """End it here, keeping what it took."""
        self.close()
        self._pipes = []

    def counted(self, key: str) -> list[float]:
        """A figure of every counted step."""
        return [turn[key] for turn in self.turns if turn["counted"]]

    def close(self) -> None:
        """End its processes."""
        for token, answer in self._pipes:
            token.close()
            answer.close()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _receive(self) -> list[dict[str, Any]]:
        found = []
        for rank, (_, answer) in enumerate(self._pipes):
            if not select.select([answer], [], [], LIMIT)[0]:
                raise Absent(f"took more than {LIMIT} s")
            line = answer.readline()
            if not line:
                raise Absent(self._ended(rank))
            found.append(json.loads(line))
            if "absent" in found[-1]:
                raise Absent(found[-1]["absent"])
        return found

    def _ended(self, rank: int) -> str:
        """Why a process is gone, in one line."""
        try:
            code = self._processes[rank].wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code == -9:
            return "was killed, as a machine does that has too little memory"
        text = self._log.with_suffix(f".{rank}.log").read_text(errors="replace").strip().splitlines()
        return f"ended with exit code {code}: {text[-1][:200] if text else 'without a word'}"


def run_arm(run: Callable[[Turns], None]) -> None:
    """Body of an arm's process: a package or instruction set that is missing is said, other errors end it."""
    turns = Turns()
    try:
        run(turns)
    except (ImportError, Absent) as error:
        turns.say(absent=str(error).splitlines()[0])
        sys.exit(3)
