"""Self-attention over the tensor axis: fused q, k, v projection, positions, scaled dot product, output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapre.config.schema import ModelConfig
from megapre.kernels.attention import AttentionDropout
from megapre.kernels.mask import Mask
from megapre.models.context import WEIGHTS, Context, site
from megapre.models.positions import Bias, Turn
from megapre.models.spec import kv_copies
from megapre.models.transformer_xl import TransformerXL
from megapre.parallel.comm import Axis
from megapre.parallel.context import Core
from megapre.parallel.tensor import Linear


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762) with grouped keys and values (GQA, arXiv 2305.13245).

    Input and output [seq or seq/t, batch, hidden]. Each tensor rank works on its own query heads and on the
    key/value heads that they read; ``turns`` are done to q and k in this order, ``bias`` is added to the
    scores, or they are those of ``relative``; ``core`` is attention over the context axis, of ``parts`` ranks.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        qkv: Linear,
        output: Linear,
        axis: Axis,
        turns: Sequence[Turn],
        bias: Bias | None,
        core: Core,
        parts: int = 1,
        recompute: bool = False,
        relative: TransformerXL | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.output, self.core, self.layer = qkv, output, core, layer
        self.turns, self.bias, self.parts, self.relative = tuple(turns), bias, parts, relative
        self.learned = nn.ModuleList(part for part in (*turns, bias) if isinstance(part, nn.Module))
        self.causal, self.dropout = model.architecture == "decoder", model.attention_dropout
        self.window, self.scale = model.window, model.attention_scale or None
        self.head_dim, self.recompute = model.head_dim, recompute
        self.heads = model.heads // axis.size
        self.kv_heads = model.n_kv_heads * kv_copies(model, axis.size) // axis.size
        self.first_head = axis.rank * self.heads

    def forward(self, ctx: Context, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend; the bias of the result is left to the residual sum."""
        fused = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        for turn in self.turns:
            q, k = turn(ctx, q, k)
        offset = 0
        if ctx.cache is not None:
            offset = ctx.cache.length
            k, v = ctx.cache.append(self.layer, k, v)
        documents = None if ctx.segments is None else (ctx.segments, ctx.segments)
        mask = Mask(causal=self.causal, window=self.window, prefix=ctx.prefix, documents=documents, q_offset=offset)
        distances = None if self.relative is None else self.relative.keys(mask, q.shape[0], k.shape[0])
        return self.read(ctx, q, k, v, distances, mask, self._dropout(ctx))

    def read(
        self, ctx: Context, q: Tensor, k: Tensor, v: Tensor, distances: Tensor | None, mask: Mask,
        dropout: AttentionDropout | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What q reads of k and v; ``distances`` are the keys that ``relative`` makes."""
        core, inputs = partial(self.core, mask=mask, dropout=dropout, scale=self.scale), (q, k, v)
        if self.relative is not None:
            inputs = self.relative(ctx, q, k, v, distances)
        elif self.bias is not None:
            core = partial(core, bias=self.bias(mask, q.shape[0] * self.parts, k.shape[0] * self.parts))
        if self.recompute and ctx.training:  # dropout is counter-based: there is no generator state to restore
            y = checkpoint(core, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y = core(*inputs)
        return self.output.product(y.flatten(2))

    def _dropout(self, ctx: Context) -> AttentionDropout | None:
        if not (ctx.training and self.dropout):
            return None
        sites = [site(self.layer, WEIGHTS, self.first_head + head) for head in range(self.heads)]
        return AttentionDropout(ctx.seed, ctx.step, sites, ctx.samples, self.dropout)
