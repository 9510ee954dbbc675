"""The oracle with the settings of other families against their Hugging Face modules: loss, logits, every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megapre.config.schema import Config, ModelConfig
from tests.models.test_against_transformers import LENGTH, VOCAB, compare, llama_names

LLAMA = ModelConfig(
    layers=2, hidden=24, heads=4, kv_heads=2, ffn_hidden=40, sequence=LENGTH, norm="rmsnorm", activation="swiglu",
    positions="rope", bias=False, tied_embeddings=False,
)  # fmt: skip
THEIRS = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
    attn_implementation="eager",
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def drawn(theirs: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with weights, biases and norms far from their first values."""
    torch.manual_seed(seed)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


def llama_like(biases: bool = False, norms: bool = False) -> dict[str, tuple[str, bool]]:
    """Where our tensors are in a model of Llama's family."""
    names = llama_names()
    for layer in range(2):
        ours, their = f"blocks.{layer}", f"model.layers.{layer}"
        for part in ("gate", "up", "down"):
            names[f"{ours}.mlp.{part}.weight"] = (f"{their}.mlp.{part}_proj.weight", False)
        for part in "qkv" if biases else "":
            names[f"{ours}.attention.{part}.bias"] = (f"{their}.self_attn.{part}_proj.bias", False)
        for part in "qk" if norms else "":
            names[f"{ours}.attention.{part}_norm.weight"] = (f"{their}.self_attn.{part}_norm.weight", False)
    return names


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_scaling": LLAMA3},
               dict(rope_scaling="llama3", rope_factor=8.0, rope_original=32), {}),
    "llama-linear": (LlamaForCausalLM, LlamaConfig, {"rope_scaling": dict(rope_type="linear", factor=4.0)},
                     dict(rope_scaling="linear", rope_factor=4.0), {}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {"rope_scaling": YARN},
                   dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16), {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}, dict(window=5), {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, dict(qkv_bias=True), {"biases": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 10}, dict(qk_norm=True, head_size=10), {"norms": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_is_theirs(name: str) -> None:
    kind, settings, theirs, ours, extra = FAMILIES[name]
    module = drawn(kind(settings(**{**THEIRS, **theirs})), seed=5)
    compare(Config(model=replace(LLAMA, **ours)), module, llama_like(**extra))
