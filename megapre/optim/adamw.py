"""AdamW (arXiv 1711.05101) over the shards of the buckets, with fp32 master weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megapre.config.schema import OptimizerConfig
from megapre.parallel.buckets import Buffers
from megapre.parallel.layout import Bucket, Slot
from megapre.parallel.placement import Address

STATES = ("weight", "exp_avg", "exp_avg_sq")
"""Kinds of tensor that a checkpoint holds for every parameter."""


class AdamW:
    """Optimizer state of this rank's part of every bucket: all of it, or its shard under ZeRO.

    ``master`` holds fp32 weights (fp64 under fp64); where the model's shards have that format and live in the same
    place, it is these. State lives in, and is updated at, ``buffers.home``: the device or host memory.
    """

    def __init__(self, config: OptimizerConfig, buffers: Buffers) -> None:
        self.config, self.buffers, self.home = config, buffers, buffers.home
        self.state: dict[str, list[Tensor]] = {name: [] for name in STATES}
        self.runs: list[list[tuple[bool, slice]]] = []
        """Of every bucket's shard: which stretches are decayed, and which are not."""
        for bucket, weights in zip(buffers.layout.buckets, buffers.weights.shards):
            master = weights
            if weights.dtype != buffers.wide or buffers.weights.home is not self.home:
                master = self.home.zeros(weights.numel(), buffers.wide)
                master.copy_(weights)
            moments = [self.home.zeros(weights.numel(), buffers.wide) for _ in range(2)]
            for name, tensor in zip(STATES, (master, *moments)):
                self.state[name].append(tensor)
            start, end = buffers.shard(bucket)
            self.runs.append([(decay, slice(a - start, b - start)) for decay, a, b in _decay_runs(bucket, start, end)])
        self.steps = torch.zeros((), dtype=torch.float32, device=self.home.device)

    def step(self, lr: Tensor, divisor: Tensor, skip: Tensor) -> None:
        """Update the weights with gradient / ``divisor`` unless ``skip`` is 1; all are 0-d device tensors."""
        lr, divisor, skip = (self.home.scalar(value) for value in (lr, divisor, skip))
        self.steps += 1 - skip
        for gradients in self.home.visit(self.buffers.gradients.shards):
            self._update(gradients, lr, divisor, skip)
            for index in gradients:
                self.home.deliver(self.state["weight"][index], self.buffers.weights.shards[index])
        self._publish()

    def copy_to_model(self) -> None:
        """Give every rank's model the master weights."""
        for master, weights in zip(self.state["weight"], self.buffers.weights.shards):
            self.home.deliver(master, weights)
        self._publish()

    def _publish(self) -> None:
        self.home.delivered()
        self.buffers.weights.publish()

    def _update(self, gradients: dict[int, Tensor], lr: Tensor, divisor: Tensor, skip: Tensor) -> None:
        """AdamW on the shards of some buckets; ``gradients``, by bucket, live where the state does."""
        config = self.config
        scale: Tensor | None = divisor
        if divisor.dtype == torch.float64:  # the fused kernel reads an fp32 scale, too coarse for a proof
            for gradient in gradients.values():
                gradient.div_(divisor)
            scale = None
        for wanted in (True, False):
            runs = [
                tuple(tensor[run] for tensor in (self.state["weight"][index], gradient, *self._moments(index)))
                for index, gradient in gradients.items()
                for decay, run in self.runs[index]
                if decay == wanted
            ]
            if not runs:
                continue
            weights, slices, averages, squares = (list(column) for column in zip(*runs))
            torch._fused_adamw_(
                weights, slices, averages, squares, [], [self.steps] * len(runs), lr=lr, beta1=config.beta1,
                beta2=config.beta2, weight_decay=config.weight_decay if wanted else 0.0, eps=config.eps, amsgrad=False,
                maximize=False, grad_scale=scale, found_inf=skip,
            )  # fmt: skip

    def _moments(self, index: int) -> tuple[Tensor, Tensor]:
        return self.state["exp_avg"][index], self.state["exp_avg_sq"][index]

    def pieces(self, *, share: bool) -> Iterator[tuple[Address, Tensor]]:
        """State as addressed flat tensors, named ``kind/tensor``.

        With ``share`` the ranks' pieces tile every logical tensor exactly once, for saving: replicas leave the
        writing to the primary, and data ranks split it as ZeRO would. Without, all that this rank updates.
        """
        self.buffers.weights.settle()
        for index, bucket in enumerate(self.buffers.layout.buckets):
            origin, end = self.buffers.shard(bucket)
            start = origin
            if share:
                start, end = self.buffers.share(bucket)
            for slot in bucket.slots:
                if share and not slot.primary:
                    continue
                yield from self._addressed(slot, start, end, index, origin)

    def _addressed(self, slot: Slot, start: int, end: int, index: int, origin: int) -> Iterator[tuple[Address, Tensor]]:
        for kind in STATES:
            address = slot.address(start, end, prefix=f"{kind}/")
            if address is not None:
                first = slot.start + address.start - origin
                yield address, self.state[kind][index][first : first + address.end - address.start]


def _decay_runs(bucket: Bucket, start: int, end: int) -> Iterator[tuple[bool, int, int]]:
    """Stretches of [start, end) whose tensors are all decayed or all not; padding joins what precedes it."""
    edges: list[tuple[int, bool]] = []
    for slot in bucket.slots:
        if not edges or edges[-1][1] != slot.spec.decay:
            edges.append((slot.start, slot.spec.decay))
    for (first, decay), stop in zip(edges, [edge for edge, _ in edges[1:]] + [bucket.end]):
        a, b = max(first, start), min(stop, end)
        if a < b:
            yield decay, a, b
