"""Every tensor of a model: name, logical shape, placement, owning layers, initial values. Torch-free.

Layers are numbered along the pipeline, the embedding first, then the blocks, then the head (final norm and output
layer); `kinds` says what each one is. Initialisation, synchronisation, norm, clip, decay, checkpoint and verify read
only this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from megapre.config.schema import ModelConfig
from megapre.models import initial
from megapre.parallel.placement import Shard, TensorSpec

GENERATOR = "generator."
"""What the names of the generator's own tensors begin with."""


@dataclass(frozen=True)
class Carry:
    """One tensor of the tuple that a layer takes from the one before: [rows of ``stream``, batch, ``width``]."""

    width: int
    """Features."""
    stream: str = "tokens"
    """The field of a microbatch whose positions its rows are."""
    ids: bool = False
    """Whether it holds whole numbers, int64, which have no gradient."""


def kinds(model: ModelConfig) -> tuple[str, ...]:
    """What each layer of the pipeline is, by number: the row of ``build.LAYERS`` that makes it."""
    blocks, encoder = model.layers, model.encoder_layers
    return {
        "decoder": ("embedding", *["block"] * blocks, "head"),
        "encoder": ("embedding", *["block"] * blocks, "head"),
        "encoder_decoder": (
            "pair_embedding", *["encoder_block"] * encoder, *["decoder_block"] * blocks, "decoder_head",
        ),
        "two_stream": ("two_stream_embedding", *["two_stream_block"] * blocks, "two_stream_head"),
        "replaced_token": (
            "generator_embedding", *["block"] * model.generator_layers, "replacement",
            *["detector_block"] * blocks, "detector",
        ),
        "discriminator": ("embedding", *["detector_block"] * blocks, "detector"),
    }[model.architecture]  # fmt: skip


def blocks(model: ModelConfig) -> list[int]:
    """Numbers of the layers that are blocks: what stages share out, and what recomputation applies to."""
    return [number for number, kind in enumerate(kinds(model)) if kind.endswith("block")]


def carried(model: ModelConfig, layer: int) -> tuple[Carry, ...]:
    """What ``layer`` takes from the layer before it; the first takes nothing."""
    if model.generator_layers and layer <= model.generator_layers + 1:
        return carried(model.generator, layer)
    target = Carry(model.hidden)
    both = (Carry(model.hidden, "source"), target)
    takes = {"encoder_block": both, "decoder_block": both, "decoder_head": both}
    takes |= dict.fromkeys(("detector_block", "detector"), (target, Carry(1, ids=True)))
    takes |= {"two_stream_block": (target, target), "two_stream_head": (target, target)}
    return takes.get(kinds(model)[layer], (target,)) if layer else ()


def stack(model: ModelConfig, layer: int) -> tuple[ModelConfig, str]:
    """The single-stream model that block ``layer`` is like, and what the names of its tensors begin with."""
    encoder, generator = model.encoder_layers, model.generator_layers
    if generator:
        if layer <= generator:
            like, name = stack(model.generator, layer)
            return like, GENERATOR + name
        return stack(model.discriminator, layer - generator - 1)
    if not encoder:
        return model, "blocks.0" if model.share_layers else f"blocks.{layer - 1}"
    if layer <= encoder:
        return encoder_of(model), f"encoder.blocks.{layer - 1}"
    return replace(model, architecture="decoder"), f"blocks.{layer - encoder - 1}"


def encoder_of(model: ModelConfig) -> ModelConfig:
    """The encoder of an encoder-decoder model as a model of its own."""
    return replace(model, architecture="encoder", layers=model.encoder_layers, sequence=model.source_sequence)


def tensors(model: ModelConfig, vocab_size: int, tensor_ranks: int = 1) -> list[TensorSpec]:
    """All logical tensors of ``model``, in layer order; ``fused`` neighbours are adjacent.

    ``vocab_size`` is the number of real token ids; ``tensor_ranks`` decides how key/value heads are replicated.
    """
    if model.generator_layers:
        return _pair(model, vocab_size, tensor_ranks)
    specs = _embedding(model, vocab_size)
    for layer in blocks(model)[: 1 if model.share_layers else None]:
        specs += _block(*stack(model, layer), layer, tensor_ranks)
        if layer > model.encoder_layers > 0:
            specs += _cross(*stack(model, layer), layer, tensor_ranks)
    if model.encoder_layers:
        specs += _encoder(model)
    specs += _head(model, vocab_size)
    return [replace(spec, std=initial.std(model, spec)) if spec.init == "normal" else spec for spec in specs]


def _pair(model: ModelConfig, vocab_size: int, tensor_ranks: int) -> list[TensorSpec]:
    """Generator and discriminator: the layer that ends the one begins the other, and both read the same embeddings.

    What the generator has for itself is called as in a model of its own, behind `GENERATOR`.
    """
    middle = model.generator_layers + 1
    generator = tensors(model.generator, vocab_size, tensor_ranks)
    discriminator = tensors(model.discriminator, vocab_size, tensor_ranks)
    specs = []
    for spec in generator:
        users = (*spec.layers, middle) if both_read(spec.name) and middle not in spec.layers else spec.layers
        specs.append(replace(spec, layers=users, name=spec.name if both_read(spec.name) else GENERATOR + spec.name))
    own = [spec for spec in discriminator if not both_read(spec.name)]
    return specs + [replace(spec, layers=tuple(middle + layer for layer in spec.layers)) for spec in own]


def both_read(name: str) -> bool:
    """Whether generator and discriminator share this tensor: all embeddings, but for what depends on their widths."""
    return name.startswith("embedding.") and not name.startswith(("embedding.project", "embedding.relative"))


def _embedding(model: ModelConfig, vocab_size: int) -> list[TensorSpec]:
    width = model.n_embedding
    users = (0, len(kinds(model)) - 1) if model.tied_embeddings else (0,)
    specs = [TensorSpec("embedding.tokens.weight", (vocab_size, width), Shard(0), users, decay=True)]
    if model.positions == "learned":
        specs.append(TensorSpec("embedding.positions.weight", (model.sequence, width)))
    if model.architecture == "two_stream":
        specs.append(TensorSpec("embedding.query.weight", (1, width)))
    if model.token_types and model.positions != "transformer_xl":
        specs.append(TensorSpec("embedding.types.weight", (model.token_types, width)))
    if model.embedding_norm:
        specs += _norm(model, "embedding.norm", 0, width)
    if width != model.hidden:
        specs += _dense("embedding.project", (model.hidden, width), 0, model.bias)
    if model.positions == "t5":
        shape = (model.relative_buckets, model.heads)
        readers = tuple(layer for layer in blocks(model) if layer > model.encoder_layers)
        specs.append(TensorSpec("embedding.relative.weight", shape, Shard(1), readers))
    return specs


def _encoder(model: ModelConfig) -> list[TensorSpec]:
    """What the encoder beside a decoder has of its own, but for its blocks; its final norm is its last block's."""
    specs, layers = [], model.encoder_layers
    if model.positions == "learned":
        specs.append(TensorSpec("encoder.embedding.positions.weight", (model.source_sequence, model.n_embedding)))
    if model.embedding_norm:
        specs += _norm(model, "encoder.embedding.norm", 0)
    if model.positions == "t5":
        shape = (model.relative_buckets, model.heads)
        specs.append(TensorSpec("encoder.relative.weight", shape, Shard(1), tuple(range(1, layers + 1))))
    if model.norm_placement == "pre":
        specs += _norm(model, "encoder.norm", layers)
    return specs


def _head(model: ModelConfig, vocab_size: int) -> list[TensorSpec]:
    layer, hidden = len(kinds(model)) - 1, model.hidden
    width = model.n_embedding if model.mlm_transform else hidden
    specs = _norm(model, "head.norm", layer) if model.norm_placement == "pre" else []
    if model.architecture == "discriminator":
        return specs + _dense("head.dense", (hidden, hidden), layer) + _dense("head.detect", (1, hidden), layer)
    if model.mlm_transform:
        specs += _dense("head.transform", (width, hidden), layer)
        specs += _norm(model, "head.transform_norm", layer, width)
    if model.sentence_classes:
        specs += _dense("head.pooler", (hidden, hidden), layer)
        specs += _dense("head.sentence", (model.sentence_classes, hidden), layer)
    if not model.tied_embeddings:
        specs.append(TensorSpec("head.output.weight", (vocab_size, width), Shard(0), (layer,), decay=True))
    if model.has_output_bias:
        specs.append(TensorSpec("head.output.bias", (vocab_size,), Shard(0), (layer,), init="zeros"))
    return specs


def _dense(name: str, shape: tuple[int, int], layer: int, bias: bool = True) -> list[TensorSpec]:
    """A linear layer [out, in] that every tensor rank holds whole."""
    weight = TensorSpec(f"{name}.weight", shape, layers=(layer,), decay=True)
    return [weight, TensorSpec(f"{name}.bias", shape[:1], layers=(layer,), init="zeros")] if bias else [weight]


def shared(model: ModelConfig) -> set[tuple[int, ...]]:
    """The layers of every tensor that several layers own."""
    return {spec.layers for spec in tensors(model, 1) if len(spec.layers) > 1}


def kv_copies(model: ModelConfig, tensor_ranks: int) -> int:
    """Tensor ranks that hold each key/value head."""
    return max(1, tensor_ranks // model.n_kv_heads)


def stages(model: ModelConfig, count: int, layers_per_stage: list[int]) -> list[range]:
    """Layer numbers of each of ``count`` stages; the first also holds the embedding, the last the head.

    Blocks are spread as evenly as possible when ``layers_per_stage`` is empty; the stages in the middle take
    the odd ones, since the first and the last have the vocabulary to carry.
    """
    numbers = blocks(model)
    counts = layers_per_stage or _spread(len(numbers), count)
    bounds = [0, *(numbers[first] for first in accumulate(counts[:-1])), len(kinds(model))]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _spread(layers: int, count: int) -> list[int]:
    counts = [layers // count] * count
    middle_first = sorted(range(count), key=lambda stage: (stage in (0, count - 1), stage == count - 1))
    for stage in middle_first[: layers % count]:
        counts[stage] += 1
    return counts


def _norm(model: ModelConfig, name: str, layer: int, width: int = 0) -> list[TensorSpec]:
    return _norm_of(model, TensorSpec(f"{name}.weight", (width or model.hidden,), layers=(layer,), init="ones"))


def _norm_of(model: ModelConfig, weight: TensorSpec) -> list[TensorSpec]:
    """The tensors of the norm whose weight is ``weight``."""
    if model.norm == "rmsnorm":
        return [weight]
    return [weight, replace(weight, name=weight.name.removesuffix("weight") + "bias", init="zeros")]


def _block(model: ModelConfig, name: str, layer: int, tensor_ranks: int) -> list[TensorSpec]:
    hidden = model.hidden
    owner = tuple(range(1, model.layers + 1)) if model.share_layers else (layer,)
    q_width, kv_width = model.heads * model.head_dim, model.n_kv_heads * model.head_dim
    kv = Shard(0, kv_copies(model, tensor_ranks))
    specs = []
    for norm in ("attention_norm",) if model.parallel_block else ("attention_norm", "mlp_norm"):
        specs += [replace(spec, layers=owner) for spec in _norm(model, f"{name}.{norm}", layer)]
    specs += [
        TensorSpec(f"{name}.{part}.bias", (hidden,), layers=owner, init="zeros")
        for part, there in (("attention.output", model.bias), ("mlp.down", model.has_mlp_bias))
        if there
    ]
    if model.positions == "transformer_xl":
        specs += _distances(model, f"{name}.attention", owner)
    if model.qk_norm:
        for part in ("q_norm", "k_norm"):
            path = f"{name}.attention.{part}.weight"
            specs += _norm_of(model, TensorSpec(path, (model.head_dim,), layers=owner, init="ones", spread=True))

    def matrices(parts: list[tuple[str, int, Shard]], width: int, bias: bool) -> list[TensorSpec]:
        """Weights [out, in] of parts that one fused matrix holds, then their biases."""
        rows = [
            TensorSpec(f"{name}.{part}.weight", (rows, width), placement, owner, decay=True)
            for part, rows, placement in parts
        ]
        biases = [
            TensorSpec(f"{name}.{part}.bias", (rows,), placement, owner, init="zeros")
            for part, rows, placement in parts
            if bias
        ]
        return _fuse(rows) + _fuse(biases)

    columns = [("attention.q", q_width, Shard(0)), ("attention.k", kv_width, kv), ("attention.v", kv_width, kv)]
    specs += matrices(columns, hidden, model.has_qkv_bias)
    specs.append(
        TensorSpec(f"{name}.attention.output.weight", (hidden, q_width), Shard(1), owner, decay=True)
    )
    mlps = {"mlp": model.n_ffn}
    if model.has_experts(layer):
        specs += _experts(model, f"{name}.mlp", owner)
        width = model.shared_experts * model.n_expert_hidden
        mlps = {"mlp.shared": width} if width else {}
    for mlp, width in mlps.items():
        parts = [(f"{mlp}.{part}", width, Shard(0)) for part in up_parts(model)]
        specs += matrices(parts, hidden, model.has_mlp_bias)
        specs.append(
            TensorSpec(f"{name}.{mlp}.down.weight", (hidden, width), Shard(1), owner, decay=True)
        )
    return specs


def _distances(model: ModelConfig, name: str, owner: tuple[int, ...]) -> list[TensorSpec]:
    """What a block's scores know of distances and segments: the matrix of distances, biases of the heads' queries."""
    parts = ["content_bias", "position_bias"]
    if model.token_types:
        parts += ["segment_bias", "segment_same", "segment_other"]
    heads = (model.heads, model.head_dim)
    matrix = TensorSpec(f"{name}.distance.weight", (model.heads * model.head_dim, model.hidden), Shard(0), owner)
    return [replace(matrix, decay=True), *(TensorSpec(f"{name}.{part}", heads, Shard(0), owner) for part in parts)]


def _cross(model: ModelConfig, name: str, layer: int, tensor_ranks: int) -> list[TensorSpec]:
    """Norm and cross-attention of a decoder block: q of the target, k and v side by side of the encoder's output."""
    hidden, owner, path = model.hidden, (layer,), f"{name}.cross."
    q_width, kv_width = model.heads * model.head_dim, model.n_kv_heads * model.head_dim
    kv = Shard(0, kv_copies(model, tensor_ranks))
    specs = _norm(model, f"{name}.cross_norm", layer)
    specs.append(TensorSpec(f"{path}output.weight", (hidden, q_width), Shard(1), owner, decay=True))
    if model.bias:
        specs.append(TensorSpec(f"{path}output.bias", (hidden,), layers=owner, init="zeros"))
    for parts in ((("q", q_width, Shard(0)),), (("k", kv_width, kv), ("v", kv_width, kv))):
        rows = [
            TensorSpec(f"{path}{part}.weight", (rows, hidden), place, owner, decay=True) for part, rows, place in parts
        ]
        biases = [TensorSpec(f"{path}{part}.bias", (rows,), place, owner, init="zeros") for part, rows, place in parts]
        specs += _fuse(rows) + (_fuse(biases) if model.has_qkv_bias else [])
    return specs


def up_parts(model: ModelConfig) -> tuple[str, ...]:
    """What an MLP applies to its input, side by side in one matrix."""
    return ("gate", "up") if model.gated else ("up",)


def _experts(model: ModelConfig, name: str, owner: tuple[int, ...]) -> list[TensorSpec]:
    """The router, then the experts' first matrices, expert by expert, then their second ones."""
    hidden, width = model.hidden, model.n_expert_hidden
    router = TensorSpec(
        f"{name}.router.weight", (model.experts, hidden), layers=owner, decay=True, spread=True
    )

    def of(expert: int, part: str, shape: tuple[int, int], dim: int) -> TensorSpec:
        path = f"{name}.experts.{expert}.{part}.weight"
        return TensorSpec(path, shape, Shard(dim), owner, decay=True, expert=expert)

    every = range(model.experts)
    ups = [of(e, part, (width, hidden), 0) for e in every for part in up_parts(model)]
    return [router, *_fuse(ups + [of(e, "down", (hidden, width), 1) for e in every])]


def _fuse(specs: list[TensorSpec]) -> list[TensorSpec]:
    return [replace(spec, fused=True) for spec in specs[:-1]] + specs[-1:]
