"""BART: an encoder-decoder with norms behind the sums and learned positions. Torch-free."""

from __future__ import annotations

import math
from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub.link import Link, matrices
from megapre.hub.settings import Settings

ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu"}
FIRST_POSITION = 2
"""Row of the position embeddings that the first token reads."""
IGNORED = ()
ZEROS = ("final_logits_bias",)
"""Tensors that must hold nothing but zeros, since nothing here adds them."""
COPIES = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
    "lm_head.weight": "model.shared.weight",
}
"""Tensors that some files hold twice."""
ATTENTION = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "out_proj"))


def model(s: Settings) -> dict[str, Any]:
    """[model] of a config."""
    hidden = s.number("d_model", 1024)
    same = {
        name: s.number(f"decoder_{name}", default)
        for name, default in (("attention_heads", 16), ("ffn_dim", 4096), ("layerdrop", 0.0))
    }
    s.fixed(**{f"encoder_{name}": value for name, value in same.items()})
    s.fixed(decoder_layerdrop=0.0, is_decoder=False, is_encoder_decoder=True, normalize_before=False)
    s.fixed(
        normalize_embedding=True, add_final_layer_norm=False, static_position_embeddings=False, add_bias_logits=False
    )
    s.unused(
        "activation_dropout", "classif_dropout", "num_hidden_layers", "num_beams", "early_stopping", "length_penalty"
    )
    s.unused(
        "max_length", "min_length", "no_repeat_ngram_size", "force_bos_token_to_be_generated", "extra_pos_embeddings"
    )
    length = s.number("max_position_embeddings", 1024)
    return {
        "architecture": "encoder_decoder",
        "encoder_layers": s.number("encoder_layers", 12),
        "layers": s.number("decoder_layers", 12),
        "hidden": hidden,
        "heads": same["attention_heads"],
        "ffn_hidden": same["ffn_dim"],
        "vocab_size": s.number("vocab_size"),
        "sequence": length,
        "source_sequence": length,
        "norm": "layernorm",
        "norm_placement": "post",
        "activation": s.one_of("activation_function", ACTIVATIONS, "gelu"),
        "positions": "learned",
        "embedding_norm": True,
        "embedding_scale": math.sqrt(hidden) if s.take("scale_embedding", False) else 1.0,
        "tied_embeddings": bool(s.one_of("tie_word_embeddings", {True: True}, True)),
        "dropout": s.number("dropout", 0.1),
        "attention_dropout": s.number("attention_dropout", 0.0),
        "init": "normal",
        "init_std": s.number("init_std", 0.02),
    }


def config(m: ModelConfig, kind: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    found: dict[str, Any] = {
        "d_model": m.hidden,
        "max_position_embeddings": m.sequence,
        "activation_function": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[m.activation],
        "scale_embedding": m.embedding_scale != 1,
        "dropout": m.dropout,
        "attention_dropout": m.attention_dropout,
        "init_std": m.init_std,
        "is_encoder_decoder": True,
    }
    for stack, layers in (("encoder", m.encoder_layers), ("decoder", m.layers)):
        found |= {f"{stack}_layers": layers, f"{stack}_attention_heads": m.heads, f"{stack}_ffn_dim": m.n_ffn}
    return found


def links(m: ModelConfig, kind: str) -> list[Link]:
    """Where every tensor lies."""
    found = [Link("embedding.tokens.weight", "model.shared.weight")]
    for ours, theirs in (("encoder.embedding", "model.encoder"), ("embedding", "model.decoder")):
        found.append(Link(f"{ours}.positions.weight", f"{theirs}.embed_positions.weight", (FIRST_POSITION, 0)))
        found += matrices(f"{ours}.norm", f"{theirs}.layernorm_embedding", bias=True)
    attentions = {"attention": "self_attn", "cross": "encoder_attn"}
    stacks = (
        ("encoder.blocks", "model.encoder", m.encoder_layers, ("attention",)),
        ("blocks", "model.decoder", m.layers, ("attention", "cross")),
    )
    for ours, theirs, layers, parts in stacks:
        for layer in range(layers):
            one, other = f"{ours}.{layer}", f"{theirs}.layers.{layer}"
            for part in parts:
                found += matrices(f"{one}.{part}_norm", f"{other}.{attentions[part]}_layer_norm", bias=True)
                for a, b in ATTENTION:
                    found += matrices(f"{one}.{part}.{a}", f"{other}.{attentions[part]}.{b}", bias=True)
            for a, b in (("mlp.up", "fc1"), ("mlp.down", "fc2"), ("mlp_norm", "final_layer_norm")):
                found += matrices(f"{one}.{a}", f"{other}.{b}", bias=True)
    return found
