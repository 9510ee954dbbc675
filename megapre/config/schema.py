"""The job file: one dataclass per TOML table, each field with its meaning and unit under it.

[model] and [data] are in ``model.py`` and ``data.py``; ``load.py`` fills these from a file and dotted overrides,
``check.py`` holds the rules that span fields. Nothing here imports torch: a bad job is refused before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megapre.config.data import DataConfig as DataConfig
from megapre.config.model import ModelConfig as ModelConfig


@dataclass(frozen=True)
class ParallelConfig:
    """The grid. World size = pipeline x data x context x tensor, tensor innermost."""

    tensor: int = 1
    """Tensor-parallel ranks (arXiv 1909.08053)."""
    pipeline: int = 1
    """Pipeline-parallel stages."""
    data: int = 0
    """Data-parallel ranks. 0 means: what the launched ranks leave, or 1 when started alone."""
    context: int = 1
    """Context-parallel ranks: each holds a part of every sequence."""
    context_method: str = "ring"
    """``ring`` attention (arXiv 2310.01889, zigzag) or ``ulysses`` (arXiv 2309.14509, all-to-all over heads)."""
    expert: int = 1
    """Expert-parallel ranks, among which a layer's experts are dealt out; divides data x context x tensor."""
    expert_tensor: int = 1
    """Tensor-parallel ranks of each expert: 1 or another divisor of ``tensor``."""
    sequence: bool = False
    """Megatron sequence parallelism (arXiv 2205.05198): norms and dropout work on a shard of the sequence."""
    zero: int = 0
    """What data x context ranks share out (ZeRO, arXiv 1910.02054): 0 nothing, 1 optimizer state, 2 also main
    gradients, 3 also weights."""
    offload: str = "none"
    """What lives in host memory: ``none``, ``optimizer`` (state, updated there) or ``parameters`` (with ``zero`` = 3,
    also the weights' shards)."""
    schedule: str = "1f1b"
    """Pipeline schedule: ``1f1b``, ``gpipe``, ``interleaved``, ``zb-h1`` or ``zb-v``."""
    chunks: int = 1
    """Stages per pipeline rank: at least 2 for ``interleaved``, 2 for ``zb-v``, 1 for the others."""
    layers_per_stage: list[int] = field(default_factory=list)
    """Blocks on each stage, in the order of the model; empty: as even as possible."""
    recompute: str = "none"
    """What backward computes again instead of keeping: ``none``, ``selective`` (attention) or ``full`` (blocks)."""
    recompute_layers: int = 0
    """First blocks of each stage that recompute applies to; 0: all."""
    bucket_elements: int = 16_777_216
    """Gradient elements per data-parallel reduction."""


@dataclass(frozen=True)
class OptimizerConfig:
    """What moves the weights, over fp32 master weights."""

    kind: str = "adamw"
    """``adamw`` (arXiv 1711.05101), ``lion`` (arXiv 2302.06675), ``muon`` (hidden matrices by orthogonalised momentum,
    the rest by AdamW) or ``adafactor`` (arXiv 1804.04235; ``lr`` is relative to the size of a tensor's weights)."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment; Lion's interpolation. Adafactor has none."""
    beta2: float = 0.95
    """Decay of the second moment; of Lion's momentum. Adafactor's follows from the step."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are not decayed."""
    freeze: list[str] = field(default_factory=list)
    """Patterns (``embedding.*``, ``blocks.[0-3].*``) of tensors that stay as they are and count in no norm."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    router_bias_rate: float = 1e-3
    """Step of the bias of an expert with too many or too few tokens, where ``model.router_bias`` is set."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate by step: linear warm-up, then a decay."""

    kind: str = "cosine"
    """``cosine``, ``linear``, ``wsd`` (warm-up, stable, decay), ``inverse-sqrt``, ``piecewise``, ``plateau`` (waits for
    the validation loss) or ``constant``."""
    unit: str = "steps"
    """What ``warmup``, ``decay``, ``cooldown`` and ``milestones`` count: ``steps``, ``samples`` or ``tokens``."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: int = 0
    """Step at which the decay ends. 0 means ``train.steps``."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    cooldown: int = 0
    """Steps of decay at the end of ``wsd``."""
    milestones: list[int] = field(default_factory=list)
    """Steps at which ``piecewise`` changes the rate, rising."""
    factors: list[float] = field(default_factory=list)
    """Rate from each milestone on, as a share of the peak."""
    patience: int = 2
    """``plateau``: validations without a better loss that are waited for."""
    plateau_factor: float = 0.1
    """``plateau``: factor of the rate after them; it never falls below ``min_lr_ratio``."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number format of weights and activations. Master weights and gradients are always fp32 (fp64 under fp64)."""

    dtype: str = "fp32"
    """``fp32``, ``bf16``, ``fp16`` (with dynamic loss scaling) or ``fp64`` (proofs)."""
    initial_loss_scale: float = 65536.0
    """First loss scale, fp16 only."""
    growth_interval: int = 1000
    """Finite steps after which the fp16 loss scale doubles."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch of the run."""

    run_dir: str = "runs/default"
    """Folder of the run: job.toml, metrics.jsonl, checkpoints/, tensorboard/, log/."""
    steps: int = 100
    """Optimizer steps in all."""
    global_batch: int = 8
    """Samples per optimizer step over all ranks."""
    microbatch: int = 1
    """Samples per forward pass on one rank."""
    label_smoothing: float = 0.0
    """Share of a target's probability spread over the vocabulary (arXiv 1512.00567); validation leaves it out."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 beside the cross-entropy (arXiv 2204.02311); validation leaves it out."""
    batch_ramp: list[int] = field(default_factory=list)
    """[start, increment, samples]: the batch grows from ``start`` by ``increment`` to ``global_batch`` over the first
    ``samples`` samples (Megatron's --rampup-batch-size). Empty: no ramp."""
    sequence_ramp: list[int] = field(default_factory=list)
    """[start, samples]: rows grow by doubling from ``start`` tokens to ``model.sequence`` over the first ``samples``
    samples. A sample is cut into rows, so its order and a step's tokens stay the same. Empty: no ramp."""
    seed: int = 1
    """Key of initial weights and dropout."""
    device: str = "auto"
    """``auto`` (CUDA when there is one), ``cpu`` or ``cuda``."""
    deterministic: bool = False
    """Refuse operations that are not bitwise repeatable (GPU; the CPU path always is)."""
    threads: int = 0
    """CPU threads per rank. 0 means the machine's cores divided by local ranks."""
    eval_interval: int = 0
    """Steps between validations; 0 means only at the end."""
    eval_samples: int = 64
    """Validation samples per validation."""
    eval_first: bool = False
    """Also validate before the first step, which tells what a model knew that the run starts from."""
    eval_by_path: bool = False
    """Also report the loss on each of ``data.paths`` alone, ``loss_on/NAME``, over as many validation samples."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    interval: int = 0
    """Steps between checkpoints; 0: none are counted."""
    minutes: float = 10.0
    """Also save when this many minutes have passed since the last save; 0: never. A run always saves at its end."""
    async_save: bool = True
    """Write checkpoints beside the training, from a copy in host memory; the last one of a run is always waited for."""
    host_memory: float = 0.0
    """GiB of host memory per rank for that copy; 0: half of what is free. Saves are synchronous when it is short."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the run folder."""
    load: str = ""
    """A checkpoint (``.../step_N``) to start from when the run folder has none; any layout. Or a folder of Hugging Face
    (``config.json`` and safetensors), whose weights alone are taken."""
    weights_only: bool = False
    """Take only the weights of ``load``: the optimizer, the data and the schedule begin anew."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys such as ``train.global_batch`` that may differ from the checkpoint's job although they define the run."""


@dataclass(frozen=True)
class MonitorConfig:
    """What a run reports."""

    interval: int = 1
    """Steps between lines of metrics."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    wandb: str = ""
    """Weights & Biases project that metrics go to as well; empty: none. A resumed run continues its curve."""
    activation_rms: bool = False
    """Report the root mean square of every block's output."""
    warmup_steps: int = 3
    """First steps of a process, kept out of tokens/s."""
    peak_tflops: float = 0.0
    """Peak of one device in TFLOP/s, for MFU. 0: the data sheet's for a known GPU; measured by a GEMM on a CPU."""


@dataclass(frozen=True)
class ResilienceConfig:
    """What happens when ranks fail."""

    max_restarts: int = 3
    """Restarts in a row that get no further (over several nodes: in all) before the local launcher gives up."""
    heartbeat: float = 120.0
    """Seconds of silence after which a rank of the local launcher is suspected to hang; 0: never."""
    timeout: int = 600
    """Seconds after which a collective that makes no progress fails."""
    on_nonfinite: str = "skip"
    """A step with a NaN or an infinity: ``skip`` its update, or ``rerun`` it from the last checkpoint once first."""
    max_skips: int = 10
    """Steps in a row that may be skipped before the run gives up."""
    spike_zscore: float = 0.0
    """Robust standard deviations above the recent median that make a loss or gradient norm a spike; 0: none does."""
    spike_window: int = 128
    """Recent steps that a spike is measured against."""
    spike_skip: int = 1
    """Batches left out after a spike: the one that spiked and those before it."""
    max_rewinds: int = 8
    """Returns to a checkpoint within ``spike_window`` steps before the run gives up."""
    digest_interval: int = 100
    """Steps between comparisons of the replicas' bits, made before every save besides; 0: never."""
    selftest: bool = True
    """Let every rank compute and communicate known answers before it trains."""


@dataclass(frozen=True)
class KernelsConfig:
    """Version of each op: ``auto`` or a name that ``megapre kernels`` lists."""

    norm: str = "auto"
    """LayerNorm and RMSNorm, each also with a residual sum before it."""
    attention: str = "auto"
    """Scaled dot-product attention, by relative positions too."""
    activation: str = "auto"
    """GELU, bias + GELU, SwiGLU and GeGLU."""
    rope: str = "auto"
    """Rotary positions."""
    cross_entropy: str = "auto"
    """Local part of the vocabulary-parallel cross-entropy, alone or with the output layer."""
    linear: str = "auto"
    """Weight gradients of linear layers; the products themselves are torch's."""
    dropout: str = "auto"
    """Counter-based dropout, alone or with a bias and a residual sum."""
    moe: str = "auto"
    """Top-k, permutation and grouped products of a mixture of experts."""
    optimizer: str = "auto"
    """AdamW over flat shards and the gradients' sum of squares."""


@dataclass(frozen=True)
class Config:
    """A whole job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
