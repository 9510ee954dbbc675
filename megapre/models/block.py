"""The layers of a transformer: embedding, block, head. Each maps (context, carry...) to a carry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megapre.config.schema import ModelConfig
from megapre.kernels.registry import Kernels
from megapre.models.attention import Attention
from megapre.models.context import ATTENTION, EMBEDDING, MLP, Context, site
from megapre.parallel.tensor import Embedding, Linear, sink


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


class FeedForward(nn.Module):
    """Two linear layers around an activation; ``up`` holds gate and up side by side for SwiGLU."""

    def __init__(self, activation: str, up: Linear, down: Linear, kernels: Kernels) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.activation = getattr(kernels, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to [seq or seq/t, batch, hidden]."""
        return self.down(self.activation(self.up(x)))


class Dropout(nn.Module):
    """Counter-based dropout: the same mask for a sample's feature under any layout."""

    def __init__(self, probability: float, place: int, kernels: Kernels) -> None:
        super().__init__()
        self.probability, self.place, self.kernels = probability, place, kernels

    def forward(self, ctx: Context, x: Tensor) -> Tensor:
        """Drop features of [rows, batch, hidden] in training."""
        if not (ctx.training and self.probability):
            return x
        return self.kernels.dropout(
            x, seed=ctx.seed, step=ctx.step, site=self.place, positions=ctx.places[ctx.shard], samples=ctx.samples,
            probability=self.probability,
        )  # fmt: skip


class EmbeddingLayer(nn.Module):
    """Layer 0: token embedding plus learned positions."""

    def __init__(
        self, model: ModelConfig, tokens: Embedding, positions: nn.Parameter | None, kernels: Kernels
    ) -> None:
        super().__init__()
        self.tokens, self.positions = tokens, positions
        self.dropout = Dropout(model.dropout, site(0, EMBEDDING), kernels)

    def forward(self, ctx: Context) -> tuple[Tensor, ...]:
        """Token ids of the context to [rows, batch, hidden]."""
        x = self.tokens(ctx.tokens)
        if self.positions is not None:
            x = x + nn.functional.embedding(ctx.positions[ctx.shard], sink(self.positions))
        return (self.dropout(ctx, x),)


class Block(nn.Module):
    """Layers 1..L: attention and MLP, each reading a norm and adding to the residual (pre-norm)."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        norms: list[Norm],
        attention: Attention,
        mlp: FeedForward,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.layer, self.norms, self.attention, self.mlp = layer, nn.ModuleList(norms), attention, mlp
        self.attention_dropout = Dropout(model.dropout, site(layer, ATTENTION), kernels)
        self.mlp_dropout = Dropout(model.dropout, site(layer, MLP), kernels)

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, ...]:
        """[rows, batch, hidden] to the same."""
        h = self.norms[0](x)
        attended = self.attention_dropout(ctx, self.attention(ctx, h))
        if len(self.norms) == 1:  # parallel block
            x = x + attended + self.mlp_dropout(ctx, self.mlp(h))
        else:
            x = x + attended
            x = x + self.mlp_dropout(ctx, self.mlp(self.norms[1](x)))
        if ctx.rms is not None:
            ctx.rms[self.layer] = x.detach().float().square().mean()
        return (x,)


class Head(nn.Module):
    """Layer L+1: final norm and output layer; the loss when the context has one, else logits."""

    def __init__(self, norm: Norm, output: Linear) -> None:
        super().__init__()
        self.norm, self.output = norm, output

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, ...]:
        """[rows, batch, hidden] to a scalar, or to logits [seq, batch, local vocabulary]."""
        logits = self.output(self.norm(x))
        return (logits,) if ctx.loss is None else (ctx.loss(logits, ctx),)


def mean_square(layers: int, rms: dict[int, Tensor], device: torch.device) -> Tensor:
    """The mean squares of a rank's blocks in a vector of all blocks, 0 elsewhere."""
    values = torch.zeros(layers, device=device)
    for layer, value in rms.items():
        values[layer - 1] = value
    return values
