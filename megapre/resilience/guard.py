"""The numerical guard: what to do about a step whose loss or gradients are not to be trusted.

A step with a non-finite loss or gradient leaves the weights alone on the device (``training/step.py``); the guard, one
step later, names the tensor and the rank. A loss or gradient norm far outside the run's recent ones makes the run go
back to a checkpoint before it and leave the offending batches out. Loss, norm and skip flag are equal on all
ranks, so that all decide alike without talking.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from megapre.config.schema import Config
from megapre.data.loader import Counts, StepBatch
from megapre.resilience.pace import Pace
from megapre.resilience.replicas import Replicas
from megapre.training.diagnosis import not_finite
from megapre.training.rewind import Trouble
from megapre.training.step import StepResult, TrainStep

LEAST = 16
"""Steps that must be known before one can be called a spike."""


def zscore(value: float, window: Sequence[float]) -> float:
    """Distance of ``value`` above the window's median in robust standard deviations (1.4826 x MAD).

    A thousandth of the median is the least deviation, so that a flat curve makes no spikes of rounding.
    """
    median = statistics.median(window)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in window)
    return (value - median) / max(deviation, 1e-3 * abs(median), 1e-12)


class Guard:
    """Watches the results of a run's steps, each read one step late."""

    def __init__(self, config: Config, step: TrainStep, say: Callable[[str], None], pace: Pace) -> None:
        self.config, self.step, self._say, self._pace = config.resilience, step, say, pace
        self.replicas = Replicas(step, config.parallel.zero)
        self._verified = 0
        self._host = step.grid.host
        self._losses: deque[float] = deque(maxlen=self.config.spike_window)
        self._norms: deque[float] = deque(maxlen=self.config.spike_window)
        self._skips = 0
        self._rewinds = 0
        self._last = -1
        self._again: set[int] = set()

    def observe(self, result: StepResult, batch: StepBatch, counts: Counts) -> Trouble | None:
        """Judge the step of ``batch``, which had those ``counts``. All ranks get the same answer.

        Raises ValueError when ``resilience.max_skips`` steps in a row, or ``max_rewinds`` rewinds, led nowhere.
        """
        index, loss, norm = batch.step, float(result.loss), float(result.grad_norm)
        self._pace.step(index)
        if index > self._last + self.config.spike_window:
            self._rewinds = 0
        if float(result.skipped):
            return self._skipped(loss, result, batch, counts)
        self._skips = 0
        trouble = self._spike(index, loss, norm)
        if trouble is None:
            self._losses.append(loss)
            self._norms.append(math.log(norm) if norm > 0 else 0.0)
        return trouble

    def due(self, step: int) -> bool:
        """Whether the replicas' bits are to be compared after ``step`` steps."""
        interval = self.config.digest_interval
        return interval > 0 and step % interval == 0

    def verify(self, step: int) -> Trouble | None:
        """Compare the replicas' bits after ``step`` steps; all ranks call it together. Waits for the device."""
        if not self.config.digest_interval or step == self._verified:
            return None
        faults = self.replicas.faults()
        if not faults:
            self._verified = step
            return None
        more = f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""
        reason = f"step {step}: {faults[0]}{more}: its memory or arithmetic failed after step {self._verified}"
        return self._counted(Trouble(self._verified, range(0), reason, fatal=True))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run judges as the uninterrupted one."""
        return {"losses": list(self._losses), "norms": list(self._norms), "skips": self._skips}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Continue after ``step`` steps from ``state``."""
        self._verified = step
        for name, window in (("losses", self._losses), ("norms", self._norms)):
            window.clear()
            window.extend(state.get(name, ()))
        self._skips = state.get("skips", 0)

    # ------------------------------------------------------------------------------------------ not finite

    def _skipped(self, loss: float, result: StepResult, batch: StepBatch, counts: Counts) -> Trouble | None:
        index, scaler = batch.step, self.step.scaler
        if scaler.dynamic and math.isfinite(loss) and float(scaler.value) > scaler.LEAST:
            return None  # the loss scale was too high: that is how it finds its height
        self._skips += 1
        reason = self._name(loss, result, batch, counts)
        if self._skips >= self.config.max_skips:
            raise ValueError(
                f"{reason}; that was the {self._skips}th step in a row (resilience.max_skips): the last checkpoint is "
                f"sound, look at the data and optimizer.lr before going on"
            )
        if self.config.on_nonfinite == "rerun" and index not in self._again:
            self._again.add(index)
            return self._counted(Trouble(index, range(0), f"{reason}; it is run again"))
        again = "again, so it is no passing fault; " if index in self._again else ""
        self._say(f"{reason}; {again}the step was skipped")
        return None

    def _name(self, loss: float, result: StepResult, batch: StepBatch, counts: Counts) -> str:
        """Where it came from, in one sentence: what each rank saw of its own before anything was summed."""
        mine: dict[str, Any] = {"loss": not math.isfinite(float(result.local_loss)), "tensors": []}
        mine["tensors"] = [n for n, x in zip(self.step.norm.names, result.norms.tolist()) if not math.isfinite(x)]
        # Summed gradients tell the tensor; whose part of the sum it was, only the batch's own gradients can tell.
        mine["own"] = not_finite(self.step, batch, counts)
        reports = [json.loads(text) for text in self._host.gather_text(json.dumps(mine))]
        losses = [rank for rank, report in enumerate(reports) if report["loss"]]
        own = [(rank, name) for rank, report in enumerate(reports) for name in report["own"]]
        summed = [(rank, name) for rank, report in enumerate(reports) for name in report["tensors"]]
        told = []
        if losses or not math.isfinite(loss):
            told.append(f"the loss of rank {losses[0]}" if losses else "the loss")
        found = own or summed
        if found:
            # Through a pipeline it reaches other ranks' gradients: the one whose loss it is comes first.
            rank, name = next((one for one in found if one[0] in losses), found[0])
            others = len({name for _, name in found}) - 1
            more = f" (and {others} more tensors)" if others else ""
            told.append(f"the gradient of {name} on rank {rank}{more}")
        kind = "" if own or losses else " (not when its batch was tried again: a passing fault)"
        return f"step {batch.step + 1}: {' and '.join(told) or 'the gradient norm'} is not finite{kind}"

    # ------------------------------------------------------------------------------------------ spikes

    def _spike(self, index: int, loss: float, norm: float) -> Trouble | None:
        limit = self.config.spike_zscore
        if not limit or len(self._losses) < min(LEAST, self.config.spike_window):
            return None
        log_norm = math.log(norm) if norm > 0 else 0.0
        for name, value, shown, window in (
            ("loss", loss, loss, self._losses),
            ("gradient norm", log_norm, norm, self._norms),
        ):
            score = zscore(value, window)
            if score > limit:
                first = max(0, index + 1 - self.config.spike_skip)
                return self._counted(
                    Trouble(
                        first,
                        range(first, index + 1),
                        f"step {index + 1}: the {name} {shown:.4g} is {score:.1f} robust standard deviations above the "
                        f"last {len(window)} steps (resilience.spike_zscore = {limit:g})",
                    )
                )
        return None

    def _counted(self, trouble: Trouble) -> Trouble:
        self._rewinds += 1
        self._last = max(self._last, trouble.first)
        if self._rewinds > self.config.max_rewinds:
            raise ValueError(
                f"{trouble.reason}: the run went back {self.config.max_rewinds} times (resilience.max_rewinds) within "
                f"{self.config.spike_window} steps and got no further; lower optimizer.lr or look at the data"
            )
        return trouble
