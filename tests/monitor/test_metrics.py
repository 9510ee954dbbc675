"""Sinks: what they write, and that none of them can end a run."""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megapre.config.check import ConfigError
from megapre.config.schema import Config, MonitorConfig, TrainConfig
from megapre.monitor import hardware, metrics, sinks
from megapre.monitor.metrics import Monitor

VALUES = {"loss": 2.5, "lr": 3e-4, "grad_norm": 1.25, "tokens_per_s": 12345.6, "mfu": 0.31}


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_plain_line_holds_what_a_person_looks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(Config(train=TrainConfig(steps=100)), tmp_path, active=True)
    monitor.started(0)
    monitor.log(10, VALUES)
    monitor.log(10, {"loss": 2.25}, split="validation")
    monitor.text("saved [bold] it")
    monitor.close()
    out = capsys.readouterr().out.splitlines()
    shown = "step 10/100 | loss 2.5000 | lr 0.0003 | grad-norm 1.250 | 12,346 tokens/s | MFU 31.0% | ETA "
    assert out[0].startswith(shown)
    assert out[1:] == ["validation at step 10 | loss 2.2500", "saved [bold] it"]


def test_a_line_of_json_each_flushed_at_once(tmp_path: Path) -> None:
    monitor = Monitor(Config(), tmp_path / "new", active=True)
    monitor.log(1, VALUES | {"grad_norm": float("nan")})
    (first,) = lines(tmp_path / "new")
    assert first["step"] == 1 and first["split"] == "train" and first["loss"] == 2.5 and first["grad_norm"] is None
    assert first["host_gib"] > 0  # type: ignore[operator]
    monitor.close()


def test_a_resumed_run_appends_after_a_torn_line_and_says_where_it_goes_on(tmp_path: Path) -> None:
    monitor = Monitor(Config(), tmp_path, active=True)
    monitor.log(1, VALUES)
    monitor.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "spl')
    monitor = Monitor(Config(), tmp_path, active=True)
    monitor.started(1)
    monitor.log(2, VALUES)
    monitor.close()
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(text) == 4
    assert json.loads(text[2])["event"] == "start" and json.loads(text[2])["step"] == 1
    assert json.loads(text[3])["step"] == 2


def test_an_inactive_monitor_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(Config(), tmp_path / "run", active=False)
    monitor.started(0)
    monitor.log(1, VALUES)
    monitor.text("x")
    monitor.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_turns_the_sink_off_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monitor = Monitor(Config(), tmp_path, active=True)
    for step in range(1, 4):
        monitor.log(step, VALUES)
    monitor.close()
    captured = capsys.readouterr()
    assert captured.err.count("megapre: JsonLines is off") == 1 and "No space left" in captured.err
    assert captured.out.count("loss 2.5000") == 3


def test_a_closed_stdout_does_not_end_the_run(tmp_path: Path) -> None:
    code = (
        "import sys; from megapre.config.schema import Config; from megapre.monitor.metrics import Monitor;"
        "m = Monitor(Config(), sys.argv[1], active=True);"
        "[m.log(s, {'loss': 1.0}) for s in range(200)]; m.close()"
    )
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.stderr.count("Console is off") == 1
    assert len(lines(tmp_path)) == 200


def test_a_failing_gpu_meter_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lost:
        def read(self) -> dict[str, float]:
            raise RuntimeError("GPU is lost")

    monkeypatch.setattr(hardware.GpuMeter, "find", Lost)
    monitor = Monitor(Config(), tmp_path, active=True)
    monitor.log(1, VALUES)
    monitor.log(2, VALUES)
    assert capsys.readouterr().err.count("GPU is lost") == 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = Monitor(Config(monitor=MonitorConfig(tensorboard=True)), tmp_path, active=True)
    monitor.log(3, {"loss": 1.5})
    monitor.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("train/loss")
    assert event.step == 3 and event.value == 1.5


def test_a_missing_package_names_the_key_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"monitor\.tensorboard .*pip install megapre\[monitor\]"):
        metrics.check_sinks(Config(monitor=MonitorConfig(tensorboard=True)))
    metrics.check_sinks(Config())


def test_the_eta_is_the_steps_left_times_their_pace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    console = sinks.Console(100, tmp_path / "run.log")
    console.event("start", 50)
    for step in (60, 70, 80):
        now[0] += 20.0
        eta = console._eta(step)
    assert eta == pytest.approx(40.0)
    assert sinks._clock(3725) == "1:02:05" and sinks._clock(3 * 86400 + 7200) == "3d 2h"


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    """Under a pseudo-terminal the line stays in place and the last state remains."""
    import pty

    code = (
        "import sys; from megapre.config.schema import Config; from megapre.monitor.metrics import Monitor;"
        "m = Monitor(Config(), sys.argv[1], active=True);"
        "[m.log(s, {'loss': 1.0 / s}) for s in range(1, 101)]; m.text('note'); m.close()"
    )
    parent, child = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=child, stderr=child, env=env)
    os.close(child)
    seen = b""
    while True:
        try:
            block = os.read(parent, 4096)
        except OSError:
            break
        if not block:
            break
        seen += block
    os.close(parent)
    assert process.wait(60) == 0
    assert b"100/100" in seen and b"loss 0.0100" in seen and b"note" in seen


def test_monitor_loads_no_torch() -> None:
    code = "import megapre.monitor.metrics, megapre.monitor.throughput, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_memory_is_that_of_this_process() -> None:
    found = hardware.memory()
    assert 0 < found["host_gib"] <= found["host_peak_gib"] < 1000


class FakeWandb(ModuleType):
    """What we call of wandb, remembered."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.ended = 0

    def init(self, **settings: Any) -> "FakeWandb":
        self.begun.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.ended += 1


def test_a_resumed_run_continues_its_curve_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(monitor=MonitorConfig(wandb="project"))
    first = Monitor(config, tmp_path, active=True)
    first.started(0)
    first.log(1, {"loss": 2.0})
    first.started(0)  # after a rewind
    state = json.loads(json.dumps(first.state()))
    first.close()
    again, other = Monitor(config, tmp_path, active=True), Monitor(config, tmp_path / "other", active=True)
    again.started(1, state)
    other.started(0)
    again.log(2, {"loss": 1.5}, split="validation")
    assert [begun["id"] for begun in fake.begun[:2]] == [state["wandb"]] * 2 and len(fake.begun) == 3
    assert fake.begun[2]["id"] != state["wandb"] and again.state() == state
    assert fake.begun[0]["project"] == "project" and fake.begun[0]["resume"] == "allow"
    assert fake.logged[0]["step"] == 1 and fake.logged[0]["train/loss"] == 2.0
    assert fake.logged[1] == {"step": 2, "validation/loss": 1.5} and fake.ended == 1
    silent = Monitor(config, tmp_path, active=False)
    silent.started(1, state)
    assert len(fake.begun) == 3 and silent.state() == {}


def test_wandb_that_cannot_begin_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb()
    monkeypatch.setattr(fake, "init", lambda **settings: 1 / 0, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monitor = Monitor(Config(monitor=MonitorConfig(wandb="project")), tmp_path, active=True)
    monitor.started(0)
    monitor.log(1, VALUES)
    assert "W&B is off in this run: ZeroDivisionError" in capsys.readouterr().err and len(lines(tmp_path)) == 2
    assert monitor.state()["wandb"], "the id is kept for an attempt that reaches it"


def test_wandb_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install megapre\[wandb\]"):
        metrics.check_sinks(Config(monitor=MonitorConfig(wandb="project")))
