"""Mixtures of experts under every other axis compute the oracle's run, whose experts all see all tokens, masked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from megapre.config.schema import Config, ModelConfig, OptimizerConfig, PrecisionConfig
from megapre.verify.cells import Cell, every, parse
from megapre.verify.run import STEPS, Prover

MIXTRAL = Config(
    model=ModelConfig(
        norm="rmsnorm", activation="swiglu", positions="rope", heads=4, kv_heads=2, bias=False, tied_embeddings=False,
        dropout=0.1, experts=8, experts_per_token=2, router_aux_loss=0.05, router_z_loss=0.01,
    ),
    optimizer=OptimizerConfig(lr=3e-3),
    precision=PrecisionConfig(dtype="bf16"),
)  # fmt: skip
DEEPSEEK = Config(
    model=ModelConfig(
        norm="rmsnorm", activation="swiglu", positions="rope", heads=4, bias=False, experts=8, experts_per_token=3,
        shared_experts=1, moe_dense_first=1, router_scores="sigmoid", router_scale=1.5, router_bias=True,
        router_aux_loss=0.01,
    ),
    optimizer=OptimizerConfig(lr=3e-3, router_bias_rate=0.02),
)  # fmt: skip
SWITCH = Config(
    model=ModelConfig(
        heads=4, bias=False, parallel_block=True, experts=8, experts_per_token=2, moe_every=2, capacity_factor=0.75,
        router_normalize=False, router_aux_loss=0.05,
    ),
    optimizer=OptimizerConfig(lr=3e-3),
    precision=PrecisionConfig(dtype="fp16"),
)  # fmt: skip
JOBS = {"mixtral": MIXTRAL, "deepseek": DEEPSEEK, "switch": SWITCH}

CELLS = [
    ("mixtral", "1x1x1"), ("mixtral", "1x1x2+ep:2"), ("mixtral", "2x1x1+ep:2"), ("mixtral", "1x1x1+ring:2+ep:2"),
    ("mixtral", "2x1x2+ep:2+etp:2+sp+zero1"), ("mixtral", "1x2x2+ep:2+zero1+zb-h1"), ("mixtral", "1x1x4+ep:2+zero3"),
    ("deepseek", "1x1x4+ep:2+zero1"), ("deepseek", "2x2x1+ep:2+sp+interleaved:2"), ("deepseek", "2x2x2+ep:4+sp+zero1"),
    ("switch", "1x1x2+ep:2"), ("switch", "4x1x1+ep:4"), ("switch", "2x1x1+ring:2+ep:4+sp"),
    ("switch", "1x2x2+ep:2+zb-v:2"), ("switch", "2x1x1+ulysses:2+ep:2+etp:2"),
]  # fmt: skip
"""Capacity and dropless, shared experts, biases, losses, with every other axis."""
MORE = [("mixtral", "2x1x1+sp"), ("deepseek", "2x1x2+ep:2+zero1"), ("deepseek", "2x1x2+ep:2+sp+zero2")]
SEED = random.SystemRandom().randrange(10**6)
DRAWN = [(job, cell) for job in JOBS for cell in random.Random(f"{SEED}/{job}").sample(list(every(8, experts=8)), 10)]


@pytest.mark.parametrize(
    ("job", "layout"), [*CELLS, *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in MORE)]
)
def test_experts_agree_with_the_oracle(job: str, layout: str, provers: Callable[[str], Prover]) -> None:
    """The router's own choices in fp64; in the job's format the oracle's, held against the router's (Replay)."""
    prover = provers(job)
    for prove in (prover.layout, prover.numerics):
        report, (name, error, limit) = prove(parse(layout))
        assert error <= limit, f"{job} {layout} {prove.__name__}: {name} is off by {error:.2e}, limit {limit:.2e}"
        assert report.errors["replicas"] == 0 and f"loss/load_balance/{STEPS - 1}" in report.errors
        assert any(name.startswith("bias/") for name in report.errors) == prover.config.model.router_bias


@pytest.mark.nightly
@pytest.mark.parametrize(("job", "cell"), DRAWN, ids=[f"{job}-{index}" for index, (job, _) in enumerate(DRAWN)])
def test_experts_agree_on_drawn_layouts(job: str, cell: Cell, provers: Callable[[str], Prover]) -> None:
    for prove in (provers(job).layout, provers(job).numerics):
        _, (name, error, limit) = prove(cell)
        assert error <= limit, f"{job} {cell} {prove.__name__}: {name} is off by {error:.2e}, {limit=:.2e} {SEED=}"


@pytest.mark.parametrize(
    ("job", "layout", "instrument"),
    [
        ("deepseek", "2x1x2+ep:4+sp+zero1", "fifo"),
        ("switch", "1x2x2+ep:2", "delay"),
        pytest.param("mixtral", "2x1x2+ep:2+etp:2", "delay", marks=pytest.mark.nightly),
        pytest.param("mixtral", "2x1x1+ring:2+ep:2", "fifo", marks=pytest.mark.nightly),
    ],
)
def test_experts_under_strict_queues(
    job: str, layout: str, instrument: str, provers: Callable[[str], Prover]
) -> None:
    _, (name, error, limit) = provers(job).layout(parse(layout), instrument)
    assert error <= limit, f"{job} {layout} under {instrument}: {name} is off by {error:.2e}"


@pytest.mark.parametrize(
    ("job", "layout", "policy"),
    [
        ("deepseek", "1x2x2+ep:2+zb-h1", "full"),
        ("switch", "2x1x1+ep:2", "full"),
        pytest.param("mixtral", "1x1x2+ep:2", "full", marks=pytest.mark.nightly),
        pytest.param("mixtral", "1x1x2+ep:2", "selective", marks=pytest.mark.nightly),
    ],
)
def test_recompute_changes_no_bit_of_experts(
    job: str, layout: str, policy: str, provers: Callable[[str], Prover]
) -> None:
    """Tokens are routed, sent and counted again, and the counts are not added twice (biases are compared)."""
    prover = provers(job)
    kept = prover.layout(parse(layout))[0]
    config = replace(prover.config, parallel=replace(prover.config.parallel, recompute=policy))
    again, (name, error, limit) = prover.layout(parse(layout), config=config)
    assert again.digests == kept.digests
    assert error <= limit, name
