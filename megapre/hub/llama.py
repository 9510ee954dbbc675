"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: one family of decoders with few differences. Torch-free."""

from __future__ import annotations

from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub.link import Link, matrices
from megapre.hub.settings import Settings

ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
PARTS = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj"))
IGNORED = (r".*\.rotary_emb\.inv_freq",)
"""Tensors that follow from the settings."""
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
"""Tensors that some files hold twice where embeddings are tied."""


def model(s: Settings) -> dict[str, Any]:
    """[model] of a config."""
    kind, heads, hidden = s.take("model_type"), s.number("num_attention_heads"), s.number("hidden_size")
    head_size = s.number("head_dim", 128 if kind == "qwen3" else hidden // heads)
    found = {
        "architecture": "decoder",
        "layers": s.number("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": s.number("num_key_value_heads", heads),
        "head_size": 0 if head_size * heads == hidden else head_size,
        "ffn_hidden": s.number("intermediate_size"),
        "vocab_size": s.number("vocab_size"),
        "sequence": s.number("max_position_embeddings", 2048),
        "norm": "rmsnorm",
        "norm_eps": s.number("rms_norm_eps", 1e-6),
        "activation": s.one_of("hidden_act", ACTIVATIONS, "silu"),
        "positions": "rope",
        "bias": False,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind in ("qwen3", "qwen3_moe"),
        "window": window(s, kind),
        "tied_embeddings": bool(s.take("tie_word_embeddings", False)),
        "attention_dropout": s.number("attention_dropout", 0.0),
        "init_std": s.number("initializer_range", 0.02),
        **rope(s),
    }
    s.fixed(mlp_bias=False)
    if s.take("attention_bias", False):  # Llama's gives o_proj one too
        raise ValueError(f"{s.where} has attention_bias = true, a bias of o_proj too, which megapre cannot compute.")
    return found


def window(s: Settings, kind: str) -> int:
    """The sliding window of every layer, 0 for none."""
    layers = s.number("num_hidden_layers")
    size = s.take("sliding_window", 4096 if kind == "mistral" and "sliding_window" not in s.values else None)
    if kind.startswith("qwen"):
        used = s.take("use_sliding_window", False)
        if used and s.take("max_window_layers", 28):
            raise ValueError(f"{s.where} has a sliding window in some layers only, which megapre cannot compute.")
        size = size if used else None
    types = set(s.take("layer_types", []))
    expected = {"sliding_attention"} if size else {"full_attention"}
    if types - expected or len(s.take("layer_types", [])) not in (0, layers):
        raise ValueError(
            f"{s.where} has layer_types = {sorted(types)}: megapre computes one kind of attention in a model."
        )
    return int(size or 0)


def rope(s: Settings) -> dict[str, Any]:
    """The rotary embedding, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it."""
    told = s.take("rope_parameters") or s.take("rope_scaling") or {}
    s.unused("rope_parameters", "rope_scaling")
    given = Settings(dict(told), f"rope_parameters of {s.where}")
    theta = s.take("rope_theta", 10000.0)
    kind = given.take("rope_type", given.take("type", "default"))
    found: dict[str, Any] = {"rope_theta": float(given.number("rope_theta", theta))}
    if kind == "linear":
        found |= {"rope_scaling": "linear", "rope_factor": float(given.number("factor"))}
    elif kind in ("yarn", "llama3"):
        longest = s.number("max_position_embeddings", 2048)
        found |= {"rope_scaling": kind, "rope_factor": float(given.number("factor"))}
        found["rope_original"] = given.number("original_max_position_embeddings", longest)
    elif kind != "default":
        raise ValueError(f"{given.where} has rope_type = {kind!r}: megapre knows default, linear, yarn and llama3.")
    if kind == "llama3":
        found |= {
            "rope_low": float(given.number("low_freq_factor")),
            "rope_high": float(given.number("high_freq_factor")),
        }
    if kind == "yarn":
        found |= {
            "rope_low": float(given.number("beta_slow", 1.0)),
            "rope_high": float(given.number("beta_fast", 32.0)),
        }
        found["rope_attention"] = float(given.take("attention_factor", 0.0))
        given.fixed(mscale=None, mscale_all_dim=None, truncate=True)
    given.fixed(partial_rotary_factor=1.0)
    given.finish()
    return found


def config(m: ModelConfig, kind: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    found = {
        "hidden_size": m.hidden,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.n_kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.n_ffn,
        "max_position_embeddings": m.sequence,
        "rms_norm_eps": m.norm_eps,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[m.activation],
        "tie_word_embeddings": m.tied_embeddings,
        "attention_dropout": m.attention_dropout,
        "initializer_range": m.init_std,
        "rope_theta": m.rope_theta,
        "rope_scaling": rope_scaling(m),
    }
    if kind in ("mistral", "mixtral"):
        found["sliding_window"] = m.window or None
    elif kind.startswith("qwen") and m.window:
        found |= {"use_sliding_window": True, "sliding_window": m.window, "max_window_layers": 0}
    return found


def rope_scaling(m: ModelConfig) -> dict[str, Any] | None:
    """How the frequencies are changed, in the names of ``transformers``."""
    if m.rope_scaling == "none":
        return None
    found: dict[str, Any] = {"rope_type": m.rope_scaling, "factor": m.rope_factor}
    if m.rope_scaling in ("yarn", "llama3"):
        low, high = ("beta_slow", "beta_fast") if m.rope_scaling == "yarn" else ("low_freq_factor", "high_freq_factor")
        found |= {"original_max_position_embeddings": m.rope_original, low: m.rope_low, high: m.n_rope_high}
    if m.rope_attention:
        found["attention_factor"] = m.rope_attention
    return found


def links(m: ModelConfig, kind: str) -> list[Link]:
    """Where every tensor lies."""
    found = [Link("embedding.tokens.weight", "model.embed_tokens.weight"), *matrices("head.norm", "model.norm")]
    if not m.tied_embeddings:
        found += matrices("head.output", "lm_head")
    for layer in range(m.layers):
        found += block(m, f"blocks.{layer}", f"model.layers.{layer}")
        if not m.has_experts(layer + 1):
            for part in ("gate", "up", "down"):
                found += matrices(f"blocks.{layer}.mlp.{part}", f"model.layers.{layer}.mlp.{part}_proj")
    return found


def block(m: ModelConfig, ours: str, theirs: str) -> list[Link]:
    """The norms and the attention of a block."""
    found = matrices(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
    found += matrices(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
    for part, name in PARTS:
        bias = m.has_qkv_bias and part != "output"
        found += matrices(f"{ours}.attention.{part}", f"{theirs}.self_attn.{name}", bias=bias)
    for part in ("q_norm", "k_norm") if m.qk_norm else ():
        found += matrices(f"{ours}.attention.{part}", f"{theirs}.self_attn.{part}")
    return found
