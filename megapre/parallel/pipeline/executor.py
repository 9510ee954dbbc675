"""Runs any schedule. The same code serves one stage and many, training, validation and verify.

A stage is a list of layers, and autograd is cut between them: backward walks the layers itself, so it knows
when a layer's gradients are complete (to start their reduction) without hooks. Messages are posted where the
schedule says and awaited where their data is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megapre.parallel.comm import Work
from megapre.parallel.grid import Grid
from megapre.parallel.pipeline.actions import FORWARD, Action, Communicate, Compute, Transfer

Carry = tuple[Tensor, ...]


class Layer(Protocol):
    """A differentiable step from carry to carry; the last layer of the pipeline returns the loss or logits."""

    def __call__(self, context: object, *carry: Tensor) -> Carry:
        """Apply the layer."""


class Executor:
    """Drives this rank's layers through a schedule.

    ``empty_carry()`` makes receive buffers. After a run, ``peak_in_flight`` is the most microbatches whose
    activations were held at once, which the simulator predicts.
    """

    def __init__(
        self, layers: Sequence[Layer], numbers: Sequence[int], grid: Grid, empty_carry: Callable[[int], list[Tensor]]
    ) -> None:
        self.layers, self.numbers, self.grid, self.empty_carry = list(layers), list(numbers), grid, empty_carry
        self.peak_in_flight = 0

    def run(
        self,
        plan: Sequence[Action],
        contexts: Sequence[object],
        microbatch: int,
        *,
        layer_done: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Execute ``plan``; ``contexts[m]`` is microbatch m's. Returns the last stage's outputs, detached.

        ``layer_done(number)`` is called when a layer has run its last backward of the plan.
        """
        return _Run(self, plan, contexts, microbatch, layer_done).execute()


class _Run:
    """The state of one execution of a plan."""

    def __init__(
        self,
        executor: Executor,
        plan: Sequence[Action],
        contexts: Sequence[object],
        microbatch: int,
        layer_done: Callable[[int], None] | None,
    ) -> None:
        self.executor, self.plan, self.contexts, self.microbatch = executor, plan, contexts, microbatch
        self.layer_done = layer_done
        self.grid = executor.grid
        self.arriving: dict[tuple[bool, int], tuple[list[Tensor], list[Work]]] = {}
        self.departing: dict[bool, tuple[list[Tensor], list[Work]]] = {}
        self.outgoing: dict[tuple[bool, int], Carry] = {}
        self.saved: dict[int, list[tuple[Carry, Carry]]] = {}
        self.backwards_left = sum(isinstance(a, Compute) and a.kind != FORWARD for a in plan)
        self.results: list[Tensor] = []

    def execute(self) -> list[Tensor]:
        training = self.backwards_left > 0
        self.executor.peak_in_flight = 0
        with torch.set_grad_enabled(training):
            for action in self.plan:
                if isinstance(action, Communicate):
                    for transfer in action.transfers:
                        self.post(transfer)
                elif action.kind == FORWARD:
                    self.forward(action.microbatch, training)
                else:
                    self.backward(action.microbatch)
        for forward in (True, False):
            self.await_sent(forward)
        assert not (self.saved or self.arriving or self.outgoing), "the schedule left work undone"
        return self.results

    def post(self, transfer: Transfer) -> None:
        axis = self.grid.pipeline if transfer.forward else self.grid.backward
        key = (transfer.forward, transfer.microbatch)
        if transfer.send:
            self.await_sent(transfer.forward)
            tensors = [tensor.detach().contiguous() for tensor in self.outgoing.pop(key)]
            self.departing[transfer.forward] = (tensors, [axis.send(t, transfer.peer) for t in tensors])
        else:
            tensors = self.executor.empty_carry(self.microbatch)
            self.arriving[key] = (tensors, [axis.recv(t, transfer.peer) for t in tensors])

    def await_sent(self, forward: bool) -> None:
        """Wait for the message under way in this direction and free what it carried.

        The autograd graph needs the shape of a stage's output, never its values.
        """
        tensors, works = self.departing.pop(forward, ([], []))
        for work in works:
            work.wait()
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)

    def receive(self, forward: bool, microbatch: int) -> Carry:
        tensors, works = self.arriving.pop((forward, microbatch))
        for work in works:
            work.wait()
        return tuple(tensors)

    def forward(self, m: int, training: bool) -> None:
        carry: Carry = () if self.grid.first_stage else self.receive(True, m)
        steps: list[tuple[Carry, Carry]] = []
        for layer in self.executor.layers:
            inputs = tuple(x.detach().requires_grad_(training) for x in carry)
            carry = layer(self.contexts[m], *inputs)
            if training:
                steps.append((inputs, carry))
        if training:
            self.saved[m] = steps
            self.executor.peak_in_flight = max(self.executor.peak_in_flight, len(self.saved))
        if self.grid.last_stage:
            self.results += [output.detach() for output in carry]
        else:
            self.outgoing[True, m] = carry

    def backward(self, m: int) -> None:
        gradients: Sequence[Tensor | None]
        gradients = [None] if self.grid.last_stage else self.receive(False, m)
        steps = self.saved.pop(m)
        self.backwards_left -= 1
        for number in reversed(self.executor.numbers):
            inputs, outputs = steps.pop()
            torch.autograd.backward(outputs, gradients)
            gradients = [x.grad for x in inputs]
            if self.layer_done and not self.backwards_left:
                self.layer_done(number)
        if not self.grid.first_stage:
            self.outgoing[False, m] = tuple(g for g in gradients if g is not None)
