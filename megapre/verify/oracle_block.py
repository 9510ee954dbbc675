"""The oracle's block: attention and MLP, unsharded, in plain PyTorch, as the papers write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Microbatch
from megapre.models.context import ATTENTION, MLP, WEIGHTS, site
from megapre.random.philox import keep_mask
from megapre.verify.oracle_positions import distance_scores, relative_bias, rotate, slopes

Weights = dict[str, Tensor]


class Dropper:
    """Applies the counter-based masks of ``step`` to unsharded tensors; none when there is no step."""

    def __init__(self, config: Config, m: Microbatch, step: int | None) -> None:
        self.seed, self.step, self.samples = config.train.seed, step, m.samples
        self.rows = torch.arange(m.tokens.shape[0])

    def __call__(self, x: Tensor, probability: float, place: int) -> Tensor:
        """Drop features of [seq, batch, hidden]."""
        if not probability or self.step is None:
            return x
        keep = keep_mask(self.seed, self.step, [place], self.rows, self.samples, 0, x.shape[-1], probability)[0]
        return x * keep / (1 - probability)

    def attention(self, x: Tensor, probability: float, layer: int) -> Tensor:
        """Drop weights of [batch, heads, query, key]."""
        if not probability or self.step is None:
            return x
        sites = [site(layer, WEIGHTS, head) for head in range(x.shape[1])]
        keep = keep_mask(self.seed, self.step, sites, self.rows, self.samples, 0, x.shape[-1], probability)
        return x * keep.permute(2, 0, 1, 3) / (1 - probability)


def block(
    model: ModelConfig,
    w: Weights,
    name: str,
    layer: int,
    x: Tensor,
    m: Microbatch,
    drop: Dropper,
    work: Callable[[ModelConfig, Weights, str, Tensor], Tensor],
) -> Tensor:
    """One layer of [seq, batch, hidden]; ``work`` is its MLP or mixture of experts."""

    def attend(x: Tensor) -> Tensor:
        attended = attention(model, w, f"{name}.attention", layer, x, m, drop)
        return drop(attended, model.dropout, site(layer, ATTENTION))

    def think(x: Tensor) -> Tensor:
        return drop(work(model, w, f"{name}.mlp", x), model.dropout, site(layer, MLP))

    def normed(which: str, x: Tensor) -> Tensor:
        return norm(model, w, f"{name}.{which}_norm", x)

    if model.parallel_block:
        h = normed("attention", x)
        return x + attend(h) + think(h)
    if model.norm_placement == "post":
        x = normed("attention", x + attend(x))
        return normed("mlp", x + think(x))
    x = x + attend(normed("attention", x))
    return x + think(normed("mlp", x))


def norm(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm of the last dimension."""
    if model.norm == "rmsnorm":
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + model.norm_eps) * w[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], model.norm_eps)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A layer by its name."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def mlp(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    """Two or three matrices around an activation."""
    return linear(w, f"{name}.down", activated(model, w, name, x))


def activated(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    """The middle of an MLP."""
    up = linear(w, f"{name}.up", x)
    if model.activation == "swiglu":
        return F.silu(linear(w, f"{name}.gate", x)) * up
    if model.activation == "geglu":
        return F.gelu(linear(w, f"{name}.gate", x), approximate="tanh") * up
    return pointwise(model.activation, up)


def pointwise(name: str, x: Tensor) -> Tensor:
    """An activation without a gate."""
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if name == "gelu_exact" else "tanh")


def attention(
    model: ModelConfig, w: Weights, name: str, layer: int, x: Tensor, m: Microbatch, drop: Dropper
) -> Tensor:
    """Self-attention of x [seq, batch, hidden]."""
    length, batch, _ = x.shape
    place = torch.arange(length)
    q, k, v = (
        linear(w, f"{name}.{part}", x).view(length, batch, heads, model.head_dim).permute(1, 2, 0, 3)
        for part, heads in (("q", model.heads), ("k", model.n_kv_heads), ("v", model.n_kv_heads))
    )  # [batch, heads, seq, head_dim]
    if model.qk_norm:
        q, k = norm(model, w, f"{name}.q_norm", q), norm(model, w, f"{name}.k_norm", k)
    if model.positions == "rope":
        q, k = (rotate(model, part, m.positions) for part in (q, k))
    repeat = model.heads // model.n_kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    met = q @ k.transpose(-1, -2)
    if model.positions == "transformer_xl":
        met = distance_scores(model, w, name, q, k, m.token_types)
    scores = met * (model.attention_scale or model.head_dim**-0.5)
    if model.positions == "alibi":
        scores = scores - slopes(model.heads)[:, None, None] * (place[:, None] - place[None, :]).abs()
    if model.positions == "t5":
        scores = scores + relative_bias(model, w["embedding.relative.weight"], length)
    visible = torch.ones(batch, length, length, dtype=torch.bool)
    if model.architecture == "decoder":
        visible = visible.tril()
    if m.prefix is not None:
        visible = visible | (place < m.prefix[:, None])[:, None, :]
    if model.window:
        visible = visible & ((place[:, None] - place[None, :]).abs() < model.window)
    if m.segments is not None:
        documents = m.segments.T
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    probabilities = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    probabilities = drop.attention(probabilities, model.attention_dropout, layer)
    mixed = (probabilities @ v).permute(2, 0, 1, 3).reshape(length, batch, -1)
    return linear(w, f"{name}.output", mixed)
