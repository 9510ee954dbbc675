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
from megapre.verify.oracle_positions import rotate

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
    h = norm(model, w, f"{name}.attention_norm", x)
    attended = drop(_attention(model, w, f"{name}.attention", layer, h, m, drop), model.dropout, site(layer, ATTENTION))
    if model.parallel_block:
        return x + attended + drop(work(model, w, f"{name}.mlp", h), model.dropout, site(layer, MLP))
    x = x + attended
    h = norm(model, w, f"{name}.mlp_norm", x)
    return x + drop(work(model, w, f"{name}.mlp", h), model.dropout, site(layer, MLP))


def norm(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm of the last dimension."""
    if model.norm == "rmsnorm":
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + model.norm_eps) * w[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], model.norm_eps)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def mlp(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    """Two or three matrices around an activation."""
    return _linear(w, f"{name}.down", activated(model, w, name, x))


def activated(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    """The middle of an MLP."""
    up = _linear(w, f"{name}.up", x)
    if model.activation == "swiglu":
        return F.silu(_linear(w, f"{name}.gate", x)) * up
    if model.activation == "geglu":
        return F.gelu(_linear(w, f"{name}.gate", x), approximate="tanh") * up
    return pointwise(model.activation, up)


def pointwise(name: str, x: Tensor) -> Tensor:
    """An activation without a gate."""
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if name == "gelu_exact" else "tanh")


def _attention(
    model: ModelConfig, w: Weights, name: str, layer: int, x: Tensor, m: Microbatch, drop: Dropper
) -> Tensor:
    length, batch, _ = x.shape
    q, k, v = (
        _linear(w, f"{name}.{part}", x).view(length, batch, heads, model.head_dim).permute(1, 2, 0, 3)
        for part, heads in (("q", model.heads), ("k", model.n_kv_heads), ("v", model.n_kv_heads))
    )  # [batch, heads, seq, head_dim]
    if model.qk_norm:
        q, k = norm(model, w, f"{name}.q_norm", q), norm(model, w, f"{name}.k_norm", k)
    if model.positions == "rope":
        q, k = (rotate(model, part, m.positions) for part in (q, k))
    repeat = model.heads // model.n_kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * (model.attention_scale or model.head_dim**-0.5)
    visible = torch.ones(batch, length, length, dtype=torch.bool)
    if model.architecture == "decoder":
        visible = visible.tril()
    if m.prefix is not None:
        visible = visible | (torch.arange(length) < m.prefix[:, None])[:, None, :]
    if model.window:
        place = torch.arange(length)
        visible = visible & ((place[:, None] - place[None, :]).abs() < model.window)
    if m.segments is not None:
        documents = m.segments.T
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    probabilities = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    probabilities = drop.attention(probabilities, model.attention_dropout, layer)
    mixed = (probabilities @ v).permute(2, 0, 1, 3).reshape(length, batch, -1)
    return _linear(w, f"{name}.output", mixed)
