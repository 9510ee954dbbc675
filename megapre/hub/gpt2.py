"""GPT-2, whose linear layers are stored as [in, out], q, k and v side by side. Torch-free."""

from __future__ import annotations

from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub.link import Link, matrices
from megapre.hub.settings import Settings

ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu"}
IGNORED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)
"""Causal masks that older releases have saved."""
COPIES = {"lm_head.weight": "transformer.wte.weight"}
"""Tensors that some files hold twice where embeddings are tied."""


def model(s: Settings) -> dict[str, Any]:
    """[model] of a config."""
    s.fixed(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    s.unused(
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"
    )
    s.unused("reorder_and_upcast_attn")  # the order of rounding alone
    dropout = s.number("resid_pdrop", 0.1)
    if s.number("embd_pdrop", 0.1) != dropout:
        raise ValueError(f"{s.where} has embd_pdrop and resid_pdrop that differ; megapre has one model.dropout.")
    return {
        "architecture": "decoder",
        "layers": s.number("n_layer"),
        "hidden": s.number("n_embd"),
        "heads": s.number("n_head"),
        "ffn_hidden": int(s.take("n_inner", 0)),
        "vocab_size": s.number("vocab_size"),
        "sequence": s.number("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": s.number("layer_norm_epsilon", 1e-5),
        "activation": s.one_of("activation_function", ACTIVATIONS, "gelu_new"),
        "positions": "learned",
        "tied_embeddings": bool(s.take("tie_word_embeddings", True)),
        "dropout": dropout,
        "attention_dropout": s.number("attn_pdrop", 0.1),
        "init_std": s.number("initializer_range", 0.02),
    }


def config(m: ModelConfig, kind: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    return {
        "n_embd": m.hidden,
        "n_layer": m.layers,
        "n_head": m.heads,
        "n_inner": m.n_ffn,
        "n_positions": m.sequence,
        "layer_norm_epsilon": m.norm_eps,
        "activation_function": {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu"}[m.activation],
        "tie_word_embeddings": m.tied_embeddings,
        "resid_pdrop": m.dropout,
        "embd_pdrop": m.dropout,
        "attn_pdrop": m.attention_dropout,
        "initializer_range": m.init_std,
    }


def links(m: ModelConfig, kind: str) -> list[Link]:
    """Where every tensor lies."""
    found = [
        Link("embedding.tokens.weight", "transformer.wte.weight"),
        Link("embedding.positions.weight", "transformer.wpe.weight"),
        *matrices("head.norm", "transformer.ln_f", bias=True),
    ]
    if not m.tied_embeddings:
        found += matrices("head.output", "lm_head")
    for layer in range(m.layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        found += matrices(f"{ours}.attention_norm", f"{theirs}.ln_1", bias=True)
        found += matrices(f"{ours}.mlp_norm", f"{theirs}.ln_2", bias=True)
        for index, part in enumerate("qkv"):
            first, name = index * m.hidden, f"{ours}.attention.{part}"
            found.append(Link(f"{name}.weight", f"{theirs}.attn.c_attn.weight", (0, first), transposed=True))
            found.append(Link(f"{name}.bias", f"{theirs}.attn.c_attn.bias", (first,)))
        for part, name in (("attention.output", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            found += matrices(f"{ours}.{part}", f"{theirs}.{name}", bias=True, transposed=True)
    return found
