"""What the oracle needs for generator and discriminator (ELECTRA, arXiv 2003.10555) beside a plain encoder.

The draw of a token is written from its definition: walk through the vocabulary until the probabilities add up to more
than the uniform number of (seed, sample, place).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Microbatch
from megapre.models.context import SAMPLE, site
from megapre.random.philox import uniform
from megapre.verify.oracle_block import Weights, linear, pointwise

SHARED = ("embedding.tokens", "embedding.positions", "embedding.types", "embedding.norm")


def generator(model: ModelConfig) -> ModelConfig:
    """An encoder whose heads and MLP are in proportion to its width."""
    width, head = model.generator_hidden, model.head_dim
    return replace(
        model, architecture="encoder", layers=model.generator_layers, hidden=width, head_size=head, kv_heads=0,
        heads=width // head, ffn_hidden=model.n_ffn * width // model.hidden, generator_layers=0,
    )  # fmt: skip


def generators(w: Weights) -> Weights:
    """Its tensors under the names of a single encoder: its own, and the embeddings that both read."""
    own = {name.removeprefix("generator."): value for name, value in w.items() if name.startswith("generator.")}
    return {name: value for name, value in w.items() if name.startswith(SHARED)} | own


def written(config: Config, m: Microbatch, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The text with the generator's tokens in the hidden places, and whether they are others, int64 [seq, batch].

    ``scores`` are the generator's, [seq, batch, vocabulary].
    """
    numbers = uniform(config.train.seed, site(0, SAMPLE), torch.arange(len(m.tokens)), m.samples)
    text = m.targets.clone()
    for place, sample in m.weights.nonzero().tolist():
        sums = scores[place, sample].detach().softmax(-1).cumsum(0)
        text[place, sample] = torch.searchsorted(sums / sums[-1], numbers[place, sample], right=True)
    return text, (text != m.targets).long()


def told(model: ModelConfig, w: Weights, x: Tensor) -> Tensor:
    """The discriminator's logits [seq, batch] of its features: above 0, a token is not that of the text."""
    return linear(w, "head.detect", pointwise(model.activation, linear(w, "head.dense", x))).squeeze(-1)


def loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Sum of the negative log likelihoods of what is true of every token."""
    return -torch.where(truth > 0, F.logsigmoid(logits), F.logsigmoid(-logits)).sum()
