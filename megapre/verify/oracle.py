"""The oracle: the job's model, unsharded, in fp64, written in plain PyTorch with autograd and nothing of the engine.

It shares with the engine only definitions that have tests of their own: the spec's names and initial values, and
the counter-based dropout mask. Everything a layout must not change is computed here the obvious way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Microbatch
from megapre.models import spec
from megapre.models.build import DTYPES
from megapre.models.context import EMBEDDING, site
from megapre.optim.schedule import learning_rate
from megapre.random.philox import normal
from megapre.verify import oracle_encoder_decoder, oracle_moe, oracle_optim, oracle_replaced, oracle_two_stream
from megapre.verify.oracle_block import Dropper, Weights, block, linear, mlp, norm, pointwise
from megapre.verify.oracle_moe import Ledger
from megapre.verify.oracle_positions import sinusoid


@dataclass(frozen=True)
class Truth:
    """What every layout must reproduce."""

    losses: list[float]
    """Mean loss of each step."""
    norms: list[float]
    """Gradient norm of each step, before clipping."""
    gradients: Weights
    """Gradients of the first step, before clipping."""
    parameters: Weights
    """Weights after the last step."""
    ledgers: list[Ledger]
    """What the routers did in each step."""
    biases: Weights
    """Routers' biases after the last step."""


def initial_weights(config: Config, vocab_size: int) -> Weights:
    """Every logical tensor at step 0, rounded to the job's number format as the engine's is, in fp64."""
    dtype = DTYPES[config.precision.dtype]
    weights = {}
    for tensor in spec.tensors(config.model, vocab_size):
        if tensor.init == "normal":
            values = normal(config.train.seed, tensor.name, tensor.shape, (0,) * len(tensor.shape), tensor.shape)
            values = values.mul_(tensor.std)
        else:
            values = torch.full(tensor.shape, 1.0 if tensor.init == "ones" else 0.0)
        weights[tensor.name] = values.to(dtype).double()
    return weights


def train(config: Config, vocab_size: int, batches: Sequence[Sequence[Microbatch]], weights: Weights) -> Truth:
    """Take one optimizer step per batch (a global batch as microbatches) from ``weights``."""
    weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
    decayed = {tensor.name: tensor.decay for tensor in spec.tensors(config.model, vocab_size)}
    o = config.optimizer
    update = oracle_optim.make(o, weights, decayed)
    losses, norms, ledgers = [], [], []
    biases = oracle_moe.initial_biases(config.model)
    first: Weights = {}
    for step, batch in enumerate(batches):
        ledgers.append(Ledger(biases))
        sums = [loss_sums(config, weights, m, step, ledgers[-1]) for m in batch]
        loss = torch.stack([tokens for tokens, _ in sums]).sum() / sum(float(m.weights.sum()) for m in batch)
        others = torch.stack([other for _, other in sums]).sum()
        if config.model.sentence_classes:
            loss = loss + others / sum(float(_labels(m)[1].sum()) for m in batch)
        if config.model.architecture == "replaced_token":
            loss = loss + config.model.detection_loss * others / sum(m.tokens.numel() for m in batch)
        for w in weights.values():
            w.grad = None
        (loss + ledgers[-1].auxiliary / sum(m.tokens.shape[1] for m in batch)).backward()
        oracle_moe.move_biases(ledgers[-1], o.router_bias_rate)
        norm = torch.stack([w.grad.norm() for w in weights.values() if w.grad is not None]).norm()
        if not first:
            first = {name: _gradient(w).clone() for name, w in weights.items()}
        losses.append(float(loss.detach()))
        norms.append(float(norm))
        if o.clip:
            for w in weights.values():
                _gradient(w).mul_(min(1.0, o.clip / float(norm)))
        update(learning_rate(config, step))
    return Truth(losses, norms, first, {name: w.detach() for name, w in weights.items()}, ledgers, biases)


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "a tensor of the spec is not used by the model"
    return weight.grad


def _labels(m: Microbatch) -> tuple[Tensor, Tensor]:
    assert m.labels is not None and m.label_weights is not None
    return m.labels, m.label_weights.double()


def loss_sum(config: Config, w: Weights, m: Microbatch, step: int, ledger: Ledger | None = None) -> Tensor:
    """Sum over the microbatch's target tokens of their cross-entropy, label-smoothed, with the z-loss."""
    return loss_sums(config, w, m, step, ledger)[0]


def loss_sums(
    config: Config, w: Weights, m: Microbatch, step: int | None, ledger: Ledger | None = None
) -> tuple[Tensor, Tensor]:
    """The sums over target tokens and over labelled samples, or over all tokens of a discriminator, of their losses."""
    if config.model.architecture == "replaced_token":
        return _pair_sums(config, w, m, step, ledger)
    x = features(config, w, m, Dropper(config, m, step), ledger)
    sentences = torch.zeros((), dtype=torch.float64)
    if config.model.sentence_classes:
        labels, weights = _labels(m)
        sentences = (F.cross_entropy(classes(w, x), labels, reduction="none") * weights).sum()
    return _token_sum(config, vocabulary(config.model, w, x), m), sentences


def _token_sum(config: Config, scores: Tensor, m: Microbatch) -> Tensor:
    scores, smoothing = scores.flatten(0, 1), config.train.label_smoothing
    losses = F.cross_entropy(scores, m.targets.flatten(), reduction="none", label_smoothing=smoothing)
    losses = losses + config.train.z_loss * scores.logsumexp(-1).square()
    return (losses * m.weights.double().flatten()).sum()


def _pair_sums(
    config: Config, w: Weights, m: Microbatch, step: int | None, ledger: Ledger | None
) -> tuple[Tensor, Tensor]:
    """Generator, what it writes, and the discriminator that reads it."""
    drop = Dropper(config, m, step)
    model, own = oracle_replaced.generator(config.model), oracle_replaced.generators(w)
    scores = logits(replace(config, model=model), own, m, drop)
    text, replaced = oracle_replaced.written(config, m, scores)
    if ledger is not None:
        ledger.choices.setdefault("written", []).append(text)
    told = detection(config, w, replace(m, tokens=text), drop)
    return _token_sum(config, scores, m), oracle_replaced.loss(told, replaced)


def detection(config: Config, w: Weights, m: Microbatch, drop: Dropper | None = None) -> Tensor:
    """The discriminator's logits [seq, batch] of the tokens of ``m``."""
    model = replace(config.model, architecture="encoder")
    x = _encoded(model, w, m, drop or Dropper(config, m, None), None, behind=model.generator_layers + 1)
    return oracle_replaced.told(model, w, x)


def logits(
    config: Config, w: Weights, m: Microbatch, drop: Dropper | None = None, ledger: Ledger | None = None
) -> Tensor:
    """Scores of every token, [seq, batch, vocabulary]; without ``drop``, as the trained model gives them."""
    return vocabulary(config.model, w, features(config, w, m, drop or Dropper(config, m, None), ledger))


def features(config: Config, w: Weights, m: Microbatch, drop: Dropper, ledger: Ledger | None = None) -> Tensor:
    """What the heads read, [seq, batch, hidden]."""
    model = config.model
    if model.architecture == "encoder_decoder":
        return oracle_encoder_decoder.features(config, w, m, drop.step)
    if model.architecture == "two_stream":
        return oracle_two_stream.features(config, w, m, drop.step)
    return _encoded(model, w, m, drop, ledger)


def _encoded(
    model: ModelConfig, w: Weights, m: Microbatch, drop: Dropper, ledger: Ledger | None, behind: int = 0
) -> Tensor:
    """One stack; ``behind`` layers of another, dropout tells them apart."""
    x = embedded(model, w, m, drop, int(behind > 0))
    for index in range(model.layers):
        work = partial(oracle_moe.apply, ledger=ledger) if model.has_experts(index + 1) else mlp
        x = block(model, w, f"blocks.{0 if model.share_layers else index}", behind + index + 1, x, m, drop, work)
    return x if model.norm_placement == "post" else norm(model, w, "head.norm", x)


def embedded(model: ModelConfig, w: Weights, m: Microbatch, drop: Dropper, stream: int = 0) -> Tensor:
    """The first block's input."""
    x = w["embedding.tokens.weight"][m.tokens] * model.embedding_scale
    if model.positions == "learned":
        x = x + w["embedding.positions.weight"][m.positions]
    if model.positions == "sinusoidal":
        x = x + sinusoid(m.positions, x.shape[-1])
    if model.token_types and model.positions != "transformer_xl":
        x = x + w["embedding.types.weight"][torch.zeros_like(m.tokens) if m.token_types is None else m.token_types]
    if model.embedding_norm:
        x = norm(model, w, "embedding.norm", x)
    x = drop(x, model.dropout, site(0, EMBEDDING, stream))
    return linear(w, "embedding.project", x) if "embedding.project.weight" in w else x


def classes(w: Weights, x: Tensor) -> Tensor:
    """Scores of the sentences' classes [batch, classes] from the features."""
    return linear(w, "head.sentence", torch.tanh(linear(w, "head.pooler", x[0])))


def vocabulary(model: ModelConfig, w: Weights, x: Tensor) -> Tensor:
    """Scores of all tokens from the features [..., hidden]."""
    if model.mlm_transform:
        x = norm(model, w, "head.transform_norm", pointwise(model.activation, linear(w, "head.transform", x)))
    output = w["embedding.tokens.weight" if model.tied_embeddings else "head.output.weight"]
    return F.linear(x * model.output_scale, output, w.get("head.output.bias"))
