"""A larger model made of a smaller one's tensors, such that both compute the same.

Width: every feature of the smaller model stands in the larger one several times, and whatever sums over features
divides each by its copies (Net2Net, arXiv 1511.05641; bert2BERT, arXiv 2110.07143; HyperCloning, arXiv 2409.12903). The
mean square of repeated features is that of the features, so norms are repeated too. Depth: a new block begins as a copy
of the one below it whose projections into the residual stream are zero (arXiv 2401.02415), or blocks are repeated as a
stack (Gong et al., ICML 2019), which changes what is computed.

Which key of [model] decides which dimension is read off the spec: the dimensions that move when the key does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megapre.config.schema import ModelConfig
from megapre.models import initial
from megapre.models.spec import tensors
from megapre.random.philox import normal

ARCHITECTURES = ("decoder", "encoder", "encoder_decoder", "two_stream")
DEPTHS = ("identity", "stack")
WIDTHS = ("hidden", "embedding_size", "heads", "kv_heads", "ffn_hidden", "expert_hidden")
GROWING = frozenset((*WIDTHS, "layers", "encoder_layers", "output_scale"))
FREE = frozenset(
    {
        "vocab_size", "sequence", "source_sequence", "dropout", "attention_dropout", "init", "init_std",
        "capacity_factor", "router_aux_loss", "router_z_loss",
    }
)  # fmt: skip
"""Settings that say how a model trains, not what its weights mean; the lengths only without learned positions."""
FAR = 1 << 40
"""A width that no model has."""
BLOCK = re.compile(r"((?:encoder\.)?)blocks\.(\d+)\.(.*)")
OF_RESIDUAL = (".output.weight", ".output.bias", ".down.weight", ".down.bias")
"""Endings of what a block's sub-layers add to the residual stream by."""


@dataclass(frozen=True)
class Growth:
    """How one tensor of the larger model is made of one of the smaller model."""

    name: str
    shape: tuple[int, ...]
    source: str
    """Tensor of the smaller model."""
    index: tuple[tuple[int, ...], ...]
    """By dimension: which row of the source each row is a copy of."""
    summed: bool
    """Whether a product sums over the last dimension, so that copies share their value."""
    factor: float = 1.0

    def of(self, value: Tensor, noise: float = 0.0, seed: int = 0) -> Tensor:
        """The tensor, in the number format of ``value``, which is the source; computed in fp64.

        ``noise``: standard deviation, over the tensor's root mean square, of what is added to the shares of copies and
        cancels in their sum, so that copies learn different things; a function of (seed, name).
        """
        grown = value.double() * self.factor
        for dim, index in enumerate(self.index):
            grown = grown.index_select(dim, torch.tensor(index))
        if self.summed:
            place = torch.tensor(self.index[-1])
            copies = torch.bincount(place)
            grown /= copies[place]
            if noise and len(place) > len(copies):
                drawn = normal(seed, f"grow/{self.name}", self.shape, (0, 0), self.shape).double()
                mean = torch.zeros(len(grown), len(copies), dtype=drawn.dtype).index_add_(1, place, drawn) / copies
                grown += (drawn - mean[:, place]) * (noise * grown.square().mean().sqrt())
        return grown.to(value.dtype)


def growths(small: ModelConfig, large: ModelConfig, vocab_size: int, depth: str = "identity") -> list[Growth]:
    """Every tensor of ``large`` as a growth of one of ``small``, in the order of the spec.

    ``depth`` is one of DEPTHS. Raises ValueError naming the keys of what cannot grow (exactly, unless it is a stack).
    """
    small, large = _explicit(small), _explicit(large)
    _refuse(small, large, depth)
    old = {spec.name: spec.shape for spec in tensors(small, vocab_size)}
    keys, heads = _keys(small, vocab_size), _heads(small, large)
    counts = {"": (small.layers, large.layers), "encoder.": (small.encoder_layers, large.encoder_layers)}
    factors = _output_factors(small, large)
    found = []
    for spec in tensors(large, vocab_size):
        source, factor = spec.name, factors.get(spec.name, 1.0)
        block = BLOCK.fullmatch(spec.name)
        if block and not small.share_layers:
            number, new = _source_block(int(block[2]), *counts[block[1]], depth)
            source = f"{block[1]}blocks.{number}.{block[3]}"
            factor = 0.0 if new and spec.name.endswith(OF_RESIDUAL) else factor
        if source not in old:
            raise ValueError(
                f"{spec.name} would be made of {source}, which the smaller model does not have: keep the order of "
                f"blocks with and without experts (model.moe_every, model.moe_dense_first) or the number of layers."
            )
        index = tuple(_copies(*args, heads) for args in zip(keys[source], old[source], spec.shape))
        table = spec.name in initial.TABLES and spec.name != "head.output.weight"
        found.append(Growth(spec.name, spec.shape, source, index, len(spec.shape) == 2 and not table, factor))
    return found


def _explicit(model: ModelConfig) -> ModelConfig:
    """``model`` with its widths written out; ``embedding_size`` stays 0 where it follows ``hidden``."""
    return replace(
        model, head_size=model.head_dim, kv_heads=model.n_kv_heads, ffn_hidden=model.n_ffn,
        expert_hidden=model.n_expert_hidden,
    )  # fmt: skip


def _keys(model: ModelConfig, vocab_size: int) -> dict[str, list[str]]:
    """By tensor and dimension, the key of WIDTHS that decides its length; empty for one that does not grow."""
    shapes = {spec.name: spec.shape for spec in tensors(model, vocab_size)}
    keys = {name: [""] * len(shape) for name, shape in shapes.items()}
    for key in WIDTHS:
        far: dict[str, Any] = {key: FAR}
        for spec in tensors(replace(model, **far), vocab_size) if getattr(model, key) else []:
            for dim, (before, after) in enumerate(zip(shapes.get(spec.name, ()), spec.shape)):
                if before != after:
                    keys[spec.name][dim] = key
    return keys


def _copies(key: str, old: int, new: int, heads: dict[str, list[int]]) -> tuple[int, ...]:
    """Which of ``old`` rows each of ``new`` rows is a copy of."""
    if key not in heads:
        return tuple(row % old for row in range(new))
    size = new // len(heads[key])  # features of a head, or 1 where there is one value for each
    return tuple(head * size + feature for head in heads[key] for feature in range(size))


def _heads(small: ModelConfig, large: ModelConfig) -> dict[str, list[int]]:
    """Which head each query head and each key/value head is a copy of: a query keeps the keys that it reads."""
    group, new_group = small.heads // small.kv_heads, large.heads // large.kv_heads
    kv_heads = [head % small.kv_heads for head in range(large.kv_heads)]
    heads, taken = [], [0] * small.kv_heads
    for source in kv_heads:
        for _ in range(new_group):
            heads.append(source * group + taken[source] % group)
            taken[source] += 1
    if set(heads) != set(range(small.heads)):
        raise ValueError(
            f"model.heads = {large.heads} over model.kv_heads = {large.kv_heads} has no place for each of the "
            f"{small.heads} heads over {small.kv_heads} beside the keys that it reads: raise model.heads."
        )
    return {"heads": heads, "kv_heads": kv_heads}


def _source_block(number: int, old: int, new: int, depth: str) -> tuple[int, bool]:
    """The block that block ``number`` of ``new`` is made of, and whether it is a new one that adds nothing yet."""
    if depth == "stack":
        return number % old, False
    source = number * old // new
    return source, number > 0 and (number - 1) * old // new == source


def _output_factors(small: ModelConfig, large: ModelConfig) -> dict[str, float]:
    """Factors that leave the logits as they are.

    An output layer that is the token embedding sums over repeated features that no division has made smaller: what
    ``model.output_scale`` leaves of the division falls to the norm in front of it.
    """
    transform = small.mlm_transform
    width, new_width = ((m.n_embedding if transform else m.hidden) for m in (small, large))
    factor = small.output_scale / large.output_scale
    if not small.tied_embeddings:
        return {"head.output.weight": factor}
    factor *= width / new_width
    if abs(factor - 1) <= 1e-9:
        return {}
    if not transform and small.norm_placement == "post":
        raise ValueError(
            f"model.tied_embeddings sums the logits over {new_width // width} copies of each feature, and no norm is "
            f"before the output layer: set model.output_scale = {large.output_scale * factor!r}."
        )
    norm = "head.transform_norm" if transform else "head.norm"
    factors = {f"{norm}.weight": factor, f"{norm}.bias": factor}
    # The sentence's head reads the last norm too.
    return factors if transform else factors | {"head.pooler.weight": 1 / factor}


def _refuse(small: ModelConfig, large: ModelConfig, depth: str) -> None:
    """ValueError for what growth cannot keep."""
    if depth not in DEPTHS:
        raise ValueError(f"depth = {depth!r} is unknown; blocks are added as {' or '.join(DEPTHS)}.")
    if small.architecture not in ARCHITECTURES:
        raise ValueError(
            f"model.architecture = {small.architecture!r} does not grow; {', '.join(ARCHITECTURES)} do."
        )
    free = FREE - ({"sequence", "source_sequence"} if small.positions == "learned" else set())
    fixed = [field.name for field in fields(ModelConfig) if field.name not in GROWING | free]
    changed = [name for name in fixed if getattr(small, name) != getattr(large, name)]
    if bool(small.embedding_size) != bool(large.embedding_size):
        changed.append("embedding_size")
    if changed:
        told = "; ".join(f"model.{n} = {getattr(small, n)!r}, here {getattr(large, n)!r}" for n in changed)
        raise ValueError(f"growth keeps what the smaller model has of {told}: set the same.")
    for name in sorted(GROWING - {"output_scale"}):
        before, after = getattr(small, name), getattr(large, name)
        if after < before:
            raise ValueError(f"model.{name} = {after} is less than the smaller model's {before}: raise it.")
    for name in ("hidden", "embedding_size"):
        before, after = getattr(small, name), getattr(large, name)
        if before and after % before:
            raise ValueError(
                f"model.{name} = {after} is no multiple of the smaller model's {before}: a norm stays the same only "
                f"where all features have equally many copies."
            )
    width = {"sinusoidal": "n_embedding", "transformer_xl": "hidden"}.get(small.positions, "")
    if width and getattr(small, width) != getattr(large, width):
        raise ValueError(
            f"model.positions = {small.positions!r} are other sinusoids at a width of {getattr(large, width)} than of "
            f"{getattr(small, width)}: only depth, heads and MLPs can grow."
        )
    if small.positions == "alibi" and small.heads != large.heads:
        raise ValueError(
            f"model.positions = 'alibi' has other slopes for {large.heads} heads than for {small.heads}: keep "
            f"model.heads."
        )
    if small.router_bias:
        raise ValueError("model.router_bias is no weight, so a run that starts from weights alone is without it.")
    deeper = (small.layers, small.encoder_layers) != (large.layers, large.encoder_layers)
    if deeper and small.share_layers:
        raise ValueError("model.share_layers uses one block model.layers times: more times is another model.")
    if deeper and depth == "identity" and small.norm_placement == "post":
        raise ValueError(
            "model.norm_placement = 'post' norms what passes through a new block, which is no identity: stack the "
            "blocks instead, which changes what is computed, or keep model.layers."
        )

