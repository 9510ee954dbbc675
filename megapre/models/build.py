"""From the spec to this rank's layers: views of the buckets, wired into modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Microbatch
from megapre.kernels.mask import alibi_slopes
from megapre.kernels.registry import Kernels
from megapre.models import spec
from megapre.models.attention import Attention
from megapre.models.block import Block, FeedForward, Norm, ParallelBlock, PostNormBlock
from megapre.models.context import Context
from megapre.models.embedding import EmbeddingLayer, Positions, Sinusoids, TokenTypes
from megapre.models.encoder_decoder import (
    DECODER_BLOCKS,
    CrossAttention,
    DecoderBlock,
    DecoderHead,
    EncoderBlock,
    PairEmbedding,
)
from megapre.models.heads import Head, Sentence, Transform
from megapre.models.moe import MoE, Router
from megapre.models.positions import Alibi, Bias, HeadNorm, Relative, Rotary, Turn, rope_tables
from megapre.models.replaced_token import Detector, DetectorBlock, Replacement
from megapre.models.transformer_xl import TransformerXL, sinusoids_of_distances
from megapre.models.two_stream import TwoStreamAttention, TwoStreamBlock, TwoStreamEmbedding, TwoStreamHead
from megapre.parallel.buckets import Buffers
from megapre.parallel.comm import Axis
from megapre.parallel.context import over_context, places
from megapre.parallel.expert import Experts, GroupedLinear
from megapre.parallel.grid import Grid
from megapre.parallel.layout import ExpertPlace, Layout
from megapre.parallel.pipeline.executor import Carried, StageLayers
from megapre.parallel.pipeline.schedules import stage_owners
from megapre.parallel.tensor import Embedding, Linear
from megapre.random.philox import normal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

BLOCKS = {("pre", False): Block, ("pre", True): ParallelBlock, ("post", False): PostNormBlock}
"""By ``model.norm_placement`` and ``model.parallel_block``."""


class Model(nn.Module):
    """The stages that this rank holds, over its buckets. ``layers`` are all their layers in order."""

    def __init__(self, config: Config, grid: Grid, kernels: Kernels, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.grid, self.vocab_size, self.device = config.model, grid, vocab_size, device
        self.context_method = config.parallel.context_method
        self.dtype = DTYPES[config.precision.dtype]
        self.sequence = config.parallel.sequence and grid.tensor.size > 1
        parallel = config.parallel
        owners = stage_owners(parallel)
        self.stage_count = len(owners)
        ranges = spec.stages(config.model, len(owners), parallel.layers_per_stage)
        mine = {stage: ranges[stage] for stage, owner in enumerate(owners) if owner == grid.pipeline.rank}
        layout = Layout.build(
            spec.tensors(config.model, vocab_size, grid.tensor.size),
            [number for stage in mine.values() for number in stage],
            tensor_rank=grid.tensor.rank,
            tensor_size=grid.tensor.size,
            replicas=grid.replicas.size,
            sequence_parallel=self.sequence,
            bucket_elements=parallel.bucket_elements,
            by_layer=parallel.zero >= 2,
            expert=_expert_place(config.model, grid),
        )
        self.flat = Buffers(layout, grid, self.dtype, device, parallel.zero, parallel.offload)
        self.flat.queue.multiply = kernels.weight_gradient_
        builder = _Builder(self, kernels, parallel.recompute, parallel.recompute_layers)
        self.stages = {stage: builder.stage(numbers) for stage, numbers in mine.items()}
        self.layers = nn.ModuleList(layer for stage in self.stages.values() for layer in stage.layers)  # type: ignore[misc]

    def numbered(self) -> list[tuple[int, nn.Module]]:
        """Layers with their numbers in the model."""
        numbers = [number for stage in self.stages.values() for number in stage.numbers]
        return list(zip(numbers, self.layers))

    def initialise(self, seed: int) -> None:
        """Fill this rank's weights; the values do not depend on the layout."""
        for index, bucket in enumerate(self.flat.layout.buckets):
            with self.flat.weights.filling(index) as whole:
                for slot in bucket.slots:
                    real = whole[bucket.place(slot)].view(slot.shape)[tuple(slice(n) for n in slot.size)]
                    if slot.spec.init == "normal":
                        values = normal(seed, slot.spec.name, slot.spec.shape, slot.offset, slot.size)
                        real.copy_(values.mul_(slot.spec.std))
                    else:
                        real.fill_(1.0 if slot.spec.init == "ones" else 0.0)

    def context(self, microbatch: Microbatch, *, seed: int, step: int, training: bool) -> Context:
        """The context of ``microbatch`` on this rank's device."""
        m = microbatch

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else place(tensor)

        source = _source(m)
        mine = places(m.tokens.shape[0], self.context_method, self.grid.context.rank, self.grid.context.size)
        positions = place(m.positions[mine])
        rows = len(mine) // self.grid.tensor.size if self.sequence else len(mine)
        first = rows * self.grid.tensor.rank if self.sequence else 0
        shard = slice(first, first + rows)
        rope = None
        if self.config.positions == "rope":
            rope = rope_tables(self.config, positions, self.dtype)
        return Context(
            tokens=place(m.tokens[mine]),
            targets=place(m.targets[mine]),
            weights=place(m.weights[mine]),
            positions=positions,
            segments=optional(m.segments),
            samples=place(m.samples),
            encoder=None if source is None else self.context(source, seed=seed, step=step, training=training),
            token_types=optional(m.token_types if m.token_types is None else m.token_types[mine]),
            prefix=optional(m.prefix),
            labels=optional(m.labels),
            label_weights=optional(m.label_weights),
            ranks=optional(m.ranks),
            places=place(mine),
            shard=shard,
            seed=seed,
            step=step,
            training=training,
            leads=self.grid.context.rank == 0 and first == 0,
            rope=rope,
        )

    def carried(self, microbatch: Microbatch, layer: int) -> tuple[Carried, ...]:
        """What ``layer`` takes of ``microbatch``, as this rank holds it."""
        batch = microbatch.tokens.shape[1]
        parts = self.grid.context.size * (self.grid.tensor.size if self.sequence else 1)
        return tuple(
            Carried(
                (len(getattr(microbatch, c.stream)) // parts, batch, c.width),
                torch.int64 if c.ids else self.dtype,
                not c.ids,
            )
            for c in spec.carried(self.config, layer)
        )


def _source(m: Microbatch) -> Microbatch | None:
    """The encoder's part of ``m`` as a microbatch of its own, without targets."""
    if m.source is None:
        return None
    positions = torch.arange(len(m.source)).unsqueeze(1).expand_as(m.source)
    return Microbatch(m.source, m.source, torch.zeros(m.source.shape), positions, m.source_segments, m.samples)


def _expert_place(model: ModelConfig, grid: Grid) -> ExpertPlace:
    own = model.experts // grid.expert.size
    experts = range(grid.expert.rank * own, (grid.expert.rank + 1) * own)
    return ExpertPlace(experts, grid.expert_tensor.rank, grid.expert_tensor.size, grid.expert_replicas.size)


class _Builder:
    """Takes the parameters of one layer out of the buffers."""

    def __init__(self, model: Model, kernels: Kernels, recompute: str, recompute_layers: int) -> None:
        self.grid, self.method, self.device = model.grid, model.context_method, model.device
        self.config, self.flat, self.kernels, self.dtype = model.config, model.flat, kernels, model.dtype
        self.axis, self.sequence = model.grid.tensor, model.sequence
        self.core = over_context(model.context_method, model.grid.context, kernels.attention)
        self.sinusoids: Tensor | None = None
        if model.config.positions == "transformer_xl":
            self.core = kernels.relative_attention
            self.sinusoids = sinusoids_of_distances(model.config, model.dtype, model.device)
        self.recompute, self.recompute_layers, self.vocab_size = recompute, recompute_layers, model.vocab_size

    def stage(self, numbers: range) -> StageLayers:
        blocks = [number for number in spec.blocks(self.config) if number in numbers]
        chosen = frozenset(blocks[: self.recompute_layers or None])
        layers = [self.layer(number, self.recompute == "selective" and number in chosen) for number in numbers]
        parts = {n: layer.loss for n, layer in zip(numbers, layers) if isinstance(layer, Replacement)}
        return StageLayers(numbers, layers, chosen if self.recompute == "full" else frozenset(), parts)

    def layer(self, number: int, recompute_attention: bool) -> nn.Module:
        return LAYERS[spec.kinds(self.config)[number]](self, number, recompute_attention)

    def pair_embedding(self) -> PairEmbedding:
        source = self.embedding(spec.encoder_of(self.config), "encoder.embedding", 1)
        return PairEmbedding(source, self.embedding(self.config))

    def encoder_block(self, number: int, recompute_attention: bool) -> EncoderBlock:
        last = number == self.config.encoder_layers and self.flat.holds("encoder.norm.weight")
        return EncoderBlock(self.block(number, recompute_attention), self.norm("encoder.norm") if last else None)

    def decoder_block(self, number: int, recompute_attention: bool) -> DecoderBlock:
        like, name = spec.stack(self.config, number)
        q, kv = self.linear("column", f"{name}.cross.q"), self.linear("column", *(f"{name}.cross.{x}" for x in "kv"))
        output, core = self.linear("row", f"{name}.cross.output"), self.core
        cross = CrossAttention(like, number, q, kv, output, self.axis, core, recompute_attention)
        block = self.block(number, recompute_attention)
        kind = DECODER_BLOCKS[like.norm_placement]
        return kind(like, number, block, self.norm(f"{name}.cross_norm"), cross, self.kernels)

    def two_stream_embedding(self) -> TwoStreamEmbedding:
        query = self.flat.parameter("embedding.query.weight")
        return TwoStreamEmbedding(self.config, self.embedding(self.config), query, self.kernels)

    def two_stream_block(self, number: int, recompute_attention: bool) -> TwoStreamBlock:
        q = self.linear("column", f"{spec.stack(self.config, number)[1]}.attention.q")
        block = self.block(number, recompute_attention, partial(TwoStreamAttention, q))
        return TwoStreamBlock(self.config, number, block, self.kernels)

    def replacement(self) -> Replacement:
        head = self.head(self.config.generator, name=f"{spec.GENERATOR}head")
        return Replacement(head, self.embedding(self.config.discriminator, stream=1), self.vocab_size)

    def detector_block(self, number: int, recompute_attention: bool) -> DetectorBlock:
        return DetectorBlock(self.block(number, recompute_attention))

    def detector(self) -> Detector:
        norm = self.norm("head.norm") if self.config.norm_placement == "pre" else None
        dense, detect = self.dense("head.dense"), self.dense("head.detect")
        rows = self.axis if self.sequence else Axis("alone")
        return Detector(norm, dense, getattr(self.kernels, self.config.activation), detect, rows)

    def embedding(
        self, config: ModelConfig, home: str = "embedding", stream: int = 0, project: str = "embedding.project"
    ) -> EmbeddingLayer:
        added: list[nn.Module] = []
        if config.positions == "learned":
            added.append(Positions(self.flat.parameter(f"{home}.positions.weight")))
        if config.positions == "sinusoidal":
            added.append(Sinusoids(config.n_embedding, self.dtype))
        if self.flat.holds("embedding.types.weight"):
            added.append(TokenTypes(self.flat.parameter("embedding.types.weight")))
        tokens = Embedding(self.flat.parameter("embedding.tokens.weight"), self.axis, self.sequence)
        norm = self.norm(f"{home}.norm") if config.embedding_norm else None
        widen = self.dense(project) if self.flat.holds(f"{project}.weight") else None
        return EmbeddingLayer(config, tokens, added, norm, widen, self.kernels, stream)

    def head(self, config: ModelConfig, kind: type[Head] = Head, name: str = "head") -> Head:
        norm = self.norm(f"{name}.norm") if config.norm_placement == "pre" else None
        transform = sentence = None
        if config.mlm_transform:
            activation = getattr(self.kernels, config.activation)
            transform = Transform(self.dense(f"{name}.transform"), activation, self.norm(f"{name}.transform_norm"))
        if config.sentence_classes:
            sentence = Sentence(self.dense("head.pooler"), self.dense("head.sentence"))
        weight = self.flat.parameter("embedding.tokens.weight" if config.tied_embeddings else f"{name}.output.weight")
        bias = self.flat.parameter(f"{name}.output.bias") if config.has_output_bias else None
        output = Linear("column", weight, bias, self.axis, self.sequence)
        return kind(norm, transform, output, sentence, config.output_scale)

    def block(
        self, number: int, recompute_attention: bool, attention_of: Callable[..., Attention] = Attention
    ) -> Block:
        config, name = spec.stack(self.config, number)
        parallel = config.parallel_block
        norms = [self.norm(f"{name}.{part}") for part in ("attention_norm", "mlp_norm")[: 1 if parallel else 2]]
        qkv = self.linear("column", *(f"{name}.attention.{part}" for part in "qkv"))
        output = self.linear("row", f"{name}.attention.output")
        turns, bias = self.turns(config, f"{name}.attention"), self.bias(config, name)
        attention = attention_of(
            config, number, qkv, output, self.axis, turns, bias, self.core, self.grid.context.size, recompute_attention,
            self.relative(f"{name}.attention"),
        )  # fmt: skip
        make = self.moe if config.has_experts(number) else self.mlp
        mlp = make(config, number, f"{name}.mlp")
        kind = BLOCKS[config.norm_placement, parallel]
        return kind(config, number, norms, attention, mlp, self.kernels)

    def bias(self, config: ModelConfig, name: str) -> Bias | None:
        if config.positions == "t5":
            home = name[: name.index("blocks.")]
            table = "encoder.relative" if home == "encoder." else f"{home}embedding.relative"
            return Relative(config, self.flat.parameter(f"{table}.weight"))
        if config.positions != "alibi":
            return None
        own = config.heads // self.axis.size
        slopes = alibi_slopes(config.heads, self.flat.wide)[self.axis.rank * own : (self.axis.rank + 1) * own]
        return Alibi(slopes.to(self.device))

    def relative(self, name: str) -> TransformerXL | None:
        if self.sinusoids is None:
            return None
        content, position, project = (
            self.flat.parameter(f"{name}.{part}") for part in ("content_bias", "position_bias", "distance.weight")
        )
        segments = None
        if self.config.token_types:
            bias, same, other = (self.flat.parameter(f"{name}.segment_{part}") for part in ("bias", "same", "other"))
            segments = bias, same, other
        return TransformerXL(content, position, project, segments, self.sinusoids)

    def turns(self, config: ModelConfig, name: str) -> list[Turn]:
        turns: list[Turn] = []
        if config.qk_norm:
            turns.append(HeadNorm(self.norm(f"{name}.q_norm"), self.norm(f"{name}.k_norm")))
        if config.positions == "rope":
            turns.append(Rotary(config, self.kernels))
        return turns

    def mlp(self, config: ModelConfig, number: int, name: str) -> FeedForward:
        up = self.linear("column", *(f"{name}.{part}" for part in spec.up_parts(config)))
        return FeedForward(config.activation, up, self.linear("row", f"{name}.down"), self.kernels)

    def moe(self, config: ModelConfig, number: int, name: str) -> MoE:
        experts, grid = _expert_place(config, self.grid).experts, self.grid
        up, down = (
            self.flat.parameter(*(f"{name}.experts.{e}.{part}.weight" for e in experts for part in parts))
            for parts in (spec.up_parts(config), ("down",))
        )
        bias = None
        if config.router_bias:
            bias = torch.zeros(config.experts, dtype=self.flat.wide, device=self.device)
        weight = self.flat.parameter(f"{name}.router.weight")
        router = Router(config, number, weight, bias, (grid.tensor, grid.context), self.method, self.kernels)
        first, second = (GroupedLinear(matrix, len(experts), self.kernels) for matrix in (up, down))
        activation, axes = getattr(self.kernels, config.activation), (grid.expert, grid.expert_tensor)
        routed = Experts(first, second, activation, config.experts, axes, self.kernels)
        shared = self.mlp(config, number, f"{name}.shared") if config.shared_experts else None
        return MoE(router, routed, shared, grid.tensor, self.sequence)

    def norm(self, name: str) -> Norm:
        bias = self.flat.parameter(f"{name}.bias") if self.flat.holds(f"{name}.bias") else None
        return Norm(self.flat.parameter(f"{name}.weight"), bias, self.config.norm_eps, self.kernels)

    def dense(self, name: str) -> Linear:
        """A linear layer that every tensor rank holds whole, for its own rows."""
        bias = self.flat.parameter(f"{name}.bias") if self.flat.holds(f"{name}.bias") else None
        return Linear("column", self.flat.parameter(f"{name}.weight"), bias, Axis("alone"), False)

    def linear(self, kind: str, *parts: str) -> Linear:
        weight = self.flat.parameter(*(f"{part}.weight" for part in parts))
        biased = self.flat.holds(f"{parts[0]}.bias")
        bias = self.flat.parameter(*(f"{part}.bias" for part in parts)) if biased else None
        return Linear(kind, weight, bias, self.axis, self.sequence)


LAYERS: dict[str, Callable[[_Builder, int, bool], nn.Module]] = {
    "embedding": lambda made, number, again: made.embedding(made.config),
    "block": _Builder.block,
    "head": lambda made, number, again: made.head(made.config),
    "pair_embedding": lambda made, number, again: made.pair_embedding(),
    "encoder_block": _Builder.encoder_block,
    "decoder_block": _Builder.decoder_block,
    "decoder_head": lambda made, number, again: made.head(made.config, DecoderHead),
    "generator_embedding": lambda made, number, again: made.embedding(
        made.config.generator, project=f"{spec.GENERATOR}embedding.project"
    ),
    "replacement": lambda made, number, again: made.replacement(),
    "detector_block": _Builder.detector_block,
    "detector": lambda made, number, again: made.detector(),
    "two_stream_embedding": lambda made, number, again: made.two_stream_embedding(),
    "two_stream_block": _Builder.two_stream_block,
    "two_stream_head": lambda made, number, again: made.head(made.config, TwoStreamHead),
}
"""What makes each kind of layer of ``spec.kinds``, of its number and whether its attention is recomputed."""
