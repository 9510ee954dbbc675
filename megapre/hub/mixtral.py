"""Mixtral and Qwen3-MoE: Llama's block with experts. Torch-free."""

from __future__ import annotations

from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub import llama
from megapre.hub.link import Link, matrices
from megapre.hub.settings import Settings

IGNORED, COPIES = llama.IGNORED, llama.COPIES
NAMES = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp.gate", "mlp.experts", {part: f"{part}_proj" for part in ("gate", "up", "down")}),
}
"""Of each kind: router, experts, matrices of an expert."""


def model(s: Settings) -> dict[str, Any]:
    """[model] of a config."""
    mixtral = s.take("model_type") == "mixtral"
    found = llama.model(s)
    s.fixed(router_jitter_noise=0.0)
    experts = s.take("num_experts", s.take("num_local_experts", 8 if mixtral else 128))
    found |= {
        "experts": int(experts),
        "experts_per_token": s.number("num_experts_per_tok", 2 if mixtral else 8),
        "router_normalize": mixtral or bool(s.take("norm_topk_prob", False)),
        "router_aux_loss": 0.0,
    }
    s.unused("router_aux_loss_coef")  # of a sum over another set of tokens: set model.router_aux_loss
    if mixtral:
        return found
    found["expert_hidden"] = s.number("moe_intermediate_size", 768)
    found["moe_every"] = s.number("decoder_sparse_step", 1)
    if s.take("mlp_only_layers", []):
        raise ValueError(f"{s.where} has mlp_only_layers = {s.take('mlp_only_layers')}, which megapre cannot compute.")
    return found


def config(m: ModelConfig, kind: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    found = llama.config(m, kind) | {"num_experts_per_tok": m.experts_per_token}
    if kind == "mixtral":
        return found | {"num_local_experts": m.experts, "intermediate_size": m.n_expert_hidden}
    sparse = {"decoder_sparse_step": m.moe_every, "moe_intermediate_size": m.n_expert_hidden}
    return found | sparse | {"num_experts": m.experts, "norm_topk_prob": m.router_normalize}


def links(m: ModelConfig, kind: str) -> list[Link]:
    """Where every tensor lies."""
    router, experts, parts = NAMES[kind]
    found = llama.links(m, kind)
    for layer in range(m.layers):
        if not m.has_experts(layer + 1):
            continue
        ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}"
        found += matrices(f"{ours}.router", f"{theirs}.{router}")
        for e in range(m.experts):
            for part, name in parts.items():
                found += matrices(f"{ours}.experts.{e}.{part}", f"{theirs}.{experts}.{e}.{name}")
    return found
