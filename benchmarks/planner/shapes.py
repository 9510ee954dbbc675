"""Shapes of public models that performance tables name without printing, from their model cards."""

from __future__ import annotations

import re
from typing import Any

GATED: dict[str, Any] = {"gated": True, "tied": False}

MODELS: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    # pattern of the name, (layers, hidden, heads, kv_heads, ffn, vocab), further fields of Shape
    (r"qwen3 30b", (48, 2048, 32, 4, 6144, 151936),
     GATED | {"head_dim": 128, "experts": 128, "experts_per_token": 8, "expert_ffn": 768}),
    (r"qwen3 235b", (94, 4096, 64, 4, 12288, 151936),
     GATED | {"head_dim": 128, "experts": 128, "experts_per_token": 8, "expert_ffn": 1536}),
    (r"gpt-oss 120b", (36, 2880, 64, 8, 2880, 201088),
     GATED | {"head_dim": 64, "experts": 128, "experts_per_token": 4, "expert_ffn": 2880}),
    (r"deepseek-v3", (61, 7168, 128, 128, 18432, 129280),
     GATED | {"head_dim": 160, "experts": 256, "experts_per_token": 8, "expert_ffn": 2048, "shared_ffn": 2048,
              "dense_layers": 3}),
    (r"moonlight", (27, 2048, 16, 16, 11264, 163840),
     GATED | {"head_dim": 160, "experts": 64, "experts_per_token": 6, "expert_ffn": 1408, "shared_ffn": 2816,
              "dense_layers": 1}),
    (r"grok", (64, 6144, 48, 8, 32768, 131072),
     GATED | {"experts": 8, "experts_per_token": 2, "expert_ffn": 32768}),
    (r"mixtral.*8x7b", (32, 4096, 32, 8, 14336, 32000),
     GATED | {"experts": 8, "experts_per_token": 2, "expert_ffn": 14336}),
    (r"mixtral.*8x22b(?!.*g8)", (56, 6144, 48, 8, 16384, 32768),
     GATED | {"experts": 8, "experts_per_token": 2, "expert_ffn": 16384}),
    (r"mixtral.*g8t8", (56, 6144, 48, 8, 2048, 32768),
     GATED | {"experts": 64, "experts_per_token": 8, "expert_ffn": 2048}),
    (r"qwen2.*57b", (28, 3584, 28, 4, 18944, 151936),
     GATED | {"experts": 64, "experts_per_token": 8, "expert_ffn": 2560, "shared_ffn": 20480}),
    (r"llama-?3.*8x70b", (80, 8192, 64, 8, 28672, 128256),
     GATED | {"experts": 8, "experts_per_token": 2, "expert_ffn": 28672}),
    (r"nemotron-?4? ?15b", (32, 6144, 48, 8, 24576, 256000), {"tied": False}),
    (r"nemotron-?4? ?-?340b", (96, 18432, 96, 8, 73728, 256000), {"tied": False}),
    (r"nemotron-8b", (32, 4096, 32, 32, 16384, 256000), {}),
    (r"nemotron-22b", (40, 6144, 48, 48, 24576, 256000), {}),
    (r"llama-?3(\.1)?[ -]?8b", (32, 4096, 32, 8, 14336, 128256), GATED),
    (r"llama-?3(\.1)?[ -]?70b", (80, 8192, 64, 8, 28672, 128256), GATED),
    (r"llama-?3(\.1)?[ -]?405b", (126, 16384, 128, 8, 53248, 128256), GATED),
    (r"llama-?2? ?-?7b", (32, 4096, 32, 32, 11008, 32000), GATED),
    (r"llama-?2? ?-?13b", (40, 5120, 40, 40, 13824, 32000), GATED),
    (r"llama-33b", (60, 6656, 52, 52, 17920, 32000), GATED),
    (r"llama2? 34b|llama 2 34b", (48, 8192, 64, 8, 22016, 32000), GATED),
    (r"llama-65b", (80, 8192, 64, 64, 22016, 32000), GATED),
    (r"llama-?2? 70b|llama 2 70b", (80, 8192, 64, 8, 28672, 32000), GATED),
    (r"pax gpt 126m", (12, 768, 12, 12, 3072, 51200), {}),
    (r"pax gpt 5b|gpt3-5b", (24, 4096, 32, 32, 16384, 51200), {}),
    (r"pax gpt 175b|gpt-3 175b", (96, 12288, 96, 96, 49152, 51200), {}),
    (r"bert 110m", (12, 768, 12, 12, 3072, 30592), {"causal": False}),
)  # fmt: skip


def known(name: str) -> tuple[tuple[int, ...], dict[str, Any]] | None:
    """The shape of the model called ``name``, or None."""
    for pattern, sizes, more in MODELS:
        if re.search(pattern, name.lower()):
            return sizes, more
    return None
