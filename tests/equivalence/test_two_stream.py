"""Two-stream models compute the oracle's run in any layout, and no prediction sees its own token or a later one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from megapre.verify import oracle
from megapre.verify.cells import Cell, batches, parse, scaled_down

JOBS = {
    "xlnet": Config(  # as it is: relative positions and segments, no biases in its attention
        model=ModelConfig(
            architecture="two_stream", norm_placement="post", positions="transformer_xl", activation="gelu_exact",
            dropout=0.1, attention_dropout=0.1, token_types=2, bias=False, mlp_bias=True, output_bias=True,
            init="normal",
        ),
        data=DataConfig(objective="permuted", reset_attention=True),
        optimizer=OptimizerConfig(lr=3e-3),
    ),
    "clamped": Config(
        model=ModelConfig(architecture="two_stream", positions="transformer_xl", kv_heads=2, relative_clamp=9),
        data=DataConfig(objective="permuted"),
        optimizer=OptimizerConfig(lr=3e-3),
    ),
    "buckets": Config(
        model=ModelConfig(
            architecture="two_stream", norm_placement="post", positions="t5", activation="gelu_exact", dropout=0.1,
            attention_dropout=0.1, relative_buckets=8, relative_distance=12, embedding_norm=True,
        ),
        data=DataConfig(objective="permuted", reset_attention=True),
        optimizer=OptimizerConfig(lr=3e-3),
    ),
    "rope": Config(
        model=ModelConfig(
            architecture="two_stream", positions="rope", heads=4, kv_heads=2, norm="rmsnorm", bias=False,
            activation="swiglu",
        ),
        data=DataConfig(objective="permuted"),
        optimizer=OptimizerConfig(lr=3e-3),
    ),
}  # fmt: skip
CASES = [
    ("buckets", "2x1x1+sp"), ("buckets", "1x2x1+zb-v:2+recompute:full"), ("buckets", "1x2x2+zero1"),
    ("xlnet", "2x1x1+sp"), ("xlnet", "1x2x2+zero3"), ("xlnet", "2x2x1+interleaved:2+recompute:selective"),
    ("xlnet", "1x2x1+zb-v:2+recompute:full"), ("xlnet", "4x1x1"), ("xlnet", "1x2x2+zero1"), ("clamped", "4x1x1+sp"),
    ("rope", "1x2x2+zero3"), ("rope", "2x2x1+interleaved:2+recompute:selective"), ("rope", "4x1x1+sp"),
]  # fmt: skip
BOTH = ("2x1x1+sp", "1x2x2+zero3")
"""Layouts that also run in the job's own number format and kernels."""


@pytest.mark.parametrize(("job", "layout"), CASES, ids=[f"{job}-{layout}" for job, layout in CASES])
def test_layout_agrees_with_the_oracle(job: str, layout: str, agree: Callable[[str, Cell, bool], None]) -> None:
    agree(job, parse(layout), layout in BOTH)


@pytest.mark.parametrize("name", JOBS)
def test_a_prediction_depends_on_earlier_tokens_of_the_order_alone(name: str) -> None:
    """Changing one token changes the scores of positions behind it in the order, and no others."""
    config, vocab_size = scaled_down(JOBS[name])
    weights = oracle.initial_weights(config, vocab_size)
    for sample in batches(config, vocab_size, 1)[0]:
        assert sample.ranks is not None
        before = oracle.logits(config, weights, sample)
        for place in range(0, len(sample.tokens), 3):
            tokens = sample.tokens.clone()
            tokens[place] = (tokens[place] + 1) % vocab_size
            changed = (oracle.logits(config, weights, replace(sample, tokens=tokens)) != before).any(-1)[:, 0]
            later = sample.ranks[:, 0] > sample.ranks[place, 0]
            assert not bool((changed & ~later).any())
            if sample.segments is None:
                assert torch.equal(changed, later)
