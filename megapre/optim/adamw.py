"""AdamW (arXiv 1711.05101) over the shards of the flat buffers, with fp32 master weights."""

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
    """Optimizer state of this rank's part of every bucket: all of it, or a data rank's shard under ZeRO-1.

    ``master`` holds fp32 weights (fp64 under fp64); where the model computes in that format, it is the model's
    own memory.
    """

    def __init__(self, config: OptimizerConfig, buffers: Buffers) -> None:
        self.config, self.buffers = config, buffers
        wide = buffers.gradients.dtype
        device = buffers.weights.device
        self.state: dict[str, list[Tensor]] = {name: [] for name in STATES}
        self.runs: dict[bool, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {True: [], False: []}
        for bucket in buffers.layout.buckets:
            start, end = buffers.shard(bucket)
            weights = buffers.weights[start:end]
            master = weights if weights.dtype == wide else weights.to(wide)
            moments = [torch.zeros(end - start, dtype=wide, device=device) for _ in range(2)]
            for name, tensor in zip(STATES, (master, *moments)):
                self.state[name].append(tensor)
            gradients = buffers.gradients[start:end]
            for decay, a, b in _decay_runs(bucket, start, end):
                run = slice(a - start, b - start)
                self.runs[decay].append((master[run], gradients[run], moments[0][run], moments[1][run]))
        self.steps = torch.zeros((), dtype=torch.float32, device=device)

    def step(self, lr: Tensor, divisor: Tensor, skip: Tensor) -> None:
        """Update the weights with gradient / ``divisor`` unless ``skip`` is 1; all are 0-d device tensors."""
        self.steps += 1 - skip
        config = self.config
        scale: Tensor | None = divisor
        if divisor.dtype == torch.float64:  # the fused kernel reads an fp32 scale, too coarse for a proof
            self.buffers.gradients.div_(divisor)
            scale = None
        for decay, runs in self.runs.items():
            if not runs:
                continue
            weights, gradients, averages, squares = (list(column) for column in zip(*runs))
            torch._fused_adamw_(
                weights, gradients, averages, squares, [], [self.steps] * len(runs), lr=lr, beta1=config.beta1,
                beta2=config.beta2, weight_decay=config.weight_decay if decay else 0.0, eps=config.eps, amsgrad=False,
                maximize=False, grad_scale=scale, found_inf=skip,
            )  # fmt: skip
        self.copy_to_model()

    def copy_to_model(self) -> None:
        """Give every rank's model the master weights."""
        for bucket, master in zip(self.buffers.layout.buckets, self.state["weight"]):
            start, end = self.buffers.shard(bucket)
            model = self.buffers.weights[start:end]
            if model.dtype != master.dtype:  # else they are one memory
                model.copy_(master)
        self.buffers.gather_weights()

    def pieces(self, *, share: bool) -> Iterator[tuple[Address, Tensor]]:
        """State as addressed flat tensors, named ``kind/tensor``.

        With ``share`` the ranks' pieces tile every logical tensor exactly once, for saving: replicas leave the
        writing to the primary, and data ranks split it as ZeRO-1 would. Without, all that this rank updates.
        """
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
