"""Runs any schedule. The same code serves one stage and many, training, validation and verify.

A stage is a list of layers, and autograd is cut between them: backward walks the layers itself. So it knows, without
hooks, which layer's weights are read when (to gather and free them), when a layer's gradients are complete (to reduce
them), and which layers to run forward again (recompute). Messages are posted where the schedule says and awaited where
their data is used.

What goes from layer to layer is a tuple of tensors, declared for every layer that takes one (`Carried`). A layer may
hand on a tensor as it is, such as an encoder's output, which every decoder block reads: its gradient is then the sum of
what later layers and this one add to it, across stages too.

The last layer makes the loss, and layers before it may each make a part of it (ELECTRA's generator). In training all of
these run in B, where their gradients are wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megapre.parallel.comm import Work
from megapre.parallel.grid import Grid
from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, WEIGHT, Action, Communicate, Compute, Transfer
from megapre.parallel.weight_queue import Addition, WeightQueue

Carry = tuple[Tensor, ...]
Gradients = Sequence[Tensor | None]
Key = tuple[bool, int, int]
"""(forward, stage, microbatch)."""


@dataclass(frozen=True)
class Carried:
    """One tensor of the tuple that a layer takes, for one microbatch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool = True
    """Whether it has a gradient, which then comes back from the layer; ids have none."""


class Layer(Protocol):
    """A differentiable step from carry to carry; the last layer of the pipeline returns the loss or logits."""

    def __call__(self, context: object, *carry: Tensor) -> Carry:
        """Apply the layer."""


class Memory(Protocol):
    """Where the layers' weights and main gradients live: told what a plan is about to touch."""

    def begin(self, visits: Sequence[int]) -> None:
        """A plan starts that enters these layers, in this order."""

    def enter(self, layer: int) -> None:
        """The weights of ``layer`` are read from here on."""

    def leave(self, layer: int) -> None:
        """The weights of ``layer`` are not read before its next visit."""

    def open(self, layer: int) -> None:
        """Gradients of ``layer`` are added from here on."""

    def close(self, layer: int, last: bool) -> None:
        """A microbatch's gradients of ``layer`` are in; ``last``: it was the plan's last."""


@dataclass(frozen=True)
class StageLayers:
    """The layers of one stage with their numbers in the model."""

    numbers: Sequence[int]
    layers: Sequence[Layer]
    recomputed: frozenset[int] = frozenset()
    """Numbers of the layers that keep only their input and run forward again in backward."""
    losses: Mapping[int, Callable[..., Carry]] = field(default_factory=dict)
    """By their numbers, what layers before the last add to the loss: of what the layer takes, a scalar or nothing."""

    def loss(self, number: int, context: object, inputs: Carry) -> Carry:
        """What layer ``number`` adds to the loss, unless it is the last of all."""
        return self.losses[number](context, *inputs) if number in self.losses else ()


class Executor:
    """Drives this rank's stages through a schedule.

    ``stages`` maps the number of each stage that this rank holds to its layers, of ``count`` in all. After a run,
    ``peak_in_flight`` is the most microbatch-stages held at once, which the simulator predicts.
    """

    def __init__(
        self,
        stages: Mapping[int, StageLayers],
        count: int,
        grid: Grid,
        queue: WeightQueue,
        device: torch.device,
    ) -> None:
        self.stages, self.last, self.grid, self.queue, self.device = stages, count - 1, grid, queue, device
        self.peak_in_flight = 0

    def run(
        self,
        plan: Sequence[Action],
        contexts: Sequence[object],
        carried: Callable[[int], tuple[Carried, ...]],
        memory: Memory,
    ) -> list[Tensor]:
        """Execute ``plan``; ``contexts[m]`` is microbatch m's. Returns the last outputs.

        ``carried(number)`` declares what layer ``number`` takes of a microbatch, the same for all of them.
        """
        return _Run(self, plan, contexts, carried, memory).execute()


class _Run:
    """The state of one execution of a plan."""

    def __init__(
        self,
        executor: Executor,
        plan: Sequence[Action],
        contexts: Sequence[object],
        carried: Callable[[int], tuple[Carried, ...]],
        memory: Memory,
    ) -> None:
        self.executor, self.plan, self.contexts, self.carried = executor, plan, contexts, carried
        self.memory, self.grid = memory, executor.grid
        kinds = [(action.kind, action.stage) for action in plan if isinstance(action, Compute)]
        self.training = any(kind == BACKWARD for kind, _ in kinds)
        self.split = any(kind == WEIGHT for kind, _ in kinds)
        self.left = Counter(kinds)
        """Per kind and stage, the actions that are still to come."""
        self.arriving: dict[Key, tuple[list[Tensor], list[Work]]] = {}
        self.departing: dict[int, tuple[list[Tensor], list[Work]]] = {}
        self.made: dict[Key, Carry] = {}
        """What a stage of this rank made and nobody has taken yet, by the stage that needs it."""
        self.saved: dict[tuple[int, int], list[tuple[Carry, Carry | None]]] = {}
        self.additions: dict[tuple[int, int], list[tuple[int, list[Addition]]]] = {}
        """What W actions are still to add to main gradients."""
        self.results: list[Tensor] = []

    def execute(self) -> list[Tensor]:
        self.executor.peak_in_flight = 0
        self.memory.begin(self.visits())
        with torch.set_grad_enabled(self.training):
            for action in self.plan:
                if isinstance(action, Communicate):
                    for transfer in action.transfers:
                        self.post(transfer)
                else:
                    {FORWARD: self.forward, BACKWARD: self.backward, WEIGHT: self.weight}[action.kind](
                        action.stage, action.microbatch
                    )
        for peer in list(self.departing):
            self.await_sent(peer)
        assert not (self.saved or self.arriving or self.made or self.additions), "the schedule left work undone"
        return self.results

    def visits(self) -> list[int]:
        """The layers in the order in which this plan reads their weights."""
        numbers: list[int] = []
        for action in self.plan:
            if isinstance(action, Compute) and action.kind != WEIGHT:
                held = self.executor.stages[action.stage].numbers
                numbers += held[: self.forward_layers(action.stage)] if action.kind == FORWARD else reversed(held)
        return numbers

    def post(self, transfer: Transfer) -> None:
        peer = transfer.peer
        # One communicator for messages to later ranks and one for earlier: between two ranks each has one direction.
        upward = (peer > self.grid.pipeline.rank) == transfer.send
        axis = self.grid.pipeline if upward else self.grid.backward
        if transfer.send:
            self.await_sent(peer)
            needed_by = transfer.stage + 1 if transfer.forward else transfer.stage - 1
            carry = self.made.pop((transfer.forward, needed_by, transfer.microbatch))
            tensors = [tensor.detach().contiguous() for tensor in carry]
            works = [axis.send(tensor, peer) for tensor in tensors]
            held = self.held(transfer.stage, transfer.microbatch) if transfer.forward else []
            self.departing[peer] = ([x for x in tensors if not _within(x, held)], works)
        else:
            tensors = self.buffers(transfer.stage, transfer.forward)
            works = [axis.recv(tensor, peer) for tensor in tensors]
            self.arriving[transfer.forward, transfer.stage, transfer.microbatch] = (tensors, works)

    def buffers(self, stage: int, forward: bool) -> list[Tensor]:
        """Where a message to ``stage`` arrives: what its first layer takes, or gradients of what it has handed on."""
        numbers = self.executor.stages[stage].numbers
        wanted = self.carried(numbers[0] if forward else numbers[-1] + 1)
        return [
            torch.empty(c.shape, dtype=c.dtype, device=self.executor.device) for c in wanted if forward or c.gradient
        ]

    def held(self, stage: int, m: int) -> list[Tensor]:
        """What backward of a stage will read: its layers' inputs. One of them may be handed on as it is."""
        return [x for inputs, _ in self.saved.get((stage, m), []) for x in inputs]

    def await_sent(self, peer: int) -> None:
        """Wait for the message under way to ``peer`` and free what it carried and this stage does not read again.

        The autograd graph needs the shape of a layer's own output, never its values.
        """
        tensors, works = self.departing.pop(peer, ([], []))
        for work in works:
            work.wait()
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)

    def take(self, key: Key) -> Carry:
        """What a stage needs: from another rank, or from this rank's neighbouring stage."""
        if key not in self.arriving:
            return self.made.pop(key)
        tensors, works = self.arriving.pop(key)
        for work in works:
            work.wait()
        return tuple(tensors)

    def forward_layers(self, stage: int) -> int:
        """How many of a stage's layers run in F.

        In training the last layer of all, which makes the loss, waits for B: it computes gradients along with its
        result, and nobody needs either sooner.
        """
        count = len(self.executor.stages[stage].numbers)
        return count - 1 if self.training and stage == self.executor.last else count

    def forward(self, stage: int, m: int) -> None:
        held, count = self.executor.stages[stage], self.forward_layers(stage)
        carry: Carry = () if stage == 0 else self.take((True, stage, m))
        steps: list[tuple[Carry, Carry | None]] = []
        for number, layer in zip(held.numbers[:count], held.layers):
            again = number in held.recomputed and self.training
            inputs = self.cut(number, carry)
            self.memory.enter(number)
            with torch.set_grad_enabled(self.training and not again):
                carry = layer(self.contexts[m], *inputs)
            if not self.training:
                self.results += held.loss(number, self.contexts[m], inputs)
            self.memory.leave(number)
            steps.append((inputs, None if again else carry))
        if self.training:
            if stage == self.executor.last:
                steps.append((self.cut(held.numbers[-1], carry), None))
            self.saved[stage, m] = steps
            held_now = len(self.saved) + len(self.additions)
            self.executor.peak_in_flight = max(self.executor.peak_in_flight, held_now)
        elif stage == self.executor.last:
            self.results += carry
        if stage < self.executor.last:
            self.made[True, stage + 1, m] = carry

    def cut(self, number: int, carry: Carry) -> Carry:
        """The same values as leaves of a new graph, that of layer ``number``."""
        both = zip(carry, self.carried(number), strict=True)
        return tuple(x.detach().requires_grad_(self.training and c.gradient) for x, c in both)

    def backward(self, stage: int, m: int) -> None:
        held = self.executor.stages[stage]
        gradients: Gradients = () if stage == self.executor.last else self.arrived(held.numbers[-1] + 1, stage, m)
        steps = self.saved.pop((stage, m))
        self.left[BACKWARD, stage] -= 1
        if self.split:
            self.additions[stage, m] = []
        for number, layer in zip(reversed(held.numbers), reversed(held.layers)):
            last = stage == self.executor.last and number == held.numbers[-1]
            # A loss adds its weight gradients while it has the logits.
            later = self.split and not last and number not in held.losses
            inputs, outputs = steps.pop()
            self.memory.enter(number)
            if not later:
                self.memory.open(number)
            if outputs is None:
                outputs = layer(self.contexts[m], *inputs)
            losses = outputs if last else held.loss(number, self.contexts[m], inputs)
            self.results += [loss.detach() for loss in losses]
            ends, given = ([], []) if last else _with_gradient(outputs, gradients)
            with self.executor.queue.kept(later) as additions:
                torch.autograd.backward([*ends, *losses], [*given, *[None] * len(losses)])
            self.memory.leave(number)
            gradients = [x.grad for x in inputs]
            if later:
                self.additions[stage, m].append((number, additions))
            else:
                self.memory.close(number, last=not self.left[BACKWARD, stage])
        if stage:
            # What no layer of this stage has used, though it could have, has a gradient of zeros.
            needed = [(x, g) for x, g in zip(inputs, gradients) if x.requires_grad]
            self.made[False, stage - 1, m] = tuple(torch.zeros_like(x) if g is None else g for x, g in needed)

    def arrived(self, number: int, stage: int, m: int) -> list[Tensor | None]:
        """Gradients of all that layer ``number`` of the next stage takes, None for what has none."""
        given = iter(self.take((False, stage, m)))
        return [next(given) if c.gradient else None for c in self.carried(number)]

    def weight(self, stage: int, m: int) -> None:
        self.left[WEIGHT, stage] -= 1
        for number, additions in self.additions.pop((stage, m)):
            self.memory.open(number)
            self.executor.queue.run(additions)
            self.memory.close(number, last=not self.left[WEIGHT, stage])


def _within(x: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether ``x`` shares its memory with one of ``others``."""
    return any(x.untyped_storage() is other.untyped_storage() for other in others)


def _with_gradient(outputs: Carry, gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """Those of ``outputs`` from which backward starts, with their gradients."""
    both = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None]
    return [y for y, _ in both], [g for _, g in both]
