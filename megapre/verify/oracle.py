"""The oracle: the job's model, unsharded, in fp64, written in plain PyTorch with autograd and nothing of the engine.

It shares with the engine only definitions that have tests of their own: the spec's names and initial values, and
the counter-based dropout mask. Everything a layout must not change is computed here the obvious way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Microbatch
from megapre.models import spec
from megapre.models.build import DTYPES
from megapre.models.context import ATTENTION, EMBEDDING, MLP, WEIGHTS, site
from megapre.optim.schedule import learning_rate
from megapre.random.philox import keep_mask, normal
from megapre.verify import oracle_moe
from megapre.verify.oracle_moe import Ledger

Weights = dict[str, Tensor]


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
    groups = [
        {"params": [w for name, w in weights.items() if decayed[name] == decay], "weight_decay": rate}
        for decay, rate in ((True, o.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    losses, norms, ledgers = [], [], []
    biases = oracle_moe.initial_biases(config.model)
    first: Weights = {}
    for step, batch in enumerate(batches):
        count = sum(float(m.weights.sum()) for m in batch)
        total = torch.zeros((), dtype=torch.float64)
        ledgers.append(Ledger(biases))
        for m in batch:
            total = total + loss_sum(config, weights, m, step, ledgers[-1])
        loss = total / count
        optimizer.zero_grad()
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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
    return Truth(losses, norms, first, {name: w.detach() for name, w in weights.items()}, ledgers, biases)


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "a tensor of the spec is not used by the model"
    return weight.grad


def loss_sum(config: Config, w: Weights, m: Microbatch, step: int, ledger: Ledger | None = None) -> Tensor:
    """Sum over the microbatch's target tokens of their cross-entropy, label-smoothed, with the z-loss."""
    scores = logits(config, w, m, _Dropper(config, m, step), ledger).flatten(0, 1)
    smoothing = config.train.label_smoothing
    losses = F.cross_entropy(scores, m.targets.flatten(), reduction="none", label_smoothing=smoothing)
    losses = losses + config.train.z_loss * scores.logsumexp(-1).square()
    return (losses * m.weights.double().flatten()).sum()


def logits(
    config: Config, w: Weights, m: Microbatch, drop: _Dropper | None = None, ledger: Ledger | None = None
) -> Tensor:
    """Scores of every next token, [seq, batch, vocabulary]; without ``drop``, as the trained model gives them."""
    model = config.model
    if drop is None:
        drop = _Dropper(config, m, None)
    x = w["embedding.tokens.weight"][m.tokens]  # [seq, batch, hidden]
    if model.positions == "learned":
        x = x + w["embedding.positions.weight"][m.positions]
    x = drop(x, model.dropout, site(0, EMBEDDING))
    for index in range(model.layers):
        mlp = partial(oracle_moe.apply, ledger=ledger) if model.has_experts(index + 1) else _mlp
        x = _block(model, w, f"blocks.{index}", index + 1, x, m, drop, mlp)
    x = _norm(model, w, "head.norm", x)
    output = w["embedding.tokens.weight" if model.tied_embeddings else "head.output.weight"]
    return x @ output.T


def _block(
    model: ModelConfig,
    w: Weights,
    name: str,
    layer: int,
    x: Tensor,
    m: Microbatch,
    drop: _Dropper,
    mlp: Callable[[ModelConfig, Weights, str, Tensor], Tensor],
) -> Tensor:
    h = _norm(model, w, f"{name}.attention_norm", x)
    attended = drop(_attention(model, w, f"{name}.attention", layer, h, m, drop), model.dropout, site(layer, ATTENTION))
    if model.parallel_block:
        return x + attended + drop(mlp(model, w, f"{name}.mlp", h), model.dropout, site(layer, MLP))
    x = x + attended
    h = _norm(model, w, f"{name}.mlp_norm", x)
    return x + drop(mlp(model, w, f"{name}.mlp", h), model.dropout, site(layer, MLP))


def _norm(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    if model.norm == "rmsnorm":
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + model.norm_eps) * w[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], model.norm_eps)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _mlp(model: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    up = _linear(w, f"{name}.up", x)
    if model.activation == "swiglu":
        up = F.silu(_linear(w, f"{name}.gate", x)) * up
    else:
        up = F.gelu(up, approximate="tanh")
    return _linear(w, f"{name}.down", up)


def _attention(
    model: ModelConfig, w: Weights, name: str, layer: int, x: Tensor, m: Microbatch, drop: _Dropper
) -> Tensor:
    length, batch, _ = x.shape
    q, k, v = (
        _linear(w, f"{name}.{part}", x).view(length, batch, heads, model.head_dim).permute(1, 2, 0, 3)
        for part, heads in (("q", model.heads), ("k", model.n_kv_heads), ("v", model.n_kv_heads))
    )  # [batch, heads, seq, head_dim]
    if model.positions == "rope":
        q, k = (_rope(model, part, m.positions) for part in (q, k))
    repeat = model.heads // model.n_kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) / model.head_dim**0.5
    visible = torch.ones(batch, length, length, dtype=torch.bool)
    if model.architecture == "decoder":
        visible = visible.tril()
    if m.segments is not None:
        documents = m.segments.T
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    probabilities = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    probabilities = drop.attention(probabilities, model.attention_dropout, layer)
    mixed = (probabilities @ v).permute(2, 0, 1, 3).reshape(length, batch, -1)
    return _linear(w, f"{name}.output", mixed)


def _rope(model: ModelConfig, x: Tensor, positions: Tensor) -> Tensor:
    """Rotate the pair (i, i + d/2) by position x theta^(-2i/d)."""
    half = model.head_dim // 2
    frequencies = model.rope_theta ** (-torch.arange(half, dtype=torch.float64) * 2 / model.head_dim)
    turns = torch.polar(torch.ones(()).double(), positions.T[:, None, :, None] * frequencies)
    rotated = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat((rotated.real, rotated.imag), -1)


class _Dropper:
    """Applies the counter-based masks of ``step`` to unsharded tensors; none when there is no step."""

    def __init__(self, config: Config, m: Microbatch, step: int | None) -> None:
        self.seed, self.step, self.samples = config.train.seed, step, m.samples
        self.rows = torch.arange(m.tokens.shape[0])

    def __call__(self, x: Tensor, probability: float, place: int) -> Tensor:
        """Drop features of [seq, batch, hidden]."""
        if not probability or self.step is None:
            return x
        keep = keep_mask(self.seed, self.step, [place], self.rows, self.samples, 0, x.shape[-1], probability)[0]
        return x * keep / (1 - probability)

    def attention(self, x: Tensor, probability: float, layer: int) -> Tensor:
        """Drop weights of [batch, heads, query, key]."""
        if not probability or self.step is None:
            return x
        sites = [site(layer, WEIGHTS, head) for head in range(x.shape[1])]
        keep = keep_mask(self.seed, self.step, sites, self.rows, self.samples, 0, x.shape[-1], probability)
        return x * keep.permute(2, 0, 1, 3) / (1 - probability)
