"""The blocks of a transformer. Like every layer they map (context, carry...) to a carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megapre.config.schema import ModelConfig
from megapre.kernels.registry import Kernels
from megapre.models.attention import Attention
from megapre.models.context import ATTENTION, MLP, Context, site
from megapre.parallel.tensor import Linear, sink


class Norm(nn.Module):
    """LayerNorm when there is a bias, RMSNorm otherwise, over the last dimension."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.kernels = weight, bias, eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        if self.bias is None:
            return self.kernels.rms_norm(x, sink(self.weight), self.eps)
        return self.kernels.layer_norm(x, sink(self.weight), sink(self.bias), self.eps)

    def of_sum(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + y, and x + y."""
        if self.bias is None:
            return self.kernels.add_rms_norm(y, x, sink(self.weight), self.eps)
        return self.kernels.add_layer_norm(y, x, sink(self.weight), sink(self.bias), self.eps)


class FeedForward(nn.Module):
    """Two linear layers around an activation; ``up`` holds gate and up side by side for SwiGLU."""

    def __init__(self, activation: str, up: Linear, down: Linear, kernels: Kernels) -> None:
        super().__init__()
        self.up, self.down = up, down
        fused = activation == "gelu" and up.bias is not None
        self.activation, self.bias_gelu = getattr(kernels, activation), kernels.bias_gelu if fused else None

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply to [seq or seq/t, batch, hidden]; the bias of the result is left to the residual sum."""
        h = self.activation(self.up(x)) if self.bias_gelu is None else self.bias_gelu(*self.up.product(x))
        return self.down.product(h)


class Dropout(nn.Module):
    """Counter-based dropout: the same mask for a sample's feature under any layout."""

    def __init__(self, probability: float, place: int, kernels: Kernels) -> None:
        super().__init__()
        self.probability, self.place, self.kernels = probability, place, kernels

    def forward(self, ctx: Context, x: Tensor) -> Tensor:
        """Drop features of [rows, batch, hidden] in training."""
        if not (ctx.training and self.probability):
            return x
        return self.kernels.dropout(x, **self._mask(ctx), probability=self.probability)

    def join(self, ctx: Context, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """x + dropout(y + bias): a sub-layer's result enters the residual stream."""
        if self._plain(ctx, bias):
            return x + y
        dropped = self.probability if ctx.training else 0.0
        return self.kernels.bias_dropout_residual(y, bias, x, **self._mask(ctx), probability=dropped)

    def join_and_norm(
        self, ctx: Context, norm: Norm, x: Tensor, y: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The norm of :meth:`join`'s sum, and the sum."""
        if self._plain(ctx, bias):
            return norm.of_sum(y, x)
        x = self.join(ctx, x, y, bias)
        return norm(x), x

    def _plain(self, ctx: Context, bias: Tensor | None) -> bool:
        return bias is None and not (ctx.training and self.probability)

    def _mask(self, ctx: Context) -> dict[str, Any]:
        positions = ctx.places[ctx.shard]
        return {"seed": ctx.seed, "step": ctx.step, "site": self.place, "positions": positions, "samples": ctx.samples}


class Block(nn.Module):
    """Layers 1..L: attention and MLP, each reading a norm and adding to the residual (pre-norm)."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        norms: list[Norm],
        attention: Attention,
        mlp: nn.Module,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.layer, self.norms, self.attention, self.mlp = layer, nn.ModuleList(norms), attention, mlp
        self.attention_dropout = Dropout(model.dropout, site(layer, ATTENTION), kernels)
        self.mlp_dropout = Dropout(model.dropout, site(layer, MLP), kernels)

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, ...]:
        """[rows, batch, hidden] to the same."""
        x = self.body(ctx, x, *self.norms)
        self.record(ctx, x)
        return (x,)

    def record(self, ctx: Context, x: Tensor) -> None:
        """Note the size of the block's output when asked for."""
        if ctx.rms is not None:
            ctx.rms[self.layer] = x.detach().float().square().mean()

    def body(self, ctx: Context, x: Tensor, first: Norm, second: Norm) -> Tensor:
        """The layer's work."""
        attended = self.attention(ctx, first(x))
        h, x = self.attention_dropout.join_and_norm(ctx, second, x, *attended)
        return self.mlp_dropout.join(ctx, x, *self.mlp(ctx, h))


class ParallelBlock(Block):
    """Attention and MLP read the same norm (PaLM, arXiv 2204.02311)."""

    def body(self, ctx: Context, x: Tensor, norm: Norm) -> Tensor:  # type: ignore[override]
        """The layer's work."""
        h = norm(x)
        x = self.attention_dropout.join(ctx, x, *self.attention(ctx, h))
        return self.mlp_dropout.join(ctx, x, *self.mlp(ctx, h))


class PostNormBlock(Block):
    """The sum of a sub-layer and the residual stream is normed (arXiv 1706.03762, BERT)."""

    def body(self, ctx: Context, x: Tensor, first: Norm, second: Norm) -> Tensor:
        """The layer's work."""
        x = self.attention_dropout.join_and_norm(ctx, first, x, *self.attention(ctx, x))[0]
        return self.mlp_dropout.join_and_norm(ctx, second, x, *self.mlp(ctx, x))[0]


def mean_square(blocks: list[int], rms: dict[int, Tensor], device: torch.device) -> Tensor:
    """The mean squares of a rank's blocks in a vector of all, 0 elsewhere; ``blocks`` are their layers' numbers."""
    values = torch.zeros(len(blocks), device=device)
    for layer, value in rms.items():
        values[blocks.index(layer)] = value
    return values
