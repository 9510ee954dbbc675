"""AdamW (arXiv 1711.05101) over the shards of the buckets, with fp32 master weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megapre.config.schema import OptimizerConfig
from megapre.kernels.registry import Kernels
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

    def __init__(self, config: OptimizerConfig, buffers: Buffers, kernels: Kernels) -> None:
        self.config, self.buffers, self.home, self.kernels = config, buffers, buffers.home, kernels
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
            for index, gradient in gradients.items():
                self._update(index, gradient, lr, divisor, skip)
        self._publish()

    def copy_to_model(self) -> None:
        """Give every rank's model the master weights."""
        for master, weights in zip(self.state["weight"], self.buffers.weights.shards):
            self.home.deliver(master, weights)
        self._publish()

    def _publish(self) -> None:
        self.home.delivered()
        self.buffers.weights.publish()

    def _update(self, index: int, gradient: Tensor, lr: Tensor, divisor: Tensor, skip: Tensor) -> None:
        """AdamW on this rank's shard of bucket ``index``; ``gradient`` lives where the state does."""
        config, model = self.config, self.buffers.weights.shards[index]
        master, averages, squares = (self.state[name][index] for name in STATES)
        beside = model.device == master.device  # then the kernel writes the model's weights in the same pass
        for decay, run in self.runs[index]:
            copy = model[run] if beside and model is not master else None
            self.kernels.adamw_(
                master[run], gradient[run], averages[run], squares[run], copy, lr=lr, beta1=config.beta1,
                beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay if decay else 0.0,
                step=self.steps, divisor=divisor, skip=skip,
            )  # fmt: skip
        if not beside:
            self.home.deliver(master, model)

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
