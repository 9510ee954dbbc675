"""Every kind of block that a job can ask for computes the oracle's run, under every axis that cuts it.

A line of ``JOBS`` is a family of models; each runs on four layouts, among them tensor with sequence parallelism
and, where the job allows it, a cut sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig
from megapre.verify.cells import parse, scaled_down
from megapre.verify.run import Prover
from tests.equivalence.conftest import allowed

LLAMA = dict(norm="rmsnorm", positions="rope", activation="swiglu", bias=False, tied_embeddings=False, heads=4)
T5 = dict(positions="t5", norm="rmsnorm", bias=False, attention_scale=1.0)
BERT = dict(
    architecture="encoder", norm_placement="post", activation="gelu_exact", embedding_norm=True, token_types=2,
    mlm_transform=True, init="normal",
)  # fmt: skip


def job(dtype: str = "fp32", **model: object) -> Config:
    """A job of this model."""
    config = Config(model=ModelConfig(**model), optimizer=OptimizerConfig(lr=3e-3), precision=PrecisionConfig(dtype))  # type: ignore[arg-type]
    if config.model.architecture == "encoder":
        return Config(
            model=config.model, data=DataConfig(objective="masked"), optimizer=config.optimizer,
            precision=config.precision,
        )  # fmt: skip
    return config


def paired(objective: str, **model: object) -> Config:
    """A job with a loss of sentences beside that of tokens."""
    return replace(job("fp32", **model, sentence_classes=2), data=DataConfig(objective=objective))


JOBS = {
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
    "gpt-1": job("bf16", norm_placement="post", dropout=0.1),
    "transformer": job(
        norm_placement="post", activation="relu", positions="sinusoidal", embedding_scale=7.2, output_scale=0.3,
        init="xavier",
    ),
    "bloom": job(positions="alibi", embedding_norm=True, init="depth", heads=4),
    # Not "he": it saturates T5's unscaled softmax, and arm B then compares how far two draws of noise are amplified.
    "t5": job(**T5, activation="relu", init="xavier", dropout=0.1, attention_dropout=0.1),
    "t5-encoder": job(**T5, architecture="encoder", activation="geglu", tied_embeddings=False, init="tfixup"),
    "bert": job(**BERT, dropout=0.1, attention_dropout=0.1),
    "electra": job(**BERT, embedding_size=20),
    "albert": job(**BERT | {"activation": "gelu"}, embedding_size=20, share_layers=True),
    "bert-pairs": paired("next_sentence", **BERT, dropout=0.1),
    "albert-pairs": paired("sentence_order", **BERT | {"activation": "gelu"}, embedding_size=20, share_layers=True),
    "transformer-xl": job(positions="transformer_xl", heads=4, kv_heads=2, attention_dropout=0.1),
    "xlnet-encoder": paired(
        "next_sentence", architecture="encoder", norm_placement="post", positions="transformer_xl", token_types=2,
        relative_clamp=9, share_layers=True,
    ),
    "local-encoder": job(architecture="encoder", activation="gelu_exact", window=5, init="he"),
}
LAYOUTS = (
    "4x1x1", "1x2x2+zero1", "1x1x1+ring:2", "1x4x1+recompute:full", "1x1x1+ulysses:2", "1x2x2+zero3",
    "1x2x1+zb-v:2+recompute:selective",
)  # fmt: skip
EACH = 4
FIRST = "2x1x1+sp"
KERNELS = ("qwen3", "mistral", "gpt-1", "bloom", "t5", "bert")


def four(name: str) -> list[str]:
    """Four layouts for a family, from a place that its name says on; what it does not allow is passed over."""
    start, small = sum(map(ord, name)) % len(LAYOUTS), scaled_down(JOBS[name])[0]
    kept = [layout for layout in (*LAYOUTS[start:], *LAYOUTS[:start]) if allowed(small, parse(layout))]
    # Always a shard of the sequence for the tensor ranks, and a cut sequence where the job allows one.
    first = [FIRST, *[layout for layout in kept if "ring" in layout or "ulysses" in layout][:1]]
    return [*first, *(layout for layout in kept if layout not in first)][:EACH]


CASES = [(name, layout) for name in JOBS for layout in four(name)]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_family_agrees_with_the_oracle(name: str, layout: str, provers: Callable[[str], Prover]) -> None:
    """The layout in fp64; where a family calls kernels in a way of its own, these too on one of its layouts."""
    prover, cell = provers(name), parse(layout)
    kernels = [prover.numerics(cell)] if layout == FIRST and name in KERNELS else []
    for _, (quantity, error, limit) in [prover.layout(cell), *kernels]:
        assert error <= limit, f"{name} {layout}: {quantity} is off by {error:.2e}, limit {limit:.2e}"


def test_every_family_runs_on_four_layouts() -> None:
    assert all(sum(case[0] == name for case in CASES) >= EACH for name in JOBS)
