"""One optimizer step: train, verify and the benchmarks all call it.

Nothing in it waits for the host: loss, norm, learning rate, scale and the flag that skips an update with
non-finite gradients are 0-d device tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megapre.config.schema import Config, KernelsConfig
from megapre.data.loader import Counts, Microbatch
from megapre.kernels.registry import Kernels, choose
from megapre.models.block import mean_square
from megapre.models.build import Model
from megapre.models.context import Context
from megapre.models.spec import blocks
from megapre.optim.clip import GradientNorm
from megapre.optim.optimizer import Optimizer, frozen
from megapre.optim.scaler import LossScale
from megapre.parallel.pipeline.actions import Action
from megapre.parallel.pipeline.executor import Carried, Executor, Memory
from megapre.parallel.pipeline.schedules import plans
from megapre.parallel.placement import Address
from megapre.parallel.tensor import LossTerms
from megapre.training.loss import Auxiliary, Loss, loss_parts
from megapre.training.routing import Routing


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step; reading one waits for the step."""

    loss: Tensor
    """Mean loss over the global batch's target tokens, on every rank: cross-entropy, smoothed as the job says."""
    grad_norm: Tensor
    """Global norm before clipping."""
    skipped: Tensor
    """1 when a non-finite gradient made the step leave the weights alone."""
    loss_scale: Tensor
    rms: Tensor | None
    """Root mean square of each block's output, when asked for."""
    routing: dict[str, Tensor]
    """Expert loads and auxiliary losses, by name; empty without experts."""
    local_loss: Tensor
    """This rank's part of the loss, before it was summed."""
    norms: Tensor
    """Sum of squares of each piece of gradient that this rank speaks for (``GradientNorm.names``)."""


class TrainStep:
    """Forward, backward, reduction, clip and update of one rank's part of a global batch."""

    def __init__(self, config: Config, model: Model, kernels: Kernels) -> None:
        self.config, self.model, self.kernels, self.grid = config, model, kernels, model.grid
        self.flat = model.flat
        self.executor = Executor(model.stages, model.stage_count, model.grid, model.flat.queue, model.device)
        # Offloaded state is updated on the host, whatever the kernels of the model's device are.
        home = model.flat.home.device
        update = kernels if home.type == model.device.type else choose(KernelsConfig(), home, model.dtype)
        self.optimizer = Optimizer(config.optimizer, model.flat, update)
        self.scaler = LossScale(config.precision, model.device)
        self.norm = GradientNorm(model.flat, kernels, lambda spec: not frozen(config.optimizer, spec))
        self.routing = Routing(config, model)
        self.local_loss = self.norm.zero.clone()
        self._plans: dict[tuple[int, bool], list[Action]] = {}

    def __call__(self, microbatches: Sequence[Microbatch], counts: Counts, step: int, lr: float) -> StepResult:
        """Run optimizer step ``step`` over ``microbatches``; ``counts`` are the global batch's denominators."""
        loss, rms = self.compute_gradients(microbatches, counts, step)
        return self.apply_gradients(loss, rms, lr)

    def compute_gradients(
        self, microbatches: Sequence[Microbatch], counts: Counts, step: int
    ) -> tuple[Tensor, Tensor | None]:
        """Fill the main gradients, reduced over every axis and still times the loss scale; returns the loss."""
        self.flat.gradients.begin()
        contexts = self._contexts(microbatches, counts, step, self.config.monitor.activation_rms, training=True)
        losses = self.executor.run(self._plan(len(contexts), True), contexts, self._carried(microbatches), self.flat)
        self.flat.gradients.finish()
        self.routing.collect(contexts, self._sequences(microbatches))
        return self._mean_loss(losses) / self.scaler.value, self._rms(contexts)

    def apply_gradients(self, loss: Tensor, rms: Tensor | None, lr: float) -> StepResult:
        """Clip and update."""
        scale = self.scaler.value.clone()
        norm = self.norm() / scale
        skip = (~torch.isfinite(norm + loss)).to(torch.float32)
        clip = self.config.optimizer.clip
        divisor = scale * torch.clamp(norm / clip, min=1.0) if clip else scale
        rate = torch.tensor(lr, dtype=norm.dtype).to(norm.device, non_blocking=True)
        self.optimizer.step(rate, divisor, skip)
        self.scaler.update(skip)
        self.routing.update(skip)
        return StepResult(loss, norm, skip, scale, rms, self.routing.metrics(), self.local_loss, self.norm.parts)

    def pieces(self, *, share: bool) -> Iterator[tuple[Address, Tensor]]:
        """All that a checkpoint holds, as addressed flat tensors; ``share`` as in the optimizer."""
        yield from self.optimizer.pieces(share=share)
        yield from self.routing.pieces(share=share)

    def own_gradients(self, microbatches: Sequence[Microbatch], counts: Counts, step: int, memory: Memory) -> None:
        """Run the batch again, for a diagnosis, with what the executor says going to ``memory``; ranks call together.

        The gradients it leaves are those of no step: the next one starts from zero.
        """
        self.flat.gradients.begin()
        contexts = self._contexts(microbatches, counts, step, False, training=True)
        self.executor.run(self._plan(len(contexts), True), contexts, self._carried(microbatches), memory)

    def evaluate(self, microbatches: Sequence[Microbatch], counts: Counts) -> Tensor:
        """Mean loss over held-out ``microbatches``, dropout off, on every rank."""
        return self.held_out(microbatches, counts)["loss"]

    def held_out(self, microbatches: Sequence[Microbatch], counts: Counts) -> dict[str, Tensor]:
        """``evaluate`` as ``loss``; where that is a sum of several losses, each of them as ``loss/NAME``.

        ``replaced``: the share of tokens that a generator has replaced.
        """
        contexts = self._contexts(microbatches, counts, 0, False, training=False)
        losses = self.executor.run(self._plan(len(contexts), False), contexts, self._carried(microbatches), self.flat)
        names = loss_parts(self.config.model)
        told = {f"loss/{name}": name for name in names if len(names) > 1}
        told |= {"replaced": "replaced"} if "detection" in names else {}
        parts = {shown: [c.parts[name] for c in contexts if name in c.parts] for shown, name in told.items()}
        means = {shown: self._mean_loss(part) for shown, part in parts.items()}
        means["loss"] = self._mean_loss(losses)
        return {name: mean / self.scaler.value for name, mean in means.items()}

    def _plan(self, microbatches: int, training: bool) -> list[Action]:
        """This rank's schedule; plans are kept, as a step of a run is like the one before."""
        key = (microbatches, training)
        if key not in self._plans:
            parallel, axis = self.config.parallel, self.grid.pipeline
            every = plans(parallel.schedule, axis.size, parallel.chunks, microbatches, training=training)
            self._plans[key] = every[axis.rank]
        return self._plans[key]

    def _contexts(
        self, microbatches: Sequence[Microbatch], counts: Counts, step: int, rms: bool, *, training: bool
    ) -> list[Context]:
        train = self.config.train
        terms = LossTerms(self.model.vocab_size)
        if training:  # validation reports the plain cross-entropy, whatever the objective adds to it
            terms = replace(terms, smoothing=train.label_smoothing, z_loss=train.z_loss)
        labels = self.scaler.value / max(1, counts.labels)
        tokens, detection = self.scaler.value / max(1, counts.tokens), self.config.model.detection_loss
        loss = Loss(self.scaler.value / counts.targets, labels, tokens, detection, terms, self.kernels)
        seed = train.seed
        contexts = [self.model.context(m, seed=seed, step=step, training=training) for m in microbatches]
        auxiliary = Auxiliary(self.scaler.value / self._sequences(microbatches))
        for context in contexts:
            context.loss, context.sentence_loss, context.auxiliary = loss, loss.sentence, auxiliary
            context.detection_loss = loss.detection
            context.rms = {} if rms else None
            if context.encoder is not None:
                context.encoder.rms = context.rms
        return contexts

    def _carried(self, microbatches: Sequence[Microbatch]) -> Callable[[int], tuple[Carried, ...]]:
        """What each layer takes; all microbatches of a step have one shape, a ramp changes it between steps."""
        return partial(self.model.carried, microbatches[0])

    def _sequences(self, microbatches: Sequence[Microbatch]) -> int:
        """Sequences of the global batch; all data ranks have equally many."""
        return sum(m.tokens.shape[1] for m in microbatches) * self.grid.data.size

    def _mean_loss(self, losses: list[Tensor]) -> Tensor:
        """Sum the last stage's losses over the data ranks and tell every rank."""
        total = torch.stack(losses).sum() if losses else self.norm.zero.clone()
        if self.grid.tensor.rank:
            total = torch.zeros_like(total)  # tensor ranks hold equal losses: one speaks
        self.local_loss = total.clone()
        self.grid.world.all_reduce(total).wait()
        return total

    def _rms(self, contexts: list[Context]) -> Tensor | None:
        if contexts[0].rms is None:
            return None
        every = blocks(self.model.config)
        squares = torch.stack([mean_square(every, c.rms or {}, self.model.device) for c in contexts]).mean(0)
        self.grid.world.all_reduce(squares).wait()
        return (squares / (self.grid.tensor.size * self.grid.replicas.size)).sqrt()
