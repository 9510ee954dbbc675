"""RoPE's frequencies against the papers' formulas in plain fp64, and against transformers' tables."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megapre.config.schema import ModelConfig
from megapre.models.embedding import sinusoids
from megapre.models.positions import rope_tables

SEED = random.SystemRandom().randrange(10**6)
FAR = [0, 1, 255, 256, 257, 4095, 131071]


def angles(model: ModelConfig, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Radians of every pair at position 1."""
    cos, sin = rope_tables(model, torch.tensor([[1]]), dtype)
    return torch.atan2(sin, cos)[0, 0]


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest() -> None:
    """The definition of the NTK-aware base, whatever the size of a head."""
    draw = random.Random(SEED)
    d, factor, theta = 2 * draw.randint(2, 64), draw.uniform(1, 32), 10 ** draw.uniform(3, 6)
    model = ModelConfig(
        positions="rope", head_size=d, rope_theta=theta, rope_scaling="ntk", rope_factor=factor, hidden=8, heads=1
    )
    found = angles(model)
    slowest = theta ** (-(d - 2) / d) / factor
    assert float(found[0]) == pytest.approx(1.0) and float(found[-1]) == pytest.approx(slowest), f"{SEED=}"


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_frequencies_are_those_of_transformers(scaling: str) -> None:
    """Sizes as published models have them; theirs are fp32."""
    for d, theta, factor, original in ((128, 5e5, 8.0, 8192), (64, 1e4, 16.0, 4096), (128, 1e6, 4.0, 32768)):
        known = dict(rope_type=scaling, rope_theta=theta, factor=factor)
        model = ModelConfig(
            positions="rope", hidden=d, heads=1, rope_theta=theta, rope_scaling=scaling, rope_factor=factor,
            rope_original=0 if scaling == "linear" else original,
        )  # fmt: skip
        if scaling != "linear":
            known["original_max_position_embeddings"] = original
        if scaling == "llama3":
            known |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
        config = LlamaConfig(
            hidden_size=d, num_attention_heads=1, rope_parameters=known, max_position_embeddings=int(original * factor)
        )
        if scaling == "linear":
            theirs = 1 / theta ** (torch.arange(0, d, 2).double() / d) / factor  # theirs has it in its modules
            attention = 1.0
        else:
            theirs, attention = ROPE_INIT_FUNCTIONS[scaling](config, "cpu")
        torch.testing.assert_close(angles(model), theirs.double(), rtol=2e-6, atol=0)
        cos, sin = rope_tables(model, torch.tensor([[7]]), torch.float64)
        torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, attention), rtol=1e-12, atol=0)


def test_tables_are_exact_far_out_whatever_the_models_type() -> None:
    """bf16 positions or frequencies would make 256 and 257 one place (transformers PR #29285)."""
    model = ModelConfig(
        positions="rope", hidden=128, heads=1, rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0,
        rope_original=8192,
    )  # fmt: skip
    cos, sin = rope_tables(model, torch.tensor(FAR).unsqueeze(1), torch.bfloat16)
    for row, position in enumerate(FAR):
        for pair in range(64):
            plain = 5e5 ** (-2 * pair / 128)
            turns = 8192 * plain / (2 * math.pi)
            kept = min(1.0, max(0.0, (turns - 1) / 3))
            angle = position * (kept * plain + (1 - kept) * plain / 8)
            assert abs(float(cos[row, 0, pair]) - math.cos(angle)) < 1e-6
            assert abs(float(sin[row, 0, pair]) - math.sin(angle)) < 1e-6


def test_sinusoids_are_exact_far_out() -> None:
    found = sinusoids(torch.tensor(FAR), 6)
    for row, position in enumerate(FAR):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            assert abs(float(found[row, 2 * pair]) - math.sin(angle)) < 1e-9
            assert abs(float(found[row, 2 * pair + 1]) - math.cos(angle)) < 1e-9
