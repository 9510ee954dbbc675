"""Tensor parallelism: linear layers, embedding and cross-entropy over shards (Megatron-LM, arXiv 1909.08053).

With sequence parallelism (arXiv 2205.05198) an activation between layers is a shard of the sequence, so the
all-reduce after a row-parallel layer becomes a reduce-scatter, and the column-parallel layer gathers its input.
Activations are [seq, batch, features]; the sequence is dimension 0 so that both act on contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapre.kernels.linear_cross_entropy import Sums, alone
from megapre.kernels.registry import Kernels
from megapre.parallel.comm import Axis


def gather(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate the shards of dimension 0."""
    output = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    axis.all_gather(output, x.contiguous()).wait()
    return output


def scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis and keep this rank's shard of dimension 0."""
    output = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    axis.reduce_scatter(output, x.contiguous()).wait()
    return output


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add ``gradient`` to the parameter's main gradient, now or in a W action."""
    main = parameter.main_grad  # type: ignore[attr-defined]
    parameter.queue.add(lambda: main.add_(gradient))  # type: ignore[attr-defined]


def accumulate_product(parameter: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x, summed over all leading dimensions, to the parameter's main gradient, now or in a W action."""
    main, queue = parameter.main_grad, parameter.queue  # type: ignore[attr-defined]
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    queue.add(lambda: queue.multiply(main, dy, x))


class _ColumnLinear(torch.autograd.Function):
    """y = x W^T + b with the rows of W sharded; x is replicated, or a sequence shard that is gathered first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sequence: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.axis, ctx.sequence = weight, bias, axis, sequence
        return F.linear(gather(x, axis) if sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        axis = ctx.axis
        dy = dy.contiguous()
        whole = x
        if ctx.sequence:
            whole = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
            gathering = axis.all_gather(whole, x.contiguous())
        dx = dy @ ctx.weight
        if ctx.sequence:
            gathering.wait()
            out = torch.empty_like(x)
            summing = axis.reduce_scatter(out, dx)
        else:
            out = dx
            summing = axis.all_reduce(dx)
        accumulate_product(ctx.weight, dy, whole)  # beside the sum of dx
        if ctx.bias is not None:
            accumulate(ctx.bias, dy.flatten(0, -2).sum(0))
        summing.wait()
        return out, None, None, None, None


class _RowLinear(torch.autograd.Function):
    """y = sum over ranks of x W^T, with the columns of W and the features of x sharded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.axis, ctx.sequence = weight, axis, sequence
        y = F.linear(x, weight)
        if sequence:
            return scatter_sum(y, axis)
        axis.all_reduce(y).wait()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.sequence:
            dy = gather(dy, ctx.axis)
        dx = dy @ ctx.weight
        accumulate_product(ctx.weight, dy, x)
        return dx, None, None, None


class Linear(nn.Module):
    """Linear layer over the tensor axis.

    ``kind`` is ``column`` (output features sharded; input [seq or seq/t, batch, in], output
    [seq, batch, out/t]) or ``row`` (input features sharded; output [seq or seq/t, batch, out]).
    """

    def __init__(self, kind: str, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis, sequence: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.axis = weight, bias, axis
        self.sequence = sequence and axis.size > 1
        self.column = {"column": True, "row": False}[kind]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if self.column:
            return _ColumnLinear.apply(x, self.weight, self.bias, self.axis, self.sequence)
        y, bias = self.product(x)
        return y if bias is None else y + bias

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer without its bias, and the bias for an op that adds it in passing."""
        if self.column:
            y = _ColumnLinear.apply(x, self.weight, None, self.axis, self.sequence)
        else:
            y = _RowLinear.apply(x, self.weight, self.axis, self.sequence)
        return y, None if self.bias is None else sink(self.bias)


class _Sink(torch.autograd.Function):
    """The parameter itself; its gradient goes to ``main_grad``."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:  # type: ignore[override]
        accumulate(ctx.parameter, gradient)


def sink(parameter: Tensor) -> Tensor:
    """``parameter`` for use in any operation; autograd then adds its gradient to ``main_grad``."""
    return _Sink.apply(parameter)


class _Embedding(torch.autograd.Function):
    """Rows of a table whose rows are sharded: each rank looks up its own, the axis sums."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, axis: Axis, sequence: bool) -> Tensor:
        local = ids - axis.rank * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        local = torch.where(mine, local, 0)
        ctx.save_for_backward(local, mine)
        ctx.weight, ctx.axis, ctx.sequence = weight, axis, sequence
        out = F.embedding(local, weight)
        if axis.size == 1:
            return out
        out = out.masked_fill_(~mine.unsqueeze(-1), 0)
        if sequence:
            return scatter_sum(out, axis)
        axis.all_reduce(out).wait()
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        local, mine = ctx.saved_tensors
        if ctx.sequence:
            dy = gather(dy, ctx.axis)
        main = ctx.weight.main_grad

        def add() -> None:
            rows = dy.to(main.dtype).masked_fill(~mine.unsqueeze(-1), 0)
            main.index_add_(0, local.flatten(), rows.flatten(0, 1))

        ctx.weight.queue.add(add)
        return None, None, None, None


class Embedding(nn.Module):
    """Vocabulary-parallel embedding: ids int64 [seq, batch] -> [seq or seq/t, batch, hidden]."""

    def __init__(self, weight: nn.Parameter, axis: Axis, sequence: bool) -> None:
        super().__init__()
        self.weight, self.axis = weight, axis
        self.sequence = sequence and axis.size > 1

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids up; an id outside the table gives zeros on every rank (the loader refuses such ids)."""
        return _Embedding.apply(self.weight, ids, self.axis, self.sequence)


class _OverRows(torch.autograd.Function):
    """A sum over ranks, of which each makes the gradient of its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: Axis) -> Tensor:
        whole = part.clone()
        axis.all_reduce(whole).wait()
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient, None


def over_rows(sums: Tensor, axis: Axis) -> Tensor:
    """Sums over what ranks of ``axis`` have computed of different rows; equal on all of them."""
    return sums if axis.size == 1 else _OverRows.apply(sums, axis)


class _HeadLoss(torch.autograd.Function):
    """Sum of scale x loss over the rows; its gradients are made with it, while the logits of a chunk exist."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, scale: Tensor, output: Linear, terms: LossTerms, kernels: Kernels,
        training: bool,
    ) -> Tensor:  # fmt: skip
        weight, axis = output.weight, output.axis
        rows = (gather(x, axis) if output.sequence else x).flatten(0, -2)
        width = weight.shape[0]
        valid = max(0, min(width, terms.vocab_size - axis.rank * width))
        table, main = weight.data, weight.main_grad if training else None  # type: ignore[attr-defined]
        if output.bias is not None:
            rows, table, main = _with_column(rows, table, output.bias, training)
        losses, dx = kernels.linear_cross_entropy(
            rows, table, targets.flatten() - axis.rank * width, scale, valid, main_grad=main,
            exchange=alone if axis.size == 1 else partial(_exchange, axis, terms.smoothing > 0),
            smoothing=terms.smoothing, vocab=terms.vocab_size, z_loss=terms.z_loss,
        )  # fmt: skip
        if output.bias is not None and main is not None:
            dx = dx[:, : x.shape[-1]].contiguous()
            weight.main_grad.add_(main[:, : x.shape[-1]])  # type: ignore[attr-defined]
            output.bias.main_grad.add_(main[:, x.shape[-1]])  # type: ignore[attr-defined]
        ctx.save_for_backward(dx)
        ctx.axis, ctx.sequence, ctx.shape = axis, output.sequence, x.shape
        return (losses * scale).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dx,) = ctx.saved_tensors  # a part of the sum over the vocabulary's ranks
        if ctx.sequence:
            dx = scatter_sum(dx.view(-1, *ctx.shape[1:]), ctx.axis)
        else:
            ctx.axis.all_reduce(dx).wait()
        return dx.view(ctx.shape), None, None, None, None, None, None


def _with_column(rows: Tensor, weight: Tensor, bias: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, W and a main gradient in which the bias is one more column of W, whose feature is 1: x W^T + b = x' W'^T.

    Zeros fill the width up to whole words of the products.
    """
    width, wider = weight.shape[1], -(-(weight.shape[1] + 1) // 8) * 8
    x, table = rows.new_zeros(rows.shape[0], wider), weight.new_zeros(weight.shape[0], wider)
    x[:, :width], x[:, width] = rows, 1
    table[:, :width], table[:, width] = weight, bias.data
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return x, table, torch.zeros_like(table, dtype=wide) if training else None


def _exchange(axis: Axis, level_wanted: bool, largest: Tensor, total: Tensor, target: Tensor, level: Tensor) -> Sums:
    """Row statistics of this rank's part of the vocabulary -> (lse, target's logit, sum of logits) over all."""
    overall = largest.clone()
    axis.all_reduce(overall, "max").wait()
    sums = [total * torch.exp(largest - overall), target, *([level] if level_wanted else [])]
    both = torch.stack(sums)
    axis.all_reduce(both).wait()
    return overall + torch.log(both[0]), both[1], both[-1]


@dataclass(frozen=True)
class LossTerms:
    """What the cross-entropy of a job is made of, beside logits and targets."""

    vocab_size: int
    """Real token ids: columns beyond them are padding."""
    smoothing: float = 0.0
    """Label smoothing (arXiv 1512.00567)."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 (arXiv 2204.02311)."""


def head_loss(
    output: Linear, x: Tensor, targets: Tensor, scale: Tensor, terms: LossTerms, kernels: Kernels
) -> Tensor:
    """Sum over tokens of scale x cross-entropy of the logits x W^T, equal on every tensor rank; fp32 (fp64 for fp64).

    ``x`` [seq or seq/t, batch, hidden], ``targets`` int64 and ``scale`` fp32 (fp64 for fp64) [seq, batch]. The logits
    never exist in whole. Where gradients are on, that of the weight is added to its main gradient here and now, and
    the result's own gradient is taken to be 1: ``scale`` must hold every factor of the loss.
    """
    training = torch.is_grad_enabled() and x.requires_grad
    return _HeadLoss.apply(x, targets, scale.flatten(), output, terms, kernels, training)
