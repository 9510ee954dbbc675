"""The metrics of a run: one `Monitor` per rank, which writes on the rank that is active and nowhere else."""

from __future__ import annotations

import importlib.util
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from megapre.config.check import ConfigError
from megapre.config.schema import Config
from megapre.monitor import hardware
from megapre.monitor.sinks import Sink, WeightsAndBiases, open_sinks


def check_sinks(config: Config) -> None:
    """Raise `ConfigError` when a sink that the job asks for lacks its package. Loads nothing."""
    if config.monitor.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "monitor.tensorboard is true but tensorboard is not installed: pip install megapre[monitor] or set it to "
            "false"
        )
    if config.monitor.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"monitor.wandb is {config.monitor.wandb!r} but wandb is not installed: pip install megapre[wandb] or set "
            f'it to ""'
        )


class Monitor:
    """Console, ``metrics.jsonl`` and what else the job asks for.

    Metrics are worth less than the run: a sink that fails (a full disk, a closed pipe) is reported once on
    stderr and left out from then on.
    """

    def __init__(self, config: Config, run_dir: Path | str, *, active: bool) -> None:
        """Open the sinks under ``run_dir`` when ``active``. Raises `ConfigError` for a missing package."""
        check_sinks(config)
        self._sinks: list[Sink] = []
        self._gpu: hardware.GpuMeter | None = None
        self._gpu_sought = False
        self._active = active
        self._config, self._run_dir = config, Path(run_dir)
        self._wandb = ""
        if not active:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks = open_sinks(config, run_dir)

    def state(self) -> dict[str, str]:
        """What a checkpoint keeps, so that a resumed run continues its curves: the id of the run at W&B."""
        return {"wandb": self._wandb} if self._wandb else {}

    def started(self, step: int, state: Mapping[str, str] | None = None, **fields: object) -> None:
        """Record that this process goes on from ``step`` (0 for a fresh run): the resume step of a resumed run.

        ``state`` is that of the run's checkpoint, ``fields`` what else the event log is to hold.
        """
        if self._active and self._config.monitor.wandb and not self._wandb:
            self._wandb = (state or {}).get("wandb") or secrets.token_hex(6)
            try:
                self._sinks.append(WeightsAndBiases(self._config, self._run_dir, self._wandb))
            except Exception as error:
                _warn(f"megapre: W&B is off in this run: {type(error).__name__}: {error}")
        self.event("start", step, **fields)

    def event(self, name: str, step: int, **fields: object) -> None:
        """Record something that happened at ``step``; ``fields`` are plain JSON."""
        self._each(lambda sink: sink.event(name, step, **fields))

    def log(self, step: int, values: Mapping[str, float], *, split: str = "train") -> None:
        """Write the metrics of ``step``; training metrics get the machine's state added."""
        if not self._active:
            return
        if split == "train":
            values = {**values, **hardware.memory(), **self._read_gpu()}
        self._each(lambda sink: sink.write(step, values, split))

    def text(self, line: str) -> None:
        """Show a line to the person who watches."""
        self._each(lambda sink: sink.text(line))

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())
        self._sinks = []

    def _read_gpu(self) -> dict[str, float]:
        try:
            if not self._gpu_sought:
                # Only now: the device is not in use yet when a run opens its monitor.
                self._gpu_sought = True
                self._gpu = hardware.GpuMeter.find()
            return self._gpu.read() if self._gpu else {}
        except Exception as error:
            self._gpu = None
            _warn(f"megapre: GPU readings are off from here on: {type(error).__name__}: {error}")
            return {}

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                _warn(f"megapre: {type(sink).__name__} is off from here on: {type(error).__name__}: {error}")


def _warn(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        # stderr is gone as well: nobody is left to tell.
        return
