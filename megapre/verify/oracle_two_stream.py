"""The oracle's two streams (XLNet, arXiv 1906.08237), head by head, unsharded."""

from __future__ import annotations

import torch
from torch import Tensor

from megapre.config.schema import Config
from megapre.data.loader import Microbatch
from megapre.models.context import ATTENTION, CROSS, EMBEDDING, MLP, WEIGHTS, site
from megapre.random.philox import keep_mask
from megapre.verify.oracle_block import Dropper, Weights, linear, mlp, norm
from megapre.verify.oracle_positions import distance_scores, relative_bias, rotate, sinusoid


def features(config: Config, w: Weights, m: Microbatch, step: int | None) -> Tensor:
    """What the output layer reads, the query stream [seq, batch, hidden]; without ``step`` nothing is dropped."""
    model, drop = config.model, Dropper(config, m, step)
    h = w["embedding.tokens.weight"][m.tokens] * model.embedding_scale
    g = w["embedding.query.weight"].expand_as(h)
    streams = []
    for stream, x in enumerate((h, g)):
        if model.positions == "learned":
            x = x + w["embedding.positions.weight"][m.positions]
        if model.positions == "sinusoidal":
            x = x + sinusoid(m.positions, x.shape[-1])
        if model.embedding_norm:
            x = norm(model, w, "embedding.norm", x)
        streams.append(drop(x, model.dropout, site(0, EMBEDDING, stream)))
    for index in range(model.layers):
        name = "blocks.0" if model.share_layers else f"blocks.{index}"
        streams = _block(config, w, name, index + 1, streams, m, drop)
    g = streams[1]
    return g if model.norm_placement == "post" else norm(model, w, "head.norm", g)


def _block(
    config: Config, w: Weights, name: str, layer: int, streams: list[Tensor], m: Microbatch, drop: Dropper
) -> list[Tensor]:
    model, after = config.model, []
    post = model.norm_placement == "post"
    content = streams[0] if post else norm(model, w, f"{name}.attention_norm", streams[0])
    for query, x in enumerate(streams):
        places = layer + CROSS * query
        asking = x if post else norm(model, w, f"{name}.attention_norm", x)
        read = _read(config, w, f"{name}.attention", places, asking, content, m, drop.step, bool(query))
        x = x + drop(read, model.dropout, site(places, ATTENTION))
        if post:
            x = norm(model, w, f"{name}.attention_norm", x)
        y = x if post else norm(model, w, f"{name}.mlp_norm", x)
        x = x + drop(mlp(model, w, f"{name}.mlp", y), model.dropout, site(places, MLP))
        after.append(norm(model, w, f"{name}.mlp_norm", x) if post else x)
    return after


def _read(
    config: Config, w: Weights, name: str, places: int, x: Tensor, content: Tensor, m: Microbatch, step: int | None,
    query: bool,
) -> Tensor:  # fmt: skip
    """Attention of ``x`` over ``content``: of what stands no later in the order, for the query before it."""
    model = config.model
    length, batch, _ = x.shape
    assert m.ranks is not None
    ranks = m.ranks.T
    seen = ranks[:, None, :] < ranks[:, :, None] if query else ranks[:, None, :] <= ranks[:, :, None]
    if m.segments is not None:
        seen = seen & (m.segments.T[:, None, :] == m.segments.T[:, :, None])
    q, k, v = (
        linear(w, f"{name}.{part}", y).view(length, batch, -1, model.head_dim).permute(1, 2, 0, 3)
        for part, y in (("q", x), ("k", content), ("v", content))
    )
    if model.qk_norm:
        q, k = norm(model, w, f"{name}.q_norm", q), norm(model, w, f"{name}.k_norm", k)
    if model.positions == "rope":
        q, k = rotate(model, q, m.positions), rotate(model, k, m.positions)
    bias = relative_bias(model, w["embedding.relative.weight"], length) if model.positions == "t5" else None
    met = None
    if model.positions == "transformer_xl":
        met = distance_scores(model, w, name, q, k.repeat_interleave(model.heads // model.n_kv_heads, 1), m.token_types)
    mixed = []
    for head in range(model.heads):
        own = head // (model.heads // model.n_kv_heads)
        alike = torch.einsum("bsd,btd->bst", q[:, head], k[:, own]) if met is None else met[:, head]
        scores = alike * (model.attention_scale or model.head_dim**-0.5)
        scores = scores if bias is None else scores + bias[head]
        weights = torch.nan_to_num(scores.masked_fill(~seen, float("-inf")).softmax(-1))  # who reads nothing: zeros
        if model.attention_dropout and step is not None:
            place, rows = [site(places, WEIGHTS, head)], torch.arange(length)
            keep = keep_mask(config.train.seed, step, place, rows, m.samples, 0, length, model.attention_dropout)[0]
            weights = weights * keep.permute(1, 0, 2) / (1 - model.attention_dropout)
        mixed.append(torch.einsum("bst,btd->sbd", weights, v[:, own]))
    return linear(w, f"{name}.output", torch.cat(mixed, -1))
