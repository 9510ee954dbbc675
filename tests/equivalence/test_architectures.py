"""Every kind of block that a job can ask for computes the oracle's run, under every axis that cuts it.

A line of ``FAMILIES`` is a family of models; each runs on four of ``LAYOUTS``, among them tensor with sequence
parallelism and, where the job allows it, a cut sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megapre.config.check import ConfigError, check
from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig
from megapre.verify.cells import parse, scaled_down
from megapre.verify.run import Prover

LLAMA = dict(norm="rmsnorm", positions="rope", activation="swiglu", bias=False, tied_embeddings=False, heads=4)


def job(dtype: str = "fp32", **model: object) -> Config:
    """A job of this model."""
    config = Config(model=ModelConfig(**model), optimizer=OptimizerConfig(lr=3e-3), precision=PrecisionConfig(dtype))  # type: ignore[arg-type]
    if config.model.architecture == "encoder":
        return Config(
            model=config.model, data=DataConfig(objective="masked"), optimizer=config.optimizer,
            precision=config.precision,
        )  # fmt: skip
    return config


FAMILIES = {
    "llama3": job(**LLAMA, kv_heads=2, rope_scaling="llama3", rope_factor=8.0, rope_original=64, rope_theta=5e5),
    "qwen2": job(**LLAMA, kv_heads=2, qkv_bias=True, rope_scaling="yarn", rope_factor=4.0, rope_original=64),
    "qwen3": job(**LLAMA, kv_heads=1, qk_norm=True, head_size=10, dropout=0.1, attention_dropout=0.1),
    "mistral": job("bf16", **LLAMA, kv_heads=2, window=5),
    "gpt-j": job(positions="rope", rope_interleaved=True, parallel_block=True, tied_embeddings=False, bias=True),
    "linear-geglu": job(**LLAMA | {"activation": "geglu"}, rope_scaling="linear", rope_factor=4.0, attention_scale=0.5),
    "ntk-relu": job(**LLAMA | {"activation": "relu"}, rope_scaling="ntk", rope_factor=4.0),
    "norms-of-heads": job(qk_norm=True, activation="gelu_exact"),
    "prefix": replace(job(attention_dropout=0.1), data=DataConfig(objective="prefix")),
    "prefix-local": replace(job(window=5, **LLAMA), data=DataConfig(objective="prefix", reset_attention=True)),
    "local-encoder": job(architecture="encoder", activation="gelu_exact", window=5),
}
LAYOUTS = ("2x1x1+sp", "4x1x1", "1x2x2+zero1", "2x2x1+recompute:full", "1x1x1+ring:2", "1x1x1+ulysses:2", "1x1x2+zero3")
EACH = 4


def allowed(name: str) -> list[str]:
    """Four layouts for a family, its turn in the list; all that a family does not allow are passed over."""
    start = list(FAMILIES).index(name)
    ring = [*LAYOUTS[start % len(LAYOUTS) :], *LAYOUTS[: start % len(LAYOUTS)]]
    kept = []
    for layout in ring:
        cell = parse(layout)
        try:
            check(cell.apply(scaled_down(FAMILIES[name])[0]), cell.world)
            kept.append(layout)
        except ConfigError:
            continue
    # Always a shard of the sequence for the tensor ranks, and a cut sequence where the job allows one.
    first = ["2x1x1+sp", *[layout for layout in kept if "ring" in layout or "ulysses" in layout][:1]]
    return [*first, *(layout for layout in kept if layout not in first)][:EACH]


CASES = [(name, layout) for name in FAMILIES for layout in allowed(name)]


@pytest.fixture(scope="module")
def provers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prover]:
    """One prover per family: oracle and unsharded baseline are computed once."""
    made: dict[str, Prover] = {}

    def prover(name: str) -> Prover:
        if name not in made:
            made[name] = Prover(*scaled_down(FAMILIES[name]), None, Path(tmp_path_factory.mktemp(name)))
        return made[name]

    return prover


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_family_agrees_with_the_oracle(name: str, layout: str, provers: Callable[[str], Prover]) -> None:
    for arm, _, (quantity, error, limit) in provers(name).both(parse(layout)):
        assert error <= limit, f"{name} {layout} arm {arm}: {quantity} is off by {error:.2e}, limit {limit:.2e}"


def test_every_family_runs_on_four_layouts() -> None:
    assert all(sum(case[0] == name for case in CASES) >= EACH for name in FAMILIES)
