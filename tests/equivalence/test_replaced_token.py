"""Generator and discriminator compute the oracle's run in any layout and cut, from the same draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig
from megapre.verify.cells import Cell, parse
from megapre.verify.run import Prover

PAIR = dict(architecture="replaced_token", generator_layers=2, generator_hidden=32)
JOBS = {
    "electra": Config(
        model=ModelConfig(
            **PAIR, activation="gelu_exact", norm_placement="post", embedding_norm=True, embedding_size=20,
            mlm_transform=True, token_types=2, dropout=0.1, attention_dropout=0.1,
        ),
        data=DataConfig(objective="replaced"),
        optimizer=OptimizerConfig(lr=3e-3),
    ),
    "pre": Config(
        model=ModelConfig(
            **PAIR, norm="rmsnorm", positions="t5", bias=False, activation="relu", tied_embeddings=False,
            relative_buckets=8, relative_distance=12,
        ),
        data=DataConfig(objective="replaced", reset_attention=True),
        optimizer=OptimizerConfig(lr=3e-3),
        precision=PrecisionConfig("bf16"),
    ),
}  # fmt: skip
CASES = [
    ("electra", "2x1x1+sp"), ("electra", "1x2x2+zero3"), ("electra", "1x4x1+zb-h1+recompute:selective"),
    ("electra", "1x1x1+ring:2"), ("electra", "1x1x2+zero2"),
    ("pre", "2x2x1+sp+interleaved:2"), ("pre", "1x2x1+zb-v:2+recompute:full"), ("pre", "4x1x1"), ("pre", "1x2x2+zero1"),
]  # fmt: skip
BOTH = ("2x1x1+sp", "1x2x2+zero3", "1x2x2+zero1")
"""Layouts that also run in the job's own number format and kernels."""


@pytest.mark.parametrize(("job", "layout"), CASES, ids=[f"{job}-{layout}" for job, layout in CASES])
def test_layout_agrees_with_the_oracle(job: str, layout: str, agree: Callable[[str, Cell, bool], None]) -> None:
    agree(job, parse(layout), layout in BOTH)


@pytest.mark.parametrize(("layout", "split"), [("2x2x1", [2, 5]), ("1x2x1", [3, 4]), ("2x2x1+sp", [5, 2])])
def test_stages_are_cut_inside_the_generator_behind_it_and_inside_the_discriminator(
    layout: str, split: list[int], provers: Callable[[str], Prover]
) -> None:
    config = provers("electra").config
    cut = replace(config, parallel=replace(config.parallel, layers_per_stage=split))
    _, (name, error, limit) = provers("electra").layout(parse(layout), config=cut)
    assert error <= limit, f"{split}: {name} is off by {error:.2e}, limit {limit:.2e}"
