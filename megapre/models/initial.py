"""How far initial weights spread: the standard deviation of a tensor is a function of its name, shape and layer alone.

The values themselves are N(0, std^2) from Philox keyed by (seed, name), so that no layout changes them. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megapre.config.schema import ModelConfig
from megapre.parallel.placement import TensorSpec

RESIDUAL = (".output.weight", ".down.weight")
"""Endings of the matrices of a block whose result enters the residual stream."""

TABLES = (
    "embedding.tokens.weight",
    "embedding.positions.weight",
    "embedding.types.weight",
    "embedding.relative.weight",
    "embedding.query.weight",
    "encoder.embedding.positions.weight",
    "encoder.relative.weight",
    "head.output.weight",
)
OF_HEADS = (".content_bias", ".position_bias", ".segment_bias", ".segment_same", ".segment_other")
"""Endings of what is added to queries or met by them, one vector a head."""
ENCODERS = ("encoder", "discriminator")


def std(model: ModelConfig, spec: TensorSpec) -> float:
    """Standard deviation of the initial values of ``spec`` under ``model.init``."""
    return SCHEMES[model.init](model, spec)


def _enters_residual(spec: TensorSpec) -> bool:
    return "blocks." in spec.name and spec.name.endswith(RESIDUAL)


def _is_table(spec: TensorSpec) -> bool:
    """Whether it is looked up, or is the output layer: no sum over its rows is made."""
    return spec.name in TABLES or spec.name.endswith(OF_HEADS)


def _normal(model: ModelConfig, spec: TensorSpec) -> float:
    """The same everywhere (BERT)."""
    return model.init_std


def _scaled(model: ModelConfig, spec: TensorSpec) -> float:
    """Projections into the residual stream over sqrt(2 L), of L layers (GPT-2)."""
    return model.init_std / math.sqrt(2 * model.layers) if _enters_residual(spec) else model.init_std


def _depth(model: ModelConfig, spec: TensorSpec) -> float:
    """Projections into the residual stream over sqrt(2 l) in layer l (arXiv 1908.11365)."""
    return model.init_std / math.sqrt(2 * spec.layers[0]) if _enters_residual(spec) else model.init_std


def _xavier(model: ModelConfig, spec: TensorSpec) -> float:
    """sqrt(2 / (inputs + outputs)) (Glorot and Bengio, AISTATS 2010)."""
    return model.init_std if _is_table(spec) else math.sqrt(2 / sum(spec.shape))


def _he(model: ModelConfig, spec: TensorSpec) -> float:
    """sqrt(2 / inputs) (arXiv 1502.01852)."""
    return model.init_std if _is_table(spec) else math.sqrt(2 / spec.shape[1])


def _tfixup(model: ModelConfig, spec: TensorSpec) -> float:
    """Xavier, with values, outputs, MLPs and embeddings scaled by the depth (Huang et al., ICML 2020).

    (9 L)^(-1/4) in a decoder, 0.67 L^(-1/4) in an encoder; embeddings have 1 / sqrt(width) before it.
    """
    shrunk = 0.67 * model.layers**-0.25 if model.architecture in ENCODERS else (9 * model.layers) ** -0.25
    if spec.name in ("embedding.tokens.weight", "embedding.positions.weight"):
        return spec.shape[1] ** -0.5 * (9 * model.layers) ** -0.25
    scaled = ".mlp." in spec.name or spec.name.endswith((".attention.v.weight", ".attention.output.weight"))
    return _xavier(model, spec) * (shrunk if scaled and "router" not in spec.name else 1.0)


SCHEMES: dict[str, Callable[[ModelConfig, TensorSpec], float]] = {
    "scaled": _scaled,
    "normal": _normal,
    "depth": _depth,
    "xavier": _xavier,
    "he": _he,
    "tfixup": _tfixup,
}
"""``model.init`` -> standard deviation of a tensor."""
