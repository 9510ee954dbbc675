"""Where metrics go. A sink is a class with ``write``, ``text`` and ``close``; `metrics.Monitor` guards each call."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megapre.config.schema import Config
from megapre.monitor import events

SHOWN = {
    # Key -> how the console names and prints it.
    "loss": "loss {:.4f}",
    "perplexity": "ppl {:.2f}",
    "lr": "lr {:.3g}",
    "grad_norm": "grad-norm {:.3f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "tflops": "{:.3g} TFLOP/s",
    "mfu": "MFU {:.1%}",
}


class Sink(Protocol):
    """One destination of metrics."""

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """Take the metrics of a step."""

    def text(self, line: str) -> None:
        """Take a line of text."""

    def event(self, name: str, step: int, **fields: object) -> None:
        """Take something that happened at a step."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines:
    """``metrics.jsonl``: one object a line, flushed each; a resumed run appends.

    A line is ``{"step", "split", "time", metric: value, ...}`` or ``{"event", "step", "time"}``; values that are
    not finite are null. Steps after a resume repeat: the last line of a step counts.
    """

    def __init__(self, path: Path) -> None:
        # Unbuffered: a full disk fails the write itself and leaves nothing to flush later.
        self._file = open(path, "ab", buffering=0)
        # A process killed while it wrote left half a line, which would swallow the next.
        if self._file.tell() and not _ends_in_newline(path):
            self._put(b"\n")

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """Append a line of metrics."""
        finite = {key: float(value) if math.isfinite(value) else None for key, value in values.items()}
        self._append({"step": step, "split": split, "time": round(time.time(), 3)} | finite)

    def text(self, line: str) -> None:
        """Text is for people: not kept here."""

    def event(self, name: str, step: int, **fields: object) -> None:
        """Append a line for an event."""
        self._append({"event": name, "step": step, "time": round(time.time(), 3)})

    def _append(self, record: dict[str, Any]) -> None:
        self._put(json.dumps(record).encode() + b"\n")

    def _put(self, line: bytes) -> None:
        # One write of whole bytes, so that a crash or a second reader sees whole lines.
        if self._file.write(line) != len(line):
            raise OSError("the disk took only a part of a line")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Console:
    """A line of progress: a bar that stays at the bottom of a terminal, plain lines elsewhere.

    Every line also goes to ``log``, which outlives the terminal.
    """

    def __init__(self, steps: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(log, "a", encoding="utf-8", buffering=1)
        self._steps = steps
        self._last: tuple[int, float] | None = None
        self._seconds = 0.0
        self._bar: Any = None
        self._task: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, auto_refresh=False)
            self._task = self._bar.add_task("", total=steps)
            self._bar.start()

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """Show the metrics of a step."""
        shown = [form.format(values[key]) for key, form in SHOWN.items() if key in values]
        if split != "train":
            self.text(f"{split} at step {step} | " + " | ".join(shown))
            return
        eta = self._eta(step)
        line = " | ".join(shown + ([f"ETA {_clock(eta)}"] if eta is not None else []))
        if self._bar is None:
            self.text(f"step {step}/{self._steps} | {line}")
        else:
            self._log.write(f"step {step}/{self._steps} | {line}\n")
            self._bar.update(self._task, completed=step, description=line, refresh=True)

    def text(self, line: str) -> None:
        """Show a line, above the bar if there is one."""
        self._log.write(line + "\n")
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False)

    def event(self, name: str, step: int, **fields: object) -> None:
        """Start the clock of the ETA where a run starts or goes back to."""
        if name in ("start", "rewind"):
            self._last = (step, time.monotonic())

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
        self._log.close()

    def _eta(self, step: int) -> float | None:
        """Seconds to the end, from a running mean that forgets the first, slow steps."""
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            seconds = (now - self._last[1]) / (step - self._last[0])
            self._seconds = 0.7 * self._seconds + 0.3 * seconds if self._seconds else seconds
        self._last = (step, now)
        return self._seconds * (self._steps - step) if self._seconds else None


class EventLog:
    """``log/events.jsonl``: the events alone, with all that is told of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """Metrics are elsewhere."""

    def text(self, line: str) -> None:
        """Text is for the console."""

    def event(self, name: str, step: int, **fields: object) -> None:
        """Append a line."""
        events.append(self._folder, name, rank=0, step=step, **fields)

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoard:
    """Events under ``RUN_DIR/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """Add one scalar per metric, named ``split/metric``."""
        for key, value in values.items():
            self._writer.add_scalar(f"{split}/{key}", value, step)

    def text(self, line: str) -> None:
        """Text is for the console."""

    def event(self, name: str, step: int, **fields: object) -> None:
        """Steps after a resume replace those a dead process wrote."""

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases (wandb.ai, or on disk with WANDB_MODE=offline)."""

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        """Begin the run ``run_id`` of the project ``monitor.wandb``, or continue it."""
        import wandb

        self._run: Any = wandb.init(
            project=config.monitor.wandb, id=run_id, resume="allow", dir=str(run_dir), config=asdict(config)
        )
        # Steps after a resume or a rewind come twice, which its own counter refuses.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """Add one value per metric, named ``split/metric``."""
        self._run.log({"step": step} | {f"{split}/{key}": value for key, value in values.items()})

    def text(self, line: str) -> None:
        """Text is for the console."""

    def event(self, name: str, step: int, **fields: object) -> None:
        """Steps after a resume replace those a dead process wrote."""

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def open_sinks(config: Config, run_dir: Path) -> list[Sink]:
    """The sinks a job asks for, console first."""
    sinks: list[Sink] = [
        Console(config.train.steps, run_dir / "log" / "run.log"),
        JsonLines(run_dir / "metrics.jsonl"),
        EventLog(run_dir / "log"),
    ]
    if config.monitor.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard"))
    return sinks


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{hours // 24}d {hours % 24}h"
