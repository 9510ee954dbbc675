"""XLNet: two streams with Transformer-XL's positions, norms behind the sums, no biases in attention. Torch-free."""

from __future__ import annotations

from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub.link import Link, matrices
from megapre.hub.settings import Settings

ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu"}
IGNORED = ()
COPIES = {"lm_loss.weight": "transformer.word_embedding.weight"}
"""Tensors that some files hold twice."""
LENGTH = 512
"""Tokens of a sample where a job says nothing else; the model has no bound."""
BARE = "XLNetModel"
MATRICES = (("q", "q"), ("k", "k"), ("v", "v"), ("distance", "r"))
BIASES = (("content", "w"), ("position", "r"), ("segment", "s"))
REST = (
    ("attention_norm", "rel_attn.layer_norm"), ("mlp.up", "ff.layer_1"), ("mlp.down", "ff.layer_2"),
    ("mlp_norm", "ff.layer_norm"),
)  # fmt: skip


def model(s: Settings) -> dict[str, Any]:
    """[model] of a config."""
    hidden, heads = s.number("d_model", 1024), s.number("n_head", 16)
    s.fixed(attn_type="bi", bi_data=False, same_length=False, untie_r=True, use_mems_train=False)
    s.fixed(d_head=hidden // heads)
    for key, default in (("mem_len", 512), ("reuse_len", None)):
        s.unused(key)
        length = s.values.get(key, default)
        if length is not None:
            raise ValueError(f"{s.where} has {key} = {length!r}, a memory that megapre does not have: only null.")
    s.unused("use_mems_eval", "start_n_top", "end_n_top")
    s.unused("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")
    dropout = s.number("dropout", 0.1)
    return {
        "architecture": "two_stream",
        "layers": s.number("n_layer", 24),
        "hidden": hidden,
        "heads": heads,
        "ffn_hidden": s.number("d_inner", 4096),
        "vocab_size": s.number("vocab_size"),
        "sequence": LENGTH,
        "norm": "layernorm",
        "norm_placement": "post",
        "norm_eps": s.number("layer_norm_eps", 1e-12),
        "activation": s.one_of("ff_activation", ACTIVATIONS, "gelu"),
        "positions": "transformer_xl",
        "relative_clamp": max(0, s.number("clamp_len", -1)),
        "token_types": 2,
        "bias": False,
        "mlp_bias": True,
        "output_bias": (s.take("architectures") or [""])[0] != BARE,
        "tied_embeddings": bool(s.one_of("tie_word_embeddings", {True: True}, True)),
        "dropout": dropout,
        "attention_dropout": dropout,
        "init": "normal",
        "init_std": s.number("initializer_range", 0.02),
    }


def config(m: ModelConfig, kind: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    found: dict[str, Any] = {
        "d_model": m.hidden,
        "n_layer": m.layers,
        "n_head": m.heads,
        "d_head": m.head_dim,
        "d_inner": m.n_ffn,
        "ff_activation": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[m.activation],
        "layer_norm_eps": m.norm_eps,
        "clamp_len": m.relative_clamp or -1,
        "mem_len": None,
        "reuse_len": None,
        "dropout": m.dropout,
        "initializer_range": m.init_std,
    }
    return found if m.output_bias else found | {"architectures": [BARE]}


def links(m: ModelConfig, kind: str) -> list[Link]:
    """Where every tensor lies."""
    found = [
        Link("embedding.tokens.weight", "transformer.word_embedding.weight"),
        Link("embedding.query.weight", "transformer.mask_emb", (0, 0, 0)),
    ]
    for layer in range(m.layers):
        one, other = f"blocks.{layer}", f"transformer.layer.{layer}"
        ours, theirs = f"{one}.attention", f"{other}.rel_attn"
        found += [Link(f"{ours}.{a}.weight", f"{theirs}.{b}", transposed=True, heads=m.heads) for a, b in MATRICES]
        found.append(Link(f"{ours}.output.weight", f"{theirs}.o", heads=m.heads))
        found += [Link(f"{ours}.{a}_bias", f"{theirs}.r_{b}_bias") for a, b in BIASES]
        for number, which in enumerate(("same", "other")):
            found.append(Link(f"{ours}.segment_{which}", f"{theirs}.seg_embed", (number, 0, 0)))
        for a, b in REST:
            found += matrices(f"{one}.{a}", f"{other}.{b}", bias=True)
    return found + ([Link("head.output.bias", "lm_loss.bias")] if m.output_bias else [])
