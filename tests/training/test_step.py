"""What step() promises besides being right: it never waits for the host, and it leaves .grad alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megapre.config.schema import Config, DataConfig, ModelConfig, MonitorConfig, OptimizerConfig, PrecisionConfig
from megapre.data.loader import Counts, count
from megapre.parallel.grid import single
from megapre.training.engine import Engine, build
from megapre.verify.cells import Cell, batches, scaled_down

READS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"}


class NoHostReads(TorchDispatchMode):
    """Fails on any operation whose result the host must wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"{name} waits for the device inside step()"
        if name == "_to_copy":
            assert (kwargs or {}).get("device") in (None, torch.device("cpu")), "a copy between devices"
        return func(*args, **(kwargs or {}))


def engine(dtype: str) -> tuple[Config, int, Engine]:
    job = Config(
        model=ModelConfig(dropout=0.1, attention_dropout=0.1),
        optimizer=OptimizerConfig(lr=1e-3),
        precision=PrecisionConfig(dtype=dtype),
        monitor=MonitorConfig(activation_rms=True),
    )
    config, vocab_size = scaled_down(job)
    config = Cell().apply(config)
    return config, vocab_size, build(config, single(), torch.device("cpu"), vocab_size)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_step_never_waits_for_the_host(dtype: str) -> None:
    config, vocab_size, made = engine(dtype)
    batch = batches(config, vocab_size, 1)[0]
    counts = count(batch)
    with NoHostReads():
        result = made.step(batch, counts, 0, 1e-3)
    assert float(result.loss) > 0
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_non_finite_gradient_leaves_weights_and_moments_alone() -> None:
    config, vocab_size, made = engine("fp32")
    batch = batches(config, vocab_size, 1)[0]
    before = [shard.clone() for shard in made.model.flat.weights.shards]
    loss, rms = made.step.compute_gradients(batch, Counts(100), 0)
    made.model.flat.gradients.shards[0][7] = float("nan")
    result = made.step.apply_gradients(loss, rms, 1e-3)
    assert float(result.skipped) == 1 and float(made.step.optimizer.steps) == 0
    assert all(torch.equal(old, new) for old, new in zip(before, made.model.flat.weights.shards))
    assert not any(moment.any() for kind in ("exp_avg", "exp_avg_sq") for moment in made.step.optimizer.state[kind])


def test_activation_rms_is_reported_by_layer() -> None:
    config, vocab_size, made = engine("fp32")
    batch = batches(config, vocab_size, 1)[0]
    result = made.step(batch, Counts(100), 0, 1e-3)
    assert result.rms is not None and result.rms.shape == (config.model.layers,)
    assert bool((result.rms > 0).all())


def test_held_out_losses_are_told_apart_and_add_up() -> None:
    job = Config(
        model=ModelConfig(architecture="encoder", sentence_classes=2, token_types=2),
        data=DataConfig(objective="sentence_order"),
    )
    config, vocab_size = scaled_down(job)
    made = build(Cell().apply(config), single(), torch.device("cpu"), vocab_size)
    batch = batches(config, vocab_size, 1)[0]
    found = {name: float(loss) for name, loss in made.step.held_out(batch, count(batch)).items()}
    assert set(found) == {"loss", "loss/tokens", "loss/sentences"} and min(found.values()) > 0
    assert abs(found["loss"] - found["loss/tokens"] - found["loss/sentences"]) < 1e-5
    assert found["loss"] == float(made.step.evaluate(batch, count(batch)))


def test_evaluation_does_not_change_training() -> None:
    """B49: train, evaluate, train equals train, train bitwise, dropout included."""
    config, vocab_size, _ = engine("fp32")
    made = [engine("fp32")[2] for _ in range(2)]
    steps = batches(config, vocab_size, 2)
    for index, one in enumerate(made):
        one.step(steps[0], Counts(50), 0, 1e-3)
        if index:
            one.step.evaluate(steps[1], Counts(50))
        one.step(steps[1], Counts(50), 1, 1e-3)
    assert all(torch.equal(*both) for both in zip(*(one.model.flat.weights.shards for one in made)))


def test_validation_loss_is_the_training_loss() -> None:
    """The same batch at the same weights, dropout off in validation and left out of the job in training."""
    losses = []
    for dropout in (0.0, 0.3):
        job = Config(model=ModelConfig(dropout=dropout, attention_dropout=dropout))
        config, vocab_size = scaled_down(job)
        made = build(Cell().apply(config), single(), torch.device("cpu"), vocab_size)
        batch = batches(config, vocab_size, 1)[0]
        losses.append(float(made.step.evaluate(batch, count(batch))))
        losses.append(float(made.step(batch, count(batch), 0, 1e-3).loss))
    plain, trained, dropping, dropped = losses
    assert dropping == trained == plain != dropped


def test_the_loss_scale_leaves_no_trace() -> None:
    """An update must not depend on it. Arm B of verify cannot see it: the unsharded run has the same scale."""
    weights = []
    for scale in (256.0, 1024.0):
        config, vocab_size = scaled_down(Config(model=ModelConfig(), precision=PrecisionConfig(dtype="fp16")))
        config = Cell().apply(replace(config, precision=replace(config.precision, initial_loss_scale=scale)))
        made = build(config, single(), torch.device("cpu"), vocab_size)
        result = made.step(batches(config, vocab_size, 1)[0], Counts(50), 0, 1e-2)
        assert not float(result.skipped) and float(result.loss_scale) == scale
        weights.append(torch.cat(made.step.optimizer.state["weight"]))
    assert float((weights[0] - weights[1]).abs().max()) < 1e-4  # a hundredth of the learning rate
