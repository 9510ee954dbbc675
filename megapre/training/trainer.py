"""The loop around step(): data, validation, checkpoints, metrics, an orderly stop.

Metrics are read one step late, so the host prepares the next step while the device finishes this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapre.checkpoint import store
from megapre.checkpoint.reshard import CheckpointError
from megapre.checkpoint.writer import Saver
from megapre.config.ramp import Steps
from megapre.config.schema import Config
from megapre.data.loader import Loader, Microbatch, StepBatch
from megapre.monitor.fingerprint import fingerprint
from megapre.monitor.metrics import Monitor
from megapre.monitor.throughput import Throughput
from megapre.optim.schedule import learning_rate
from megapre.parallel.comm import Axis, Work
from megapre.training.step import StepResult, TrainStep

DONE, STOPPED = 0, 75
"""Exit codes: the run is complete; it stopped early with a checkpoint and may be queued again."""


class HostSync:
    """How the ranks agree on a checkpoint, over the host axis."""

    def __init__(self, host: Axis) -> None:
        self.host = host

    def barrier(self) -> None:
        """Wait for every rank."""
        self.host.barrier()

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text on every rank."""
        return self.host.gather_text(text)

    def broadcast_text(self, text: str | None) -> str:
        """Rank 0's text on every rank."""
        return self.host.gather_text(text or "")[0]


class Ahead:
    """The next step's batch, with the ranks' sums of its target tokens and of their votes under way.

    The pipeline's first backward needs the denominator before its last microbatch is loaded, so the sum is made
    during the step before, on the host. A vote is a stop request, a wish to save, or (``written`` is the step, -1 for
    none) a rank's part of a checkpoint that is on disk.
    """

    def __init__(self, loader: Loader, host: Axis, replicas: int, stop: bool, save: bool, written: int) -> None:
        self.host, self.replicas, self.written = host, replicas, written
        self.batch: StepBatch = next(loader)
        self.sums = torch.tensor([self.batch.target_tokens, stop, save, written >= 0], dtype=torch.int64)
        self.work: Work = host.all_reduce(self.sums)

    def ready(self) -> tuple[StepBatch, int, bool, bool, bool]:
        """Batch, target tokens of the global batch; whether any rank asks to stop, any to save, all have written."""
        self.work.wait()
        targets, stop, save, written = self.sums.tolist()
        return self.batch, targets // self.replicas, stop > 0, save > 0, written == self.host.size


class Trainer:
    """Runs a job from ``start`` (0-based step) to its end."""

    def __init__(
        self,
        config: Config,
        step: TrainStep,
        loader: Loader,
        validation: list[Microbatch],
        monitor: Monitor,
        throughput: Throughput,
        stop_requested: Callable[[], bool],
        start: int,
    ) -> None:
        self.config, self.step, self.loader, self.validation = config, step, loader, validation
        self.monitor, self.throughput, self.stop_requested, self.done = monitor, throughput, stop_requested, start
        self.grid = step.grid
        self.host = HostSync(self.grid.host)
        self.saver = self._saver(Path(config.train.run_dir) / "checkpoints")
        self.environment = fingerprint(config)
        self.saved = start if start else -1
        self.saved_at = time.monotonic()
        self.evaluated = -1
        self.steps = Steps(config)
        self.held_out = self._count(validation)

    def run(self) -> int:
        """Train; returns the exit code."""
        config = self.config
        if config.checkpoint.async_save and (config.checkpoint.interval or config.checkpoint.minutes):
            self.saver.prepare(self.step.pieces(share=True), config.checkpoint.host_memory)
        ahead = self._ahead() if self.done < config.train.steps else None
        late: tuple[int, float, StepResult] | None = None
        code = DONE
        while ahead is not None:
            batch, targets, stop, save, written = ahead.ready()
            if written:
                self._reported(self.saver.settle, ahead.written)
            if stop:
                code = STOPPED
                break
            index, self.done = batch.step, batch.step + 1
            ahead = self._ahead() if self.done < config.train.steps else None
            rate = learning_rate(config, index)
            result = self.step(batch.microbatches, targets, index, rate)
            if late is not None:
                self._log(*late)
            self.throughput.begin(self.steps.at(index).samples)
            late = (index, rate, result)
            save = save and self.saved != index  # a wish from before the last save is granted already
            due_eval, due_save = self._due(config.train.eval_interval), save or self._due(config.checkpoint.interval)
            if due_eval or due_save or ahead is None:
                self._log(*late)
                late = None
            if due_eval or ahead is None:
                self.evaluate()
            if due_save:
                self.save()
        if late is not None:
            self._log(*late)
        if code == DONE and self.evaluated != self.done:
            self.evaluate()
        self._reported(self.saver.finish)
        if self.saved != self.done:
            self.save(last=True)
        return code

    def evaluate(self) -> None:
        """Report the validation loss of the current weights."""
        self.evaluated = self.done
        if not self.validation:
            return
        with self.throughput.pause():
            loss = float(self.step.evaluate(self.validation, self.held_out))
        self.monitor.log(self.done, {"loss": loss, "perplexity": math.exp(min(loss, 700))}, split="validation")

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint of the current step; only of the last one is a failure the end of the run."""
        with self.throughput.pause():
            if last:
                self._write()
                self.saver.finish()
                self.saved = self.done
            else:
                self.saved = self.done
                self._reported(self._write)
        self.saved_at = time.monotonic()

    def _write(self) -> None:
        self.saver.save(self.done, self.step.pieces(share=True), self.state())

    def _reported(self, action: Callable[..., None], *args: int) -> None:
        """Do what may fail for want of a disk without the run: all ranks raise the same error, and go on."""
        try:
            action(*args)
        except CheckpointError as error:
            self.saved = -1
            self.monitor.text(f"{error}; the run goes on, and saves again when the next checkpoint is due")

    def _saver(self, root: Path) -> Saver:
        keep, world = self.config.checkpoint, self.grid.world
        return Saver(
            root, rank=world.rank, world=world.size, sync=self.host, say=self.monitor.text,
            keep=lambda path: store.prune(root, keep.keep_last, keep.keep_every, saved=path),
            timeout=self.config.resilience.timeout / 2,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; the data position is the step alone (order is computed)."""
        return {
            "step": self.done,
            "samples": self.steps.at(self.done).first,
            "loss_scale": self.step.scaler.state(),
            "optimizer_steps": int(self.step.optimizer.steps),
            "vocab_size": self.step.model.vocab_size,
            "job": asdict(self.config),
            "environment": self.environment,
        }

    def _ahead(self) -> Ahead:
        replicas = self.grid.world.size // self.grid.data.size
        minutes = self.config.checkpoint.minutes
        save = minutes > 0 and self.grid.world.rank == 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return Ahead(self.loader, self.grid.host, replicas, self.stop_requested(), save, self.saver.written())

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.done % interval == 0

    def _count(self, microbatches: list[Microbatch]) -> int:
        """Target tokens of all data ranks' validation samples."""
        total = torch.tensor([sum(int(m.weights.sum()) for m in microbatches)])
        self.grid.host.all_reduce(total).wait()
        return max(1, int(total) * self.grid.data.size // self.grid.world.size)

    def _log(self, index: int, rate: float, result: StepResult) -> None:
        loss = float(result.loss)  # waits for the step
        self.throughput.end()
        if (index + 1) % self.config.monitor.interval and index + 1 != self.config.train.steps:
            return
        values = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "lr": rate,
            "grad_norm": float(result.grad_norm),
            "loss_scale": float(result.loss_scale),
            "skipped": float(result.skipped),
            **self.throughput.rates(),
            **{name: float(value) for name, value in result.routing.items()},
            **_by_layer(result.rms),
        }
        self.monitor.log(index + 1, values)


def _by_layer(rms: Tensor | None) -> dict[str, float]:
    return {} if rms is None else {f"rms/{layer}": value for layer, value in enumerate(rms.tolist())}


def restore(path: Path, config: Config, step: TrainStep) -> dict[str, Any]:
    """Load a checkpoint of any layout into ``step``; returns its state."""
    state = store.read_state(path)
    refuse_changes(state["job"], asdict(config), path, config.checkpoint.allow_changes)
    store.load(path, step.pieces(share=False))
    step.optimizer.copy_to_model()
    step.optimizer.steps.fill_(state["optimizer_steps"])
    if step.scaler.dynamic:
        step.scaler.load(state["loss_scale"])
    return state


FIXED = {
    "model": (),
    "data": ("paths", "weights", "stages", "packing", "split", "objective", "mask_probability", "seed"),
    "train": ("global_batch", "batch_ramp", "sequence_ramp", "seed"),
}
"""What must not change on resume, by table; no names: the whole table."""


def refuse_changes(old: dict[str, Any], new: dict[str, Any], path: Path, allowed: Sequence[str] = ()) -> None:
    """ValueError with a table when a job resumes with another model, batch or data order than its checkpoint's."""
    changed = []
    for table, keys in FIXED.items():
        for key in keys or sorted(new[table]):
            before, after = old.get(table, {}).get(key), new[table][key]
            if before != after and f"{table}.{key}" not in allowed:
                changed.append((f"{table}.{key}", before, after))
    if not changed:
        return
    told = "; ".join(f"{key} = {before!r}, but the job has {after!r}" for key, before, after in changed)
    names = ", ".join(f'"{key}"' for key, _, _ in changed)
    raise ValueError(
        f"{path} was written with {told}: set {'it' if len(changed) == 1 else 'them'} back, start a new run with "
        f"another train.run_dir, or allow it with checkpoint.allow_changes = [{names}]."
    )
