"""What the layer between generator and discriminator draws and says of it; what its loss counts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megapre.config.check import check
from megapre.config.schema import Config, DataConfig, ModelConfig, MonitorConfig, TrainConfig
from megapre.data.loader import Counts, count
from megapre.models import spec
from megapre.models.context import Context
from megapre.models.replaced_token import Replacement
from megapre.parallel.grid import single
from megapre.random.philox import keep_mask, uniform
from megapre.training.engine import Engine, build
from megapre.verify import oracle
from megapre.verify.cells import batches, join
from tests.training.test_step import NoHostReads

VOCAB = 30
JOB = Config(
    model=ModelConfig(
        architecture="replaced_token", layers=1, generator_layers=1, hidden=16, generator_hidden=8, heads=2, sequence=8,
        vocab_size=VOCAB, mlm_transform=True, init_std=0.4,
    ),
    data=DataConfig(objective="replaced"),
    train=TrainConfig(global_batch=4, microbatch=4, device="cpu"),
)  # fmt: skip


def engine() -> Engine:
    return build(check(JOB, 1), single(), torch.device("cpu"), VOCAB)


def middle(made: Engine) -> Replacement:
    return next(layer for layer in made.model.layers if isinstance(layer, Replacement))


def contexts(made: Engine, training: bool = False) -> list[Context]:
    m = join(batches(JOB, VOCAB, 1)[0])
    return made.step._contexts([m], Counts(1, 0, m.tokens.numel()), 0, False, training=training)


def test_only_hidden_tokens_are_written_and_the_same_token_replaces_nothing() -> None:
    made = engine()
    layer, (ctx,) = middle(made), contexts(made)
    x = torch.randn(8, 4, 8)
    drawn = (ctx.targets + 1) % VOCAB
    drawn[::2] = ctx.targets[::2]
    layer.fill = lambda ctx, x: drawn  # type: ignore[method-assign]
    given: list[Tensor] = []
    layer.embedding.register_forward_pre_hook(lambda module, args: given.append(args[0].tokens))
    _, replaced = layer(ctx, x)
    others = (ctx.weights > 0) & (torch.arange(8) % 2 == 1).unsqueeze(1)
    assert 0 < int(others.sum()) < int((ctx.weights > 0).sum())
    assert torch.equal(replaced.squeeze(-1), others.long())
    assert torch.equal(given[0], torch.where(others, drawn, ctx.targets))


def test_draws_are_the_generators_softmax() -> None:
    """Shares of many draws from one row of features are its probabilities, within five standard deviations."""
    made, seed = engine(), random.randrange(2**32)
    layer = middle(made)
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(seed))
    head = layer.head
    assert head.norm is not None
    with torch.no_grad():
        p = head.output(head.read(head.norm(x)))[..., :VOCAB].flatten().double().softmax(-1)
    many = 20_000
    numbers = uniform(seed, 3, torch.arange(many), torch.arange(1))
    shares = torch.bincount(layer.draw(x.expand(many, 1, 8), numbers).flatten(), minlength=VOCAB) / many
    assert bool(((shares - p).abs() < 5 * (p * (1 - p) / many).sqrt() + 1e-4).all()), f"seed {seed}"


def test_uniform_numbers_are_what_dropout_compares() -> None:
    places, samples = torch.arange(40), torch.tensor([0, 7, 2**40 + 3])
    numbers = uniform(11, 5, places, samples)
    assert numbers.shape == (40, 3) and 0 <= float(numbers.min()) and float(numbers.max()) < 1
    kept = keep_mask(11, 0, [5], places, samples, 0, 1, 0.3)[0].squeeze(-1)
    assert torch.equal(kept, numbers >= 0.3)


def test_what_fills_up_a_validation_does_not_count() -> None:
    made = engine()
    (ctx,) = contexts(made)
    assert ctx.detection_loss is not None
    logits, truth = torch.randn(8, 4), torch.randint(2, (8, 4))
    whole = [
        ctx.detection_loss(logits[:, :n], truth[:, :n], replace(ctx, samples=ctx.samples[:n]), single().tensor)
        for n in (2, 4)
    ]
    padded = ctx.detection_loss(logits, truth, replace(ctx, samples=torch.tensor([0, 1, -1, -1])), single().tensor)
    assert torch.allclose(padded, whole[0]) and not torch.allclose(*whole)


def test_a_held_out_loss_is_told_in_its_parts() -> None:
    """The means over hidden tokens and over all tokens, as the oracle has them; lambda is in the sum alone."""
    made = engine()
    m = join(batches(JOB, VOCAB, 1)[0])
    targets = int(m.weights.sum())
    found = made.step.held_out([m], Counts(targets, 0, m.tokens.numel()))
    weights = oracle.initial_weights(JOB, VOCAB)
    tokens, detection = oracle.loss_sums(JOB, weights, m, None)
    assert float(found["loss/tokens"]) == pytest.approx(float(tokens) / targets, rel=1e-5)
    assert float(found["loss/detection"]) == pytest.approx(float(detection) / m.tokens.numel(), rel=1e-5)
    both = found["loss/tokens"] + 50 * found["loss/detection"]
    assert float(found["loss"]) == pytest.approx(float(both), rel=1e-6)
    assert 0 < float(found["replaced"]) <= targets / m.tokens.numel()


def test_a_step_waits_for_nothing_and_tells_the_size_of_every_block() -> None:
    job = replace(JOB, monitor=MonitorConfig(activation_rms=True))
    made = build(check(job, 1), single(), torch.device("cpu"), VOCAB)
    batch = batches(JOB, VOCAB, 1)[0]
    counts = count(batch)
    with NoHostReads():
        result = made.step(batch, counts, 0, 1e-3)
    assert result.rms is not None and result.rms.shape == (2,) and bool((result.rms > 0).all())


def test_both_read_the_same_embeddings() -> None:
    """The shared tensors are those of the embeddings but for the projections to two widths."""
    model = replace(JOB.model, embedding_size=12, token_types=2, embedding_norm=True)
    specs = {tensor.name: tensor for tensor in spec.tensors(model, VOCAB)}
    shared = {name for name, tensor in specs.items() if tensor.layers == (0, 2)}
    kinds = ("tokens.weight", "positions.weight", "types.weight", "norm.weight", "norm.bias")
    assert shared == {f"embedding.{kind}" for kind in kinds}
    assert specs["generator.embedding.project.weight"].shape == (8, 12)
    assert specs["embedding.project.weight"].shape == (16, 12)
    assert specs["embedding.project.weight"].layers == (2,) and specs["head.detect.weight"].layers == (4,)
    assert len(specs) == len(spec.tensors(model, VOCAB))
