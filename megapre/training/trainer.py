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
from megapre.data.loader import Counts, Loader, Microbatch, StepBatch, batch_number, count
from megapre.monitor.fingerprint import fingerprint
from megapre.monitor.metrics import Monitor
from megapre.monitor.throughput import Throughput
from megapre.optim.plateau import Plateau
from megapre.optim.schedule import learning_rate
from megapre.parallel.comm import Axis, Work
from megapre.training.loss import loss_parts
from megapre.training.resume import restore
from megapre.training.rewind import Trouble, Watcher, batches_of, checkpoint_before, skipped_batches
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
        self.sums = torch.tensor([*self.batch.counts, stop, save, written >= 0], dtype=torch.int64)
        self.work: Work = host.all_reduce(self.sums)

    def ready(self) -> tuple[StepBatch, Counts, bool, bool, bool]:
        """Batch, counts of the global batch; whether any rank asks to stop, any to save, all have written."""
        self.work.wait()
        *sums, stop, save, written = self.sums.tolist()
        counts = Counts(*(total // self.replicas for total in sums))
        return self.batch, counts, stop > 0, save > 0, written == self.host.size


Late = tuple[StepBatch, Counts, float, StepResult]
"""A step whose result is not read yet: batch, counts of the global batch, learning rate, result."""


class Trainer:
    """Runs a job to its end."""

    def __init__(
        self,
        config: Config,
        step: TrainStep,
        open_loader: Callable[[int, Sequence[int]], Loader],
        held_out: dict[str, list[Microbatch]],
        monitor: Monitor,
        throughput: Throughput,
        stop_requested: Callable[[], bool],
        guard: Watcher,
        state: dict[str, Any],
    ) -> None:
        """Start from the checkpoint's ``state``, or from step 0 where it is empty.

        ``open_loader`` opens the batches from a step on, without those of the given numbers. ``held_out``: the
        validation samples of each loss, by name.
        """
        self.config, self.step, self.open_loader = config, step, open_loader
        self.monitor, self.throughput, self.stop_requested, self.guard = monitor, throughput, stop_requested, guard
        self.done = start = int(state.get("step", 0))
        self.skipped = skipped_batches(state, config.data.skip_batches)
        self.loader = open_loader(start, self.skipped)
        guard.load(state.get("guard", {}), start)
        self.plateau = Plateau(config.schedule, state.get("plateau", {}))
        self.grid = step.grid
        self.host = HostSync(self.grid.host)
        self.saver = self._saver(Path(config.train.run_dir) / "checkpoints")
        self.environment = fingerprint(config)
        self.saved = start if start else -1
        self.saved_at = time.monotonic()
        self.copies = config.checkpoint.async_save
        """Whether the next save must first look for host memory to copy into: a run that saves at its end alone never
        does."""
        self.evaluated = -1
        self.steps = Steps(config)
        self.held_out = {name: (samples, self._count(samples)) for name, samples in held_out.items() if samples}

    def run(self) -> int:
        """Train; returns the exit code."""
        config = self.config
        if config.train.eval_first and not self.done:
            self.evaluate()
        ahead = self._ahead() if self.done < config.train.steps else None
        late: Late | None = None
        code = DONE
        while ahead is not None:
            batch, counts, stop, save, written = ahead.ready()
            if written:
                self._reported(self.saver.settle, ahead.written)
            if stop:
                code = STOPPED
                break
            index, self.done = batch.step, batch.step + 1
            ahead = self._ahead() if self.done < config.train.steps else None
            rate = learning_rate(config, index) * self.plateau.factor
            result = self.step(batch.microbatches, counts, index, rate)
            trouble = self._log(*late) if late else None
            self.throughput.begin(self.steps.at(batch_number(index, self.skipped)).samples)
            late = (batch, counts, rate, result)
            save = save and self.saved != index  # a wish from before the last save is granted already
            due_eval, due_save = self._due(config.train.eval_interval), save or self._due(config.checkpoint.interval)
            verify = self.guard.due(self.done) or due_save
            if not trouble and (due_eval or verify or ahead is None):
                trouble = self._log(*late)
                late = None
            if not trouble and verify:
                trouble = self.guard.verify(self.done)
            if trouble and self._go_back(trouble, ahead):
                ahead, late = self._ahead(), None
                continue
            if due_eval or ahead is None:
                self.evaluate()
            if due_save:
                self.save()
        if late is not None:
            trouble = self._log(*late)
            if trouble:
                self._go_back(trouble, ahead)
        if code == DONE and self.evaluated != self.done:
            self.evaluate()
        self._reported(self.saver.finish)
        if self.saved != self.done:
            self.save(last=True)
        return code

    def evaluate(self) -> None:
        """Report the validation losses of the current weights."""
        self.evaluated = self.done
        if not self.held_out:
            return
        values: dict[str, float] = {}
        with self.throughput.pause():
            for name, samples in self.held_out.items():
                found = self.step.held_out(*samples)
                values |= {part: float(loss) for part, loss in found.items()} if name == "loss" else {}
                values[name] = float(found["loss"])
        loss = values["loss"]
        # Neither that before the first step nor the extra one at the end of a run that may be prolonged.
        if self.done and self._due(self.config.train.eval_interval):
            self.plateau.observe(loss)
        perplexity = math.exp(min(values.get("loss/tokens", loss), 700))
        self.monitor.log(self.done, {**values, "perplexity": perplexity}, split="validation")

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint of the current step; only of the last one is a failure the end of the run."""
        with self.throughput.pause():
            if last:
                self._write_last()
                self.saved = self.done
            else:
                self.saved = self.done
                self._reported(self._write_aside)
        self.saved_at = time.monotonic()

    def _write(self) -> None:
        self.saver.save(self.done, self.step.pieces(share=True), self.state())

    def _write_aside(self) -> None:
        if self.copies:
            self.copies = False
            self.saver.prepare(self.step.pieces(share=True), self.config.checkpoint.host_memory)
        self._write()

    def _write_last(self) -> None:
        try:
            self._write()
            self.saver.finish()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; step {self.done} was to be the last that is saved: make room in {self.saver.root} or "
                "repair the mount, then start the job again"
            ) from error

    def _reported(self, action: Callable[..., None], *args: int) -> None:
        """Do what may fail for want of a disk without the run: all ranks raise the same error, and go on."""
        try:
            action(*args)
        except CheckpointError as error:
            self.saved = -1
            self._unsaved(error)

    def _unsaved(self, error: CheckpointError) -> None:
        self.monitor.event("unsaved", self.done, reason=str(error))
        self.monitor.text(f"{error}; the run goes on, and saves again when the next checkpoint is due")

    def _saver(self, root: Path) -> Saver:
        keep, world = self.config.checkpoint, self.grid.world
        return Saver(
            root, rank=world.rank, world=world.size, sync=self.host, say=self.monitor.text,
            keep=lambda path: store.prune(root, keep.keep_last, keep.keep_every, saved=path),
            unsaved=self._unsaved, timeout=self.config.resilience.timeout / 2,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; the data position is the step alone (order is computed)."""
        return {
            "step": self.done,
            "samples": self.steps.at(batch_number(self.done, self.skipped)).first,
            "loss_scale": self.step.scaler.state(),
            "optimizer_steps": int(self.step.optimizer.steps),
            "vocab_size": self.step.model.vocab_size,
            "job": asdict(self.config),
            "environment": self.environment,
            "guard": self.guard.state(),
            "monitor": self.monitor.state(),
            "plateau": self.plateau.state(),
            "skipped_batches": self.skipped,
        }

    def _ahead(self) -> Ahead:
        replicas = self.grid.world.size // self.grid.data.size
        minutes = self.config.checkpoint.minutes
        save = minutes > 0 and self.grid.world.rank == 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return Ahead(self.loader, self.grid.host, replicas, self.stop_requested(), save, self.saver.written())

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.done % interval == 0

    def _count(self, microbatches: list[Microbatch]) -> Counts:
        """Counts of all data ranks' validation samples."""
        sums = torch.tensor(count(microbatches))
        self.grid.host.all_reduce(sums).wait()
        return Counts(*(max(1, total * self.grid.data.size // self.grid.world.size) for total in sums.tolist()))

    def _go_back(self, trouble: Trouble, ahead: Ahead | None) -> bool:
        """Load a checkpoint from before ``trouble``; whether there was one. RuntimeError where there must be."""
        self._reported(self.saver.finish)
        path = checkpoint_before(self.saver.root, trouble.first, self.grid.world.rank, self.host, self.monitor.text)
        if path is None:
            text = f"{trouble.reason}; there is no checkpoint of step {trouble.first} or before to go back to"
            if trouble.fatal:
                raise RuntimeError(text)
            self.monitor.text(f"{text}, so the run goes on: set checkpoint.interval")
            return False
        if ahead is not None:
            ahead.ready()  # its sums are under way on all ranks
        self.loader.close()
        state = restore(path, self.config, self.step)
        self.done = self.saved = int(state["step"])
        self.evaluated = -1
        left_out = batches_of(trouble.skip, self.skipped)
        self.skipped = sorted({*self.skipped, *left_out})
        self.guard.load(state.get("guard", {}), self.done)
        self.plateau.load(state.get("plateau", {}))
        self.loader = self.open_loader(self.done, self.skipped)
        plans = [(number, self.steps.at(number)) for number in left_out]
        names = ", ".join(f"{n} (samples {plan.first} to {plan.first + plan.samples - 1})" for n, plan in plans)
        without = f" without batch {names}" if left_out else ""
        self.monitor.event("rewind", self.done, reason=trouble.reason, left_out=left_out)
        self.monitor.text(f"{trouble.reason}; going on from step {self.done}{without}")
        return True

    def _log(self, batch: StepBatch, counts: Counts, rate: float, result: StepResult) -> Trouble | None:
        """Report a step and have it judged; waits for it."""
        index, loss = batch.step, float(result.loss)
        self.throughput.end()
        self._report(index, loss, rate, result)
        return self.guard.observe(result, batch, counts)

    def _report(self, index: int, loss: float, rate: float, result: StepResult) -> None:
        if (index + 1) % self.config.monitor.interval and index + 1 != self.config.train.steps:
            return
        values = {
            "loss": loss,
            **({"perplexity": math.exp(min(loss, 700))} if len(loss_parts(self.config.model)) == 1 else {}),
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
