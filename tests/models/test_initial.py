"""Initial weights: each scheme's spread against the papers' numbers, and values that depend on seed and name alone."""

from __future__ import annotations

import math

import pytest
import torch

from megapre.config.schema import Config, ModelConfig, TrainConfig
from megapre.models import spec
from megapre.verify import oracle

L, H, F, V = 4, 48, 80, 101
GLOROT = math.sqrt(2 / (H + H))
EXPECTED = {
    # std of block 2's q, v and output, of its MLP's first and second matrix, and of the embedding
    "scaled": (0.1, 0.1, 0.1 / math.sqrt(8), 0.1, 0.1 / math.sqrt(8), 0.1),
    "normal": (0.1, 0.1, 0.1, 0.1, 0.1, 0.1),
    "depth": (0.1, 0.1, 0.1 / math.sqrt(4), 0.1, 0.1 / math.sqrt(4), 0.1),
    "xavier": (GLOROT, GLOROT, GLOROT, math.sqrt(2 / (H + F)), math.sqrt(2 / (H + F)), 0.1),
    "he": (math.sqrt(2 / H), math.sqrt(2 / H), math.sqrt(2 / H), math.sqrt(2 / H), math.sqrt(2 / F), 0.1),
    "tfixup": (
        GLOROT, GLOROT * 36**-0.25, GLOROT * 36**-0.25, math.sqrt(2 / (H + F)) * 36**-0.25,
        math.sqrt(2 / (H + F)) * 36**-0.25, H**-0.5 * 36**-0.25,
    ),
}  # fmt: skip
NAMES = [f"blocks.1.{part}.weight" for part in ("attention.q", "attention.v", "attention.output", "mlp.up", "mlp.down")]
NAMES.append("embedding.tokens.weight")


@pytest.mark.parametrize("scheme", EXPECTED)
def test_scales_are_the_papers(scheme: str) -> None:
    """In the spec, and in the values: a sample's standard deviation lies within 5 of its own deviations."""
    model = ModelConfig(layers=L, hidden=H, heads=4, ffn_hidden=F, sequence=8, init=scheme, init_std=0.1)
    stds = {tensor.name: tensor.std for tensor in spec.tensors(model, V)}
    assert [stds[name] for name in NAMES] == pytest.approx(EXPECTED[scheme])
    values = oracle.initial_weights(Config(model=model, train=TrainConfig(seed=5)), V)
    for name, std in zip(NAMES, EXPECTED[scheme], strict=True):
        off = abs(float(values[name].std()) / std - 1) * math.sqrt(2 * values[name].numel())
        assert off < 5, f"{name}: {off:.1f} deviations"


def test_encoders_have_their_own_fixup() -> None:
    model = ModelConfig(layers=L, hidden=H, heads=4, architecture="encoder", init="tfixup")
    found = {tensor.name: tensor.std for tensor in spec.tensors(model, V)}["blocks.3.attention.output.weight"]
    assert found == pytest.approx(0.67 * L**-0.25 * GLOROT)


def test_values_follow_from_seed_and_name_alone() -> None:
    """Another depth, width of the vocabulary or scheme moves no draw: the values differ by the scale alone."""

    def draws(seed: int, **settings: object) -> torch.Tensor:
        model = ModelConfig(**{**dict(layers=2, hidden=H, heads=4, sequence=8), **settings})  # type: ignore[arg-type]
        name = "blocks.1.attention.output.weight"
        std = {tensor.name: tensor.std for tensor in spec.tensors(model, V)}[name]
        return oracle.initial_weights(Config(model=model, train=TrainConfig(seed=seed)), V)[name] / std

    same = [draws(5), draws(5, layers=3, init="xavier"), draws(5, positions="t5", init="depth")]
    for other in same[1:]:
        torch.testing.assert_close(other, same[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(draws(6), same[0])
