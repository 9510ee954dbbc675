"""T5 and T5 v1.1 (flan, mT5's shape): encoder-decoders with RMSNorm and a learned bias by distance. Torch-free.

Read as transformers 5 reads them: the output layer is the embedding's when the file has none of its own, and its input
is divided by sqrt(d_model) unless ``tie_word_embeddings`` is false (v1.1).
"""

from __future__ import annotations

from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub.link import Link, matrices
from megapre.hub.settings import Settings

FEED_FORWARDS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
"""A table that old files hold and nothing reads."""
COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}
"""Tensors that some files hold twice."""
LENGTH = 512
"""Tokens of a source and of a target where a job says nothing else; the model has no bound."""


def model(s: Settings) -> dict[str, Any]:
    """[model] of a config."""
    hidden, heads, size = s.number("d_model", 512), s.number("num_heads", 8), s.number("d_kv", 64)
    layers, scaled = s.number("num_layers", 6), s.take("tie_word_embeddings", True) is not False
    if "scale_decoder_outputs" in s.values:  # what transformers 5 makes of it
        scaled = bool(s.take("scale_decoder_outputs"))
    s.fixed(is_decoder=False, is_encoder_decoder=True)
    s.unused("dense_act_fn", "is_gated_act", "n_positions", "initializer_factor", "output_past")
    return {
        "architecture": "encoder_decoder",
        "encoder_layers": layers,
        "layers": s.number("num_decoder_layers", layers),
        "hidden": hidden,
        "heads": heads,
        "head_size": 0 if size * heads == hidden else size,
        "ffn_hidden": s.number("d_ff", 2048),
        "vocab_size": s.number("vocab_size"),
        "sequence": LENGTH,
        "source_sequence": LENGTH,
        "norm": "rmsnorm",
        "norm_eps": s.number("layer_norm_epsilon", 1e-6),
        "activation": s.one_of("feed_forward_proj", FEED_FORWARDS, "relu"),
        "positions": "t5",
        "relative_buckets": s.number("relative_attention_num_buckets", 32),
        "relative_distance": s.number("relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "bias": False,
        "tied_embeddings": True,
        "output_scale": hidden**-0.5 if scaled else 1.0,
        "dropout": s.number("dropout_rate", 0.1),
        "attention_dropout": s.number("dropout_rate", 0.1),
    }


def with_tensors(found: ModelConfig, names: set[str]) -> dict[str, Any]:
    """What only the tensors tell: whether the output layer is one of its own."""
    return {"tied_embeddings": "lm_head.weight" not in names}


def config(m: ModelConfig, kind: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    return {
        "d_model": m.hidden,
        "num_layers": m.encoder_layers,
        "num_decoder_layers": m.layers,
        "num_heads": m.heads,
        "d_kv": m.head_dim,
        "d_ff": m.n_ffn,
        "layer_norm_epsilon": m.norm_eps,
        "feed_forward_proj": {ours: theirs for theirs, ours in FEED_FORWARDS.items()}[m.activation],
        "relative_attention_num_buckets": m.relative_buckets,
        "relative_attention_max_distance": m.relative_distance,
        "dropout_rate": m.dropout,
        "tie_word_embeddings": m.output_scale != 1,
        "is_encoder_decoder": True,
    }


def links(m: ModelConfig, kind: str) -> list[Link]:
    """Where every tensor lies."""
    found = [Link("embedding.tokens.weight", "shared.weight"), *matrices("encoder.norm", "encoder.final_layer_norm")]
    found += matrices("head.norm", "decoder.final_layer_norm")
    if not m.tied_embeddings:
        found += matrices("head.output", "lm_head")
    for ours, theirs in (("encoder", "encoder"), ("embedding", "decoder")):
        bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(Link(f"{ours}.relative.weight", bias))
    stacks = (
        ("encoder.blocks", "encoder", m.encoder_layers, ("attention", "mlp")),
        ("blocks", "decoder", m.layers, ("attention", "cross", "mlp")),
    )
    for ours, theirs, layers, parts in stacks:
        for layer in range(layers):
            for place, part in enumerate(parts):
                one, other = f"{ours}.{layer}", f"{theirs}.block.{layer}.layer.{place}"
                found += matrices(f"{one}.{part}_norm", f"{other}.layer_norm")
                found += _part(m, f"{one}.{part}", other, part)
    return found


def _part(m: ModelConfig, ours: str, theirs: str, part: str) -> list[Link]:
    """The matrices of a sub-layer."""
    if part == "mlp":
        ups = (("gate", "wi_0"), ("up", "wi_1")) if m.gated else (("up", "wi"),)
        return [
            link for a, b in (*ups, ("down", "wo")) for link in matrices(f"{ours}.{a}", f"{theirs}.DenseReluDense.{b}")
        ]
    block = {"attention": "SelfAttention", "cross": "EncDecAttention"}[part]
    names = (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
    return [link for a, b in names for link in matrices(f"{ours}.{a}", f"{theirs}.{block}.{b}")]
