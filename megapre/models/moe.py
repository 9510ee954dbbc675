"""Mixture of experts: a router picks k of E experts for every token (arXiv 1701.06538, 2101.03961, 2401.06066).

All that is counted is counted over a sequence, the largest set of tokens that no layout regroups: an expert's
capacity, and the shares of the load-balance loss. So the loss of a step is the same under any layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapre.config.schema import ModelConfig
from megapre.kernels.registry import Kernels
from megapre.models.block import FeedForward
from megapre.models.context import Context, Routed
from megapre.parallel.comm import Axis
from megapre.parallel.context import places
from megapre.parallel.expert import Experts, divide, unite
from megapre.parallel.tensor import accumulate_product, gather


class _Logits(torch.autograd.Function):
    """x W^T in fp32 (fp64), whatever the type of x and W: rounded logits would pick other experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(_wide(x), _wide(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        accumulate_product(ctx.weight, dy, _wide(x))
        return (dy @ _wide(ctx.weight)).to(x.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Router(nn.Module):
    """Scores, choices, weights and auxiliary losses of one layer; ``weight`` [E, hidden] is on every rank.

    ``axes`` are tensor and context, over which the tokens of a sequence lie; ``bias`` [E] moves choices only.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        weight: nn.Parameter,
        bias: Tensor | None,
        axes: tuple[Axis, Axis],
        method: str,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.model, self.layer, self.weight, self.kernels = model, layer, weight, kernels
        self.tensor, self.context, self.method = *axes, method
        self.bias = bias

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Experts int64, weights fp32 (fp64), and which choices are kept (None: all), [rows, batch, k] each.

        ``x`` [rows, batch, hidden] are the tokens of this rank alone.
        """
        model = self.model
        logits = _Logits.apply(x, self.weight)
        scores = logits.softmax(-1) if model.router_scores == "softmax" else logits.sigmoid()
        ids = self.choose(ctx, scores.detach())
        weights = scores.gather(-1, ids)
        if model.router_normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * model.router_scale
        if not ctx.training:
            return ids, weights, None
        whole = self.whole(ids) if model.gathers_choices else ids
        weights = self.with_losses(ctx, weights, logits, scores, ids, whole)
        if not model.capacity_factor:
            return ids, weights, None
        even = model.experts_per_token * whole.shape[0] / model.experts
        kept = within_capacity(whole, model.experts, math.ceil(round(model.capacity_factor * even, 6)))
        return ids, weights, kept[self.rows(ctx, ids.shape[0])]

    def choose(self, ctx: Context, scores: Tensor) -> Tensor:
        """The k experts of every token, by score and bias; equal ones by number."""
        return self.kernels.top_k(scores if self.bias is None else scores + self.bias, self.model.experts_per_token)

    def with_losses(
        self, ctx: Context, weights: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, whole: Tensor
    ) -> Tensor:
        """``weights``, whose backward then also adds the gradients of the auxiliary losses.

        Of a sequence of L tokens, with c_i choices of expert i and shares p_i of its scores:
        load balance E / (k L^2) sum_i c_i sum_t p_i(t), and z sum_t logsumexp(logits(t))^2 / L. This rank adds up
        its tokens; the choices, which have no gradient, are those of all.
        """
        model, experts = self.model, self.model.experts
        length = ids.shape[0] * self.tensor.size * self.context.size
        z = torch.logsumexp(logits, -1).square().sum() / length
        shares = scores if model.router_scores == "softmax" else scores / scores.sum(-1, keepdim=True)
        balance = (loads(whole, experts) * shares.sum(0)).sum() * (experts / (model.experts_per_token * length**2))
        if ctx.auxiliary is not None and (model.router_aux_loss or model.router_z_loss):
            weights = ctx.auxiliary(weights, model.router_aux_loss * balance + model.router_z_loss * z)
        load = loads(ids, experts).sum(0).double()
        ctx.routed[self.layer] = Routed(load, balance.detach(), z.detach())  # recomputation writes the same again
        return weights

    def whole(self, ids: Tensor) -> Tensor:
        """The choices of all tokens of the sequences, in order, from those of this rank: [L, batch, k]."""
        for axis in (self.tensor, self.context):
            if axis.size > 1:
                ids = gather(ids, axis)
        if self.context.size == 1:
            return ids
        order = [places(ids.shape[0], self.method, rank, self.context.size) for rank in range(self.context.size)]
        return ids[torch.argsort(torch.cat(order)).to(ids.device)]

    def rows(self, ctx: Context, count: int) -> Tensor:
        """Places in the sequence of this rank's ``count`` rows."""
        first = self.tensor.rank * count
        return ctx.places[first : first + count]


def loads(ids: Tensor, experts: int) -> Tensor:
    """int64 [batch, E]: how many of the choices [rows, batch, k] in each sequence are each expert."""
    batch = ids.shape[1]
    keys = ids + experts * torch.arange(batch, device=ids.device).view(1, batch, 1)
    counts = torch.zeros(batch * experts, dtype=torch.int64, device=ids.device)
    return counts.index_add_(0, keys.flatten(), torch.ones_like(ids).flatten()).view(batch, experts)


def within_capacity(ids: Tensor, experts: int, capacity: int) -> Tensor:
    """Which choices [L, batch, k] are among the first ``capacity`` of their expert in their sequence.

    They stand in line by token, then choice: a token is dropped because of earlier tokens, never of later ones.
    """
    length, batch, k = ids.shape
    line = ids.transpose(0, 1).reshape(batch, length * k).contiguous()
    grouped, order = torch.sort(line, dim=1, stable=True)
    start = torch.searchsorted(grouped, torch.arange(experts, device=ids.device).expand(batch, experts).contiguous())
    place = torch.arange(length * k, device=ids.device) - start.gather(1, grouped)
    kept = torch.empty_like(line, dtype=torch.bool).scatter_(1, order, place < capacity)
    return kept.view(batch, length, k).transpose(0, 1)


class MoE(nn.Module):
    """Router, routed experts, and an MLP for all tokens when there are shared experts."""

    def __init__(
        self, router: Router, experts: Experts, shared: FeedForward | None, tensor: Axis, sequence: bool
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.tensor, self.sequence = tensor, sequence

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply to [rows, batch, hidden]; as an MLP's result, without a bias."""
        own = x if self.sequence else divide(x, self.tensor)
        choices = self.router(ctx, own)
        ids, weights, kept = (None if part is None else part.flatten(0, 1) for part in choices)
        y = self.experts(own.flatten(0, 1), ids, weights, kept).view_as(own)
        y = y if self.sequence else unite(y, self.tensor)
        return (y if self.shared is None else y + self.shared(ctx, x)[0]), None
