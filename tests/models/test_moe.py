"""Routers and expert layers alone: choices, ties, weights, capacity, biases."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megapre.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megapre.data.loader import Counts, Microbatch
from megapre.models import moe
from megapre.models.moe import MoE
from megapre.parallel.grid import single
from megapre.training.engine import Engine, build
from megapre.verify import oracle_moe
from megapre.verify.oracle_moe import Ledger

SEED = random.SystemRandom().randrange(10**6)
MODEL = ModelConfig(
    layers=1, hidden=12, heads=2, ffn_hidden=20, sequence=10, bias=False, experts=6, experts_per_token=2
)  # fmt: skip


def made(model: ModelConfig) -> tuple[Engine, MoE]:
    config = Config(
        model=model, parallel=ParallelConfig(data=1), precision=PrecisionConfig(dtype="fp64"),
        optimizer=OptimizerConfig(router_bias_rate=0.25),
    )  # fmt: skip
    engine = build(config, single(), torch.device("cpu"), 17)
    layer = dict(engine.model.numbered())[1]
    assert isinstance(layer.mlp, MoE)
    return engine, layer.mlp


def tensors(engine: Engine, kind: str = "weights") -> dict[str, Tensor]:
    """Views of all local tensors, or of their main gradients, by name."""
    flat = engine.model.flat
    rooms = getattr(flat, kind).rooms
    return {
        slot.spec.name: room.tensor[bucket.place(slot)].view(slot.shape)
        for room, bucket in zip(rooms, flat.layout.buckets)
        for slot in bucket.slots
    }


def microbatch(length: int = 10, batch: int = 3) -> Microbatch:
    tokens = torch.randint(17, (length + 1, batch), generator=torch.Generator().manual_seed(SEED))
    positions = torch.arange(length).unsqueeze(1).expand(length, batch)
    return Microbatch(tokens[:-1], tokens[1:], torch.ones(length, batch), positions, None, torch.arange(batch))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"router_normalize": False}, {"router_scores": "sigmoid", "router_scale": 2.5}, {"experts_per_token": 6},
        {"experts_per_token": 1, "router_normalize": False, "capacity_factor": 1.0}, {"capacity_factor": 0.5},
        {"activation": "swiglu", "shared_experts": 2}, {"router_bias": True, "router_scores": "sigmoid"},
    ],
    ids=str,
)  # fmt: skip
def test_output_is_the_oracles(changes: dict[str, object]) -> None:
    model = replace(MODEL, init_std=0.5, **changes)  # type: ignore[arg-type]
    engine, layer = made(model)
    x = torch.randn(10, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    context = engine.model.context(microbatch(), seed=0, step=0, training=True)
    weights = tensors(engine)
    biases = {}
    if layer.router.bias is not None:
        layer.router.bias.copy_(torch.linspace(-0.5, 0.5, 6))
        biases["blocks.0.mlp"] = layer.router.bias
    expected = oracle_moe.apply(model, weights, "blocks.0.mlp", x, Ledger(biases))
    torch.testing.assert_close(layer(context, x)[0], expected, msg=f"{SEED=}")


def test_equal_scores_go_to_the_lower_number_here_and_in_the_oracle() -> None:
    """A router of zeros: every score is equal, so experts 0 and 1 take every token."""
    engine, layer = made(replace(MODEL, capacity_factor=1.5))
    tensors(engine)["blocks.0.mlp.router.weight"].zero_()
    context = engine.model.context(microbatch(), seed=0, step=0, training=True)
    x = torch.randn(10, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    ids, weights, kept = layer.router(context, x)
    picks = torch.stack(oracle_moe.choose(torch.full((10, 3, 6), 1 / 6), 2), -1)
    assert torch.equal(ids, picks) and bool((ids == torch.tensor([0, 1])).all())
    assert bool((weights == 0.5).all())
    assert kept is not None and kept.sum().item() == 3 * 2 * 5 and bool(kept[:5].all())  # 1.5 x 2 x 10 / 6 = 5 each


def test_normalised_softmax_is_the_softmax_of_the_top_k() -> None:
    """So one setting serves models that take the softmax first and models that take the top k first."""
    engine, layer = made(replace(MODEL, init_std=0.5))
    context = engine.model.context(microbatch(), seed=0, step=0, training=True)
    x = torch.randn(10, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    ids, weights, _ = layer.router(context, x)
    logits = x @ layer.router.weight.T
    torch.testing.assert_close(weights, logits.gather(-1, ids).softmax(-1))


def test_a_later_token_never_drops_an_earlier_one() -> None:
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.rand(12, 4, 5, generator=draw).argsort(-1)[..., :2]
    whole = moe.within_capacity(ids, 5, 3)
    for length in range(1, 12):
        assert torch.equal(moe.within_capacity(ids[:length], 5, 3), whole[:length]), SEED
    for expert in range(5):
        assert int(((ids == expert) & whole).sum((0, 2)).max()) <= 3
        full = ((ids == expert).sum((0, 2))).clamp(max=3)
        assert torch.equal(((ids == expert) & whole).sum((0, 2)), full), SEED


def test_biases_move_towards_balance_and_not_on_a_skipped_step() -> None:
    engine, layer = made(replace(MODEL, router_bias=True))
    bias = layer.router.bias
    assert bias is not None
    batch = [microbatch()]
    loss, rms = engine.step.compute_gradients(batch, Counts(30), 0)
    load = engine.step.routing.table[0, :-2].clone()
    assert float(load.sum()) == 10 * 3 * 2
    engine.step.apply_gradients(loss, rms, 1e-3)
    assert torch.equal(bias, 0.25 * torch.sign(load.mean() - load))
    before = bias.clone()
    loss, rms = engine.step.compute_gradients(batch, Counts(30), 1)
    engine.model.flat.gradients.shards[0][3] = float("inf")
    result = engine.step.apply_gradients(loss, rms, 1e-3)
    assert float(result.skipped) == 1 and torch.equal(bias, before)


def test_capacity_binds_in_training_alone() -> None:
    engine, layer = made(replace(MODEL, capacity_factor=0.01))
    x = torch.randn(10, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    kept = [layer.router(engine.model.context(microbatch(), seed=0, step=0, training=t), x)[2] for t in (True, False)]
    assert kept[1] is None and kept[0] is not None and kept[0].sum() < kept[0].numel()


def test_metrics_of_a_uniform_router_are_the_known_ones() -> None:
    """Equal scores: every share is 1/E, so the load-balance loss is 1; z is log(E)^2; two of six experts get all."""
    engine, _ = made(replace(MODEL, router_aux_loss=0.01))
    tensors(engine)["blocks.0.mlp.router.weight"].zero_()
    result = engine.step([microbatch(), microbatch()], Counts(60), 0, 1e-3)
    routing = {name: float(value) for name, value in result.routing.items()}
    assert routing == pytest.approx({"expert_load": 3.0, "load_balance": 1.0, "router_z": math.log(6) ** 2})
