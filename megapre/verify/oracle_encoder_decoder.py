"""The oracle's encoder-decoder (arXiv 1706.03762), unsharded: the encoder in full, then the decoder in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Microbatch
from megapre.models.context import ATTENTION, CROSS, EMBEDDING, MLP, WEIGHTS, site
from megapre.random.philox import keep_mask
from megapre.verify.oracle_block import Dropper, Weights, attention, block, mlp, norm
from megapre.verify.oracle_positions import sinusoid


def features(config: Config, w: Weights, m: Microbatch, step: int | None) -> Tensor:
    """What the output layer reads, [seq, batch, hidden]; without ``step`` nothing is dropped."""
    memory = encode(config, w, m, step)
    model, drop = replace(config.model, architecture="decoder"), Dropper(config, m, step)
    y = drop(_embed(model, w, "embedding", m.tokens, m.positions), model.dropout, site(0, EMBEDDING))
    for index in range(model.layers):
        name, layer = f"blocks.{index}", model.encoder_layers + 1 + index
        cross = partial(_cross, config, w, f"{name}.cross", layer, memory, m, step)
        parts: list[tuple[str, int, Callable[[Tensor], Tensor]]] = [
            ("attention", site(layer, ATTENTION), partial(_attend, model, w, name, layer, m, drop)),
            ("cross", site(CROSS + layer, ATTENTION), cross),
            ("mlp", site(layer, MLP), partial(mlp, model, w, f"{name}.mlp")),
        ]
        for part, place, work in parts:
            if model.norm_placement == "post":
                y = norm(model, w, f"{name}.{part}_norm", y + drop(work(y), model.dropout, place))
            else:
                y = y + drop(work(norm(model, w, f"{name}.{part}_norm", y)), model.dropout, place)
    return y if model.norm_placement == "post" else norm(model, w, "head.norm", y)


def encode(config: Config, w: Weights, m: Microbatch, step: int | None) -> Tensor:
    """The encoder's output, [source, batch, hidden]."""
    assert m.source is not None
    model = replace(config.model, architecture="encoder")
    positions = torch.arange(len(m.source)).unsqueeze(1).expand_as(m.source)
    own = replace(m, tokens=m.source, positions=positions, segments=m.source_segments)
    drop = Dropper(config, own, step)
    x = drop(_embed(model, w, "encoder.embedding", m.source, positions), model.dropout, site(0, EMBEDDING, 1))
    if model.positions == "t5":
        w = {**w, "embedding.relative.weight": w["encoder.relative.weight"]}
    for index in range(model.encoder_layers):
        x = block(model, w, f"encoder.blocks.{index}", index + 1, x, own, drop, mlp)
    return x if model.norm_placement == "post" else norm(model, w, "encoder.norm", x)


def _embed(model: ModelConfig, w: Weights, home: str, ids: Tensor, positions: Tensor) -> Tensor:
    x = w["embedding.tokens.weight"][ids] * model.embedding_scale
    if model.positions == "learned":
        x = x + w[f"{home}.positions.weight"][positions]
    if model.positions == "sinusoidal":
        x = x + sinusoid(positions, x.shape[-1])
    return norm(model, w, f"{home}.norm", x) if model.embedding_norm else x


def _attend(
    model: ModelConfig, w: Weights, name: str, layer: int, m: Microbatch, drop: Dropper, y: Tensor
) -> Tensor:
    return attention(model, w, f"{name}.attention", layer, y, m, drop)


def _cross(
    config: Config, w: Weights, name: str, layer: int, memory: Tensor, m: Microbatch, step: int | None, y: Tensor
) -> Tensor:
    """Every target position reads the encoder's output, or the part of it with its own document's number."""
    model: ModelConfig = config.model
    group = model.heads // model.n_kv_heads
    mixed = []
    for head in range(model.heads):
        q, k, v = (
            _head(w, f"{name}.{part}", x, number, model.head_dim)
            for part, x, number in (("q", y, head), ("k", memory, head // group), ("v", memory, head // group))
        )
        scores = torch.einsum("sbd,tbd->bst", q, k) * (model.attention_scale or model.head_dim**-0.5)
        if m.source_segments is not None:
            own = torch.zeros_like(m.tokens) if m.segments is None else m.segments
            seen = own.T[:, :, None] == m.source_segments.T[:, None, :]
            scores = scores.masked_fill(~seen, float("-inf"))
        weights = torch.nan_to_num(scores.softmax(-1))  # who may read nothing reads zeros
        if model.attention_dropout and step is not None:
            place = [site(CROSS + layer, WEIGHTS, head)]
            rows, p = torch.arange(len(y)), model.attention_dropout
            keep = keep_mask(config.train.seed, step, place, rows, m.samples, 0, len(memory), p)[0]
            weights = weights * keep.permute(1, 0, 2) / (1 - p)
        mixed.append(torch.einsum("bst,tbd->sbd", weights, v))
    return F.linear(torch.cat(mixed, -1), w[f"{name}.output.weight"], w.get(f"{name}.output.bias"))


def _head(w: Weights, name: str, x: Tensor, head: int, width: int) -> Tensor:
    rows, bias = slice(head * width, (head + 1) * width), w.get(f"{name}.bias")
    return F.linear(x, w[f"{name}.weight"][rows], None if bias is None else bias[rows])
