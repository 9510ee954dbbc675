"""What is planned: the shape of a model, its layout over ranks, the software that runs it, the machine.

A megapre job becomes one through `from_config`, the only place that reads a `Config`; published runs become one in
``benchmarks/planner/rows.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megapre.config.check import ConfigError
from megapre.config.schema import Config, ModelConfig
from megapre.models import spec
from megapre.planner.hardware import Device


@dataclass(frozen=True)
class Shape:
    """A transformer. Widths in features."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of a dense block's MLP."""
    vocab: int
    sequence: int
    gated: bool = False
    causal: bool = True
    tied: bool = True
    bias: bool = False
    qkv_bias: bool = False
    """The projections to q, k and v have biases where ``bias`` is false."""
    qk_norm: bool = False
    window: int = 0
    """Keys that a query of a sliding window reads, at most; 0: all."""
    layer_norm: bool = False
    """LayerNorm, which has a bias, rather than RMSNorm."""
    learned_positions: bool = False
    parallel_block: bool = False
    dropout: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    """Width of one routed expert."""
    shared_ffn: int = 0
    """Width of the experts that every token visits, together."""
    dense_layers: int = 0
    """First blocks of an expert model that have a dense MLP."""

    @property
    def q_width(self) -> int:
        """Features of all queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Features of all keys."""
        return self.kv_heads * self.head_dim

    @property
    def norm(self) -> int:
        """Elements of a norm of the residual stream."""
        return self.hidden * (2 if self.layer_norm else 1)

    @property
    def keys(self) -> float:
        """Keys that a query reads, on average."""
        reach, length = min(self.window or self.sequence, self.sequence), self.sequence
        if self.causal:
            return reach - reach * reach / (2 * length)
        return length - (length - reach) ** 2 / length

    @property
    def matrices(self) -> int:
        """Matrices of an MLP."""
        return 3 if self.gated else 2

    @property
    def moe_layers(self) -> int:
        """Blocks with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    def attention_weights(self) -> int:
        """Elements of one block's attention matrices."""
        return 2 * self.hidden * (self.q_width + self.kv_width)

    def mlp_weights(self, moe: bool, *, active: bool = False) -> int:
        """Elements of one block's MLP matrices; only those that one token meets when ``active``."""
        if not moe:
            return self.matrices * self.hidden * self.ffn
        routed = (self.experts_per_token if active else self.experts) * self.expert_ffn
        return self.matrices * self.hidden * (routed + self.shared_ffn) + self.hidden * self.experts

    def block_vectors(self, tensor: int = 1) -> float:
        """Elements of a block's norms and biases on one of ``tensor`` ranks."""
        kv = max(self.kv_width / tensor, self.head_dim)
        vectors: float = self.norm * (1 if self.parallel_block else 2)
        vectors += 2 * self.head_dim * self.norm / self.hidden if self.qk_norm else 0
        if self.bias:
            vectors += 2 * self.hidden + self.ffn / tensor * (self.matrices - 1)
        return vectors + (self.q_width / tensor + 2 * kv if self.bias or self.qkv_bias else 0)

    def parameters(self, *, active: bool = False) -> int:
        """Elements of all tensors; those that one token meets when ``active``."""
        blocks = sum(
            count * (self.attention_weights() + self.mlp_weights(moe, active=active) + int(self.block_vectors()))
            for count, moe in ((self.layers - self.moe_layers, False), (self.moe_layers, True))
        )
        positions = self.sequence * self.hidden if self.learned_positions else 0
        return blocks + self.vocab * self.hidden * (1 if self.tied else 2) + positions + self.norm

    def model_flops(self, tokens: float, attention: float = 0.5) -> float:
        """FLOPs of ``tokens``, forward and backward, recomputation not counted.

        ``attention``: share of the sequence^2 scores that is counted; 0.5 for causal attention, 1 in the older
        convention of llm-foundry and NeMo.
        """
        blocks = sum(
            count * (self.attention_weights() + self.mlp_weights(moe, active=True))
            for count, moe in ((self.layers - self.moe_layers, False), (self.moe_layers, True))
        )
        share = min(attention if self.causal else 1.0, self.keys / self.sequence if self.window else 1.0)
        weights = blocks + self.hidden * self.vocab
        return tokens * (6.0 * weights + 12.0 * self.layers * self.q_width * self.sequence * share)


@dataclass(frozen=True)
class Layout:
    """How a step is spread over ranks; names and meaning are those of [parallel] and [train] of a job."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    chunks: int = 1
    schedule: str = "1f1b"
    layers_per_stage: tuple[int, ...] = ()
    sequence: bool = False
    zero: int = 0
    shard: int = 0
    """Ranks over which ZeRO-3 shards; 0: all that hold the same weights (fewer is HSDP)."""
    offload: str = "none"
    recompute: str = "none"
    """``none``, ``selective`` (attention), ``light`` (activations and norms) or ``full`` (blocks)."""
    recompute_share: float = 1.0
    """Share of each stage's blocks that recompute applies to."""
    microbatch: int = 1
    global_batch: int = 1
    bucket_elements: int = 16_777_216

    @property
    def ranks(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.replicas * self.tensor // (self.expert * self.expert_tensor))

    @property
    def microbatches(self) -> int:
        """Microbatches of one pipeline in a step."""
        return max(1, round(self.global_batch / (self.microbatch * self.data)))

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipeline * self.chunks


@dataclass(frozen=True)
class Stack:
    """The software, as far as it decides speed and memory."""

    dtype: str = "bf16"
    """``fp32``, ``bf16``, ``fp16`` or ``fp8`` (weights, gradients and residuals 16-bit)."""
    attention: str = "flash2"
    """``unfused`` (scores are written out), ``flash1``, ``flash2`` or ``flash3``."""
    fusion: str = "fused"
    """Byte-bound operations: ``fused`` by hand, ``eager`` or ``compiled`` by XLA."""
    overlap: bool = True
    """Data-parallel traffic runs beside computation."""
    tensor_overlap: bool = True
    """Tensor-parallel traffic does too."""
    engine: str = "megapre"
    """Whose table of saved activations counts: ``megapre``, ``megatron`` or ``classic`` (Megatron-LM of 2022)."""
    reduced_bytes: int = 4
    """Bytes per element of a gradient on the wire."""
    gradient_bytes: float = 4.0
    """Bytes held per element of a gradient."""
    moment_bytes: tuple[float, float] = (8.0, 8.0)
    """Bytes per element of the optimizer's own state: of the blocks' matrices, of embedding and output layer."""
    master_bytes: float = 4.0
    """Bytes per element of master weights beside the model's; 0 where they are the same memory."""
    separate_sum: bool = False
    """A microbatch's weight gradient is written, then added to the step's sum by a second kernel (DeepSpeed, and
    Megatron-LM before its fused accumulation of 2022)."""
    extra_memory: float = 0.0
    """Bytes that the site's software was seen to hold beside all that is computed here."""

    @property
    def width(self) -> int:
        """Bytes of an element of weights and activations."""
        return 4 if self.dtype == "fp32" else 8 if self.dtype == "fp64" else 2


@dataclass(frozen=True)
class Job:
    """All that a prediction needs."""

    shape: Shape
    layout: Layout
    stack: Stack
    device: Device
    nic: float = 0.0
    """Bytes/s between nodes for each device, where the site's differs from the profile's."""
    nvlink: float = 0.0
    """Bytes/s inside a node, likewise."""
    assumed: tuple[str, ...] = field(default=(), compare=False)
    """Names of the fields that the description did not give."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.layout.global_batch * self.shape.sequence

    def on(self, **changes: object) -> Job:
        """The same job under another layout."""
        return replace(self, layout=replace(self.layout, **changes))  # type: ignore[arg-type]


def shape_of(config: Config, vocab: int) -> Shape:
    """The shape of a job's model with ``vocab`` token ids."""
    model = config.model
    return Shape(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        ffn=model.n_ffn,
        vocab=vocab,
        sequence=model.sequence,
        gated=model.gated,
        causal=model.architecture == "decoder",
        tied=model.tied_embeddings,
        bias=model.bias,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        window=model.window,
        layer_norm=model.norm == "layernorm",
        learned_positions=model.positions == "learned",
        parallel_block=model.parallel_block,
        dropout=model.dropout > 0,
        experts=model.experts,
        experts_per_token=model.experts_per_token if model.experts else 0,
        expert_ffn=model.n_expert_hidden if model.experts else 0,
        shared_ffn=model.shared_experts * model.n_expert_hidden if model.experts else 0,
        # Only their number counts: with moe_every above 1 the dense blocks are taken to come first.
        dense_layers=sum(not model.has_experts(layer) for layer in range(1, model.layers + 1)) if model.experts else 0,
    )


UNCOUNTED = 0.01
"""Share of a model's elements that may belong to tensors that no prediction counts, such as small tables."""


def refuse_what_is_not_counted(config: Config, vocab: int) -> None:
    """Raise `ConfigError` for a model whose tensors are not those that a `Shape` has: nothing is silently left out."""
    wanted = sum(math.prod(tensor.shape) for tensor in spec.tensors(config.model, vocab))
    counted = shape_of(config, vocab).parameters()
    if abs(counted / wanted - 1) <= UNCOUNTED:
        return
    plain = ModelConfig()
    known = ("share_layers", "embedding_size", "token_types", "mlm_transform", "sentence_classes", "embedding_norm")
    named = [f"model.{name}" for name in known if getattr(config.model, name) != getattr(plain, name)]
    raise ConfigError(
        f"plan counts {counted:,} weights of this model's {wanted:,}, so its figures would be wrong: "
        + (f"it does not know {' and '.join(named)}" if named else "it does not know this kind of model")
    )


def layout_of(config: Config) -> Layout:
    """The layout of a checked job."""
    parallel, train = config.parallel, config.train
    share = 1.0
    if parallel.recompute_layers:
        stages = parallel.pipeline * parallel.chunks
        share = min(1.0, parallel.recompute_layers * stages / config.model.layers)
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=max(1, parallel.data),
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        chunks=parallel.chunks,
        schedule=parallel.schedule,
        layers_per_stage=tuple(parallel.layers_per_stage),
        sequence=parallel.sequence and parallel.tensor > 1,
        zero=parallel.zero,
        offload=parallel.offload,
        recompute=parallel.recompute,
        recompute_share=share,
        microbatch=train.microbatch,
        global_batch=train.global_batch,
        bucket_elements=parallel.bucket_elements,
    )


MOMENT_BYTES = {"adamw": (8.0, 8.0), "lion": (4.0, 4.0), "muon": (4.0, 8.0), "adafactor": (0.0, 0.0)}
"""``optimizer.kind`` -> ``Stack.moment_bytes``. Vectors are counted as matrices: they are too few to be seen."""


def from_config(config: Config, device: Device, vocab: int) -> Job:
    """The plan of a megapre job on ``device``, run by megapre itself."""
    dtype = config.precision.dtype
    stack = Stack(
        dtype=dtype,
        attention="unfused" if config.model.attention_dropout else "flash2",
        engine="megapre",
        moment_bytes=MOMENT_BYTES[config.optimizer.kind],
        master_bytes=0.0 if dtype in ("fp32", "fp64") else 4.0,
        gradient_bytes=8.0 if dtype == "fp64" else 4.0,
        reduced_bytes=8 if dtype == "fp64" else 4,
    )
    return Job(shape_of(config, vocab), layout_of(config), stack, device)
