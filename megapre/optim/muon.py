"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum made orthogonal, for hidden matrices.

The step has the size of AdamW's (arXiv 2502.16982), so both take the same learning rate and decay: a matrix
[m, n] moves by 0.2 sqrt(max(m, n)) times its orthogonalised momentum. Matrices are the logical ones: q, k and v, gate
and up alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megapre.config.schema import OptimizerConfig
from megapre.kernels.registry import Kernels
from megapre.optim.shard import Now, Rule, Shard
from megapre.parallel.buckets import Buffers
from megapre.parallel.comm import Axis
from megapre.parallel.layout import Slot
from megapre.parallel.placement import Replicate

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic a x + b x^3 + c x^5, which moves singular values to about 1 (Jordan et al.)."""
ROUNDS = 5
TINY = 1e-7
"""Least norm that a momentum is divided by: that of an expert without tokens is zero."""


class Muon(Rule):
    """m = mu m + (1 - mu) g; u = orthogonal((1 - mu) g + mu m); w = w (1 - lr decay) - lr 0.2 sqrt(max(m, n)) u.

    A matrix that ZeRO cuts is gathered as momentum, and orthogonalised by every replica that holds a part of it. Tensor
    ranks keep their parts: the products of ``orthogonal`` contract over the dimension that is cut.
    """

    states: tuple[str, ...] = ("momentum",)

    def __init__(
        self, config: OptimizerConfig, buffers: Buffers, kernels: Kernels, mine: Mapping[int, Sequence[Slot]]
    ) -> None:
        super().__init__(config, buffers, kernels, mine)
        half = buffers.weights.shards[0].dtype != buffers.wide
        self.dtype = torch.bfloat16 if half else buffers.wide
        """Of gathered momentum and of the products."""

    def update(self, shard: Shard, gradient: Tensor, now: Now) -> None:
        """As the optimizer asks."""
        slots = self.mine[shard.index]
        if not slots:
            return
        whole = self._momentum(shard, gradient, now)
        grid, rate = self.buffers.grid, now.lr * now.kept
        for slot in slots:
            part = shard.overlap(slot)
            if part.start == part.stop:
                continue
            axis = grid.tensor if slot.spec.expert is None else grid.expert_tensor
            step = orthogonal(whole[shard.bucket.place(slot)].view(slot.shape), slot, axis).flatten()
            first = shard.start + part.start - slot.start
            step = step[first : first + part.stop - part.start].to(rate.dtype)
            weight, decay = shard.weight[part], self.config.weight_decay if slot.spec.decay else 0.0
            weight.mul_(1 - rate * decay).sub_(step.mul_(rate * 0.2 * math.sqrt(max(slot.spec.shape))))
            shard.publish(part)

    def _momentum(self, shard: Shard, gradient: Tensor, now: Now) -> Tensor:
        """Nesterov momentum of the whole bucket, where it is this rule's."""
        whole = gradient.new_zeros(shard.bucket.size, dtype=self.dtype)
        own = whole[shard.start - shard.bucket.start : shard.end - shard.bucket.start]
        keep = self.config.momentum
        for stretch in shard.of("muon"):
            g, momentum = now.clean(gradient[stretch.part]), shard.state("momentum", stretch.part)
            momentum.lerp_(g, (1 - keep) * now.kept.to(g.dtype))
            own[stretch.part] = g.lerp_(momentum, keep)
        if own.numel() < whole.numel():
            self.buffers.replicas(shard.bucket).all_gather(whole, own).wait()
        return whole


def orthogonal(matrix: Tensor, slot: Slot, axis: Axis) -> Tensor:
    """This rank's part of U V^T, nearly, for the whole matrix U S V^T of which it holds ``matrix``.

    Newton-Schulz iteration: X <- a X + (b G + c G^2) X with G = X X^T, X turned so that the dimension that the tensor
    axis cuts is the one that G sums over.
    """
    place, copies = slot.spec.placement, slot.spec.placement.replicas(axis.size)
    turned = matrix.shape[0] > matrix.shape[1] if isinstance(place, Replicate) else place.dim == 0
    x = matrix.T if turned else matrix
    x = x / over_axis(torch.linalg.vector_norm(x).square(), axis, copies).sqrt().clamp(min=TINY)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = over_axis(x @ x.T, axis, copies)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if turned else x


def over_axis(part: Tensor, axis: Axis, copies: int) -> Tensor:
    """The sum of a matrix's parts, each held by ``copies`` ranks of ``axis``."""
    if copies == axis.size:
        return part
    total = part.float() if part.dtype == torch.bfloat16 else part.contiguous()
    axis.all_reduce(total).wait()
    return (total / copies).to(part.dtype)
