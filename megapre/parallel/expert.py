"""Expert parallelism: tokens travel to the ranks that hold their experts, and their results come back.

The expert mesh cuts the ranks of a stage another way than the dense one: replicas x expert x expert_tensor. Every
rank of a stage sends tokens of its own, whatever the dense axes: under sequence parallelism a tensor rank holds other
tokens than its neighbours, without it the neighbours divide theirs (:func:`divide`, :func:`unite`). So no token is
routed twice, and what routers learn from is a partial sum over the tensor axis. Where ``expert_tensor`` neighbours
share an expert, each of them works on the tokens of all (:func:`gathered`, :func:`summed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megapre.kernels.registry import Kernels
from megapre.parallel.comm import Axis
from megapre.parallel.tensor import gather, scatter_sum

Mapping = Callable[[Tensor, Axis], Tensor]


def _own(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size)[axis.rank].contiguous()


class _Mapped(torch.autograd.Function):
    """``ahead`` of rows over an axis, and ``back`` of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, ahead: Mapping, back: Mapping) -> Tensor:
        ctx.axis, ctx.back = axis, back
        return ahead(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.back(dy, ctx.axis), None, None, None


def _over(x: Tensor, axis: Axis, ahead: Mapping, back: Mapping) -> Tensor:
    return x if axis.size == 1 else _Mapped.apply(x, axis, ahead, back)


def divide(x: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of what all ranks of ``axis`` hold alike."""
    return _over(x, axis, _own, gather)


def unite(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' rows, on every rank, for what all go on to do alike; the inverse of :func:`divide`."""
    return _over(x, axis, gather, _own)


def gathered(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' rows, on every rank, each of which goes on to do a part of the work: gradients are summed."""
    return _over(x, axis, gather, scatter_sum)


def summed(x: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of the sum over all ranks; the inverse of :func:`gathered`."""
    return _over(x, axis, scatter_sum, gather)


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; their gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return _exchange(x, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _exchange(dy, ctx.received, ctx.sent, ctx.axis), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    output = x.new_empty(sum(received), *x.shape[1:])
    axis.all_to_all(output, x.contiguous(), received, sent).wait()
    return output


@dataclass(frozen=True)
class Route:
    """Where the kept choices of this rank's tokens go, and what arrives here."""

    source: Tensor
    """int64 [N]: token of each row that is sent; rows are sorted by expert, then token, then choice."""
    rows: Tensor
    """int64 [n, k]: row of each choice, N for a dropped one."""
    sent: list[int]
    """Rows to each rank of the expert axis."""
    received: list[int]
    """Rows from each."""
    order: Tensor
    """int64: which received row (sorted by rank, then expert) stands where when sorted by expert, then rank."""
    back: Tensor
    """int64: the inverse of ``order``."""
    sizes: list[int]
    """Rows of each expert of this rank."""

    @staticmethod
    def find(ids: Tensor, kept: Tensor | None, experts: int, axis: Axis) -> Route:
        """The route of ``ids`` [n, k], experts of each token's choices, as far as they are ``kept``.

        Ranks tell each other how many rows they send. All sizes are read by the host here, once: fixed ones would
        have to be those of the worst case, in which all tokens of a rank go to one expert.
        """
        choices = ids.shape[1]
        expert = ids.flatten() if kept is None else torch.where(kept, ids, experts).flatten()
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
        sent = counts.index_add_(0, expert, torch.ones_like(expert))[:experts].view(axis.size, -1)
        received = torch.empty_like(sent)
        axis.all_to_all(received, sent).wait()
        table: list[list[list[int]]] = torch.stack((sent, received)).tolist()
        outgoing, incoming = ([sum(row) for row in half] for half in table)
        first = torch.sort(expert, stable=True).indices[: sum(outgoing)]
        rows = torch.full_like(expert, len(first))
        rows[first] = torch.arange(len(first), device=ids.device)
        here = torch.arange(received.shape[1], device=ids.device).repeat(axis.size)
        arrived = torch.repeat_interleave(here, received.flatten(), output_size=sum(incoming))
        order = torch.sort(arrived, stable=True).indices
        sizes = [sum(column) for column in zip(*table[1])]
        return Route(first // choices, rows.view(-1, choices), outgoing, incoming, order, torch.argsort(order), sizes)


class GroupedLinear(nn.Module):
    """Linear layers of this rank's experts, each over its own rows: [N, in] to [N, out].

    ``weight`` [experts x out, in] holds them one below the other.
    """

    def __init__(self, weight: nn.Parameter, experts: int, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self.experts, self.kernels = weight, experts, kernels

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Apply; ``sizes`` are the experts' rows."""
        return _GroupedLinear.apply(x, self.weight, self.experts, sizes, self.kernels)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, experts: int, sizes: list[int], kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.experts, ctx.sizes, ctx.kernels = weight, experts, sizes, kernels
        return kernels.grouped_mm(x, weight.detach().unflatten(0, (experts, -1)), sizes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        weight, cut = ctx.weight, (ctx.experts, -1)
        dy = dy.contiguous()
        dx = ctx.kernels.grouped_mm(dy, weight.detach().unflatten(0, cut).transpose(1, 2), ctx.sizes)
        weight.queue.add(partial(ctx.kernels.grouped_dw_, weight.main_grad.unflatten(0, cut), dy, x, ctx.sizes))
        return dx, None, None, None, None


class Experts(nn.Module):
    """The experts of one layer over the expert mesh: two grouped linear layers around an activation."""

    def __init__(
        self,
        up: GroupedLinear,
        down: GroupedLinear,
        activation: Callable[[Tensor], Tensor],
        count: int,
        axes: tuple[Axis, Axis],
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.up, self.down, self.activation, self.count = up, down, activation, count
        self.axis, self.tensor_axis = axes
        self.kernels = kernels

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor | None) -> Tensor:
        """sum_j weights[t, j] expert_ids[t, j](x[t]) over the kept choices: [n, hidden] to the same.

        ``ids`` int64, ``weights`` fp32 (fp64) and ``kept`` bool are [n, k]; no ``kept`` keeps all.
        """
        x, weights = gathered(x, self.tensor_axis), gathered(weights, self.tensor_axis)
        ids = ids if self.tensor_axis.size == 1 else gather(ids, self.tensor_axis)
        if kept is not None and self.tensor_axis.size > 1:
            kept = gather(kept.to(torch.uint8), self.tensor_axis).bool()
        route = Route.find(ids, kept, self.count, self.axis)
        y = self.kernels.permute(x, route.source, route.rows)
        if self.axis.size > 1:
            y = _Exchange.apply(y, route.sent, route.received, self.axis)
            y = self.kernels.permute(y, route.order, route.back.unsqueeze(1))
        y = self.down(self.activation(self.up(y, route.sizes)), route.sizes)
        if self.axis.size > 1:
            y = self.kernels.permute(y, route.back, route.order.unsqueeze(1))
            y = _Exchange.apply(y, route.received, route.sent, self.axis)
        y = self.kernels.unpermute(y, weights, route.source, route.rows)
        return summed(y, self.tensor_axis)
