"""What a job must satisfy before torch is loaded or a rank is started.

Three tables: the choices of every string field, the range of every number, and the rules that span
fields. A broken one raises `ConfigError`: one sentence with the numbers and the key to change.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from megapre.config.check_experts import expert_mesh_fits, experts_fit
from megapre.config.ramp import clock
from megapre.config.ramp_rules import RAMP_RULES
from megapre.config.schema import Config


class ConfigError(ValueError):
    """A job that cannot run, in one sentence for the person who wrote it."""


CHOICES = {
    "model.architecture": ("decoder", "encoder"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "swiglu"),
    "model.positions": ("learned", "rope", "none"),
    "model.router_scores": ("softmax", "sigmoid"),
    "data.tokenizer_type": (
        "HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "BertWordPieceLowerCase",
        "BertWordPieceCase", "TikTokenizer", "ByteTokenizer", "NullTokenizer",
    ),
    "data.packing": ("concatenate", "best-fit"),
    "data.objective": ("causal", "masked"),
    "parallel.schedule": ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"),
    "parallel.context_method": ("ring", "ulysses"),
    "parallel.recompute": ("none", "selective", "full"),
    "parallel.zero": (0, 1, 2, 3),
    "parallel.offload": ("none", "optimizer", "parameters"),
    "schedule.unit": ("steps", "samples", "tokens"),
    "schedule.kind": ("cosine", "linear", "wsd", "inverse-sqrt", "piecewise", "constant"),
    "precision.dtype": ("fp32", "bf16", "fp16", "fp64"),
    "train.device": ("auto", "cpu", "cuda"),
    "resilience.on_nonfinite": ("skip", "rerun"),
    "kernels.norm": ("auto", "cpp", "torch", "reference", "triton", "cuda", "apex"),
    "kernels.attention": ("auto", "cpp", "flash", "sdpa", "reference", "triton", "cuda"),
    "kernels.activation": ("auto", "cpp", "torch", "reference", "triton", "cuda"),
    "kernels.rope": ("auto", "cpp", "reference", "triton", "cuda"),
    "kernels.cross_entropy": ("auto", "cpp", "torch", "reference", "triton", "cuda"),
    "kernels.dropout": ("auto", "cpp", "reference", "triton", "cuda"),
    "kernels.linear": ("auto", "cpp", "reference"),
    "kernels.moe": ("auto", "reference"),
    "kernels.optimizer": ("auto", "cpp", "torch", "reference", "triton", "cuda", "apex"),
}

COUNT, NATURAL, POSITIVE, NON_NEGATIVE = "at least 1", "at least 0", "greater than 0", "at least 0"
SHARE, PROBABILITY = "between 0 and 1", "at least 0 and below 1"
RANGES = {
    "model.layers": COUNT,
    "model.hidden": COUNT,
    "model.heads": COUNT,
    "model.kv_heads": NATURAL,
    "model.ffn_hidden": NATURAL,
    "model.vocab_size": NATURAL,
    "model.sequence": COUNT,
    "model.norm_eps": POSITIVE,
    "model.rope_theta": POSITIVE,
    "model.dropout": PROBABILITY,
    "model.attention_dropout": PROBABILITY,
    "model.init_std": POSITIVE,
    "model.experts": NATURAL,
    "model.experts_per_token": COUNT,
    "model.expert_hidden": NATURAL,
    "model.shared_experts": NATURAL,
    "model.moe_every": COUNT,
    "model.moe_dense_first": NATURAL,
    "model.capacity_factor": NON_NEGATIVE,
    "model.router_scale": POSITIVE,
    "model.router_aux_loss": NON_NEGATIVE,
    "model.router_z_loss": NON_NEGATIVE,
    "data.mask_probability": PROBABILITY,
    "data.seed": NATURAL,
    "data.prefetch": COUNT,
    "data.cache_gib": POSITIVE,
    "parallel.tensor": COUNT,
    "parallel.pipeline": COUNT,
    "parallel.context": COUNT,
    "parallel.expert": COUNT,
    "parallel.expert_tensor": COUNT,
    "parallel.chunks": COUNT,
    "parallel.recompute_layers": NATURAL,
    "parallel.data": NATURAL,
    "parallel.bucket_elements": COUNT,
    "optimizer.lr": POSITIVE,
    "optimizer.beta1": PROBABILITY,
    "optimizer.beta2": PROBABILITY,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NON_NEGATIVE,
    "optimizer.clip": NON_NEGATIVE,
    "optimizer.router_bias_rate": NON_NEGATIVE,
    "schedule.warmup": NATURAL,
    "schedule.decay": NATURAL,
    "schedule.min_lr_ratio": SHARE,
    "schedule.cooldown": NATURAL,
    "precision.initial_loss_scale": POSITIVE,
    "precision.growth_interval": COUNT,
    "train.steps": COUNT,
    "train.global_batch": COUNT,
    "train.microbatch": COUNT,
    "train.label_smoothing": PROBABILITY,
    "train.z_loss": NON_NEGATIVE,
    "train.seed": NATURAL,
    "train.threads": NATURAL,
    "train.eval_interval": NATURAL,
    "train.eval_samples": NATURAL,
    "checkpoint.interval": NATURAL,
    "checkpoint.minutes": NON_NEGATIVE,
    "checkpoint.host_memory": NON_NEGATIVE,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every": NATURAL,
    "monitor.interval": COUNT,
    "monitor.warmup_steps": NATURAL,
    "monitor.peak_tflops": NON_NEGATIVE,
    "resilience.max_restarts": NATURAL,
    "resilience.timeout": COUNT,
    "resilience.heartbeat": NON_NEGATIVE,
    "resilience.max_skips": COUNT,
    "resilience.spike_zscore": NON_NEGATIVE,
    "resilience.spike_window": COUNT,
    "resilience.spike_skip": COUNT,
    "resilience.max_rewinds": NATURAL,
    "resilience.digest_interval": NATURAL,
}
LARGEST = 2**63 - 1
MOST_HEADS = 1024


def check(config: Config, world_size: int | None = None) -> Config:
    """Return ``config`` with ``parallel.data`` resolved, or raise `ConfigError`.

    ``world_size`` is the number of launched ranks; None when started alone, where ``parallel.data = 0``
    becomes 1. Reads no file and needs no device.
    """
    _check_fields(config)
    config = _resolve_data(config, world_size)
    for rule in RULES:
        problem = rule(config)
        if problem:
            raise ConfigError(problem)
    return config


def world_size(config: Config) -> int:
    """Ranks of a checked job: tensor x pipeline x context x data."""
    grid = config.parallel
    return grid.tensor * grid.pipeline * grid.context * grid.data


def _check_fields(config: Config) -> None:
    """Every field alone: finite, in its choices, in its range."""
    for table in fields(config):
        values = getattr(config, table.name)
        for entry in fields(values):
            name = f"{table.name}.{entry.name}"
            value = getattr(values, entry.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and not (math.isfinite(number) and abs(number) <= LARGEST):
                    raise ConfigError(f"{name} must be a finite number below 2^63, not {number}")
            if name in CHOICES and value not in CHOICES[name]:
                raise ConfigError(f"{name} must be {_either(CHOICES[name])}, not {value!r}")
            if name in RANGES and not _within(value, RANGES[name]):
                raise ConfigError(f"{name} must be {RANGES[name]}, not {value}")


def _within(value: float, wanted: str) -> bool:
    if wanted == COUNT:
        return value >= 1
    if wanted == POSITIVE:
        return value > 0
    if wanted == PROBABILITY:
        return 0 <= value < 1
    if wanted == SHARE:
        return 0 <= value <= 1
    return value >= 0


def _either(choices: tuple[Any, ...]) -> str:
    shown = [repr(choice) for choice in choices]
    return ", ".join(shown[:-1]) + " or " + shown[-1]


def _resolve_data(config: Config, world: int | None) -> Config:
    """Fill in ``parallel.data`` and hold the grid against the launched ranks."""
    grid = config.parallel
    names = "parallel.tensor x parallel.pipeline"
    sizes = f"{grid.tensor} x {grid.pipeline}"
    if grid.context > 1:
        names, sizes = f"{names} x parallel.context", f"{sizes} x {grid.context}"
    model_ranks = grid.tensor * grid.pipeline * grid.context
    if world is None:
        data = grid.data or 1
    elif grid.data == 0 and world % model_ranks:
        raise ConfigError(
            f"{world} launched ranks are not a multiple of {names} = {sizes} = {model_ranks}: change the launch or one "
            f"of them"
        )
    else:
        data = grid.data or world // model_ranks
    if world is not None and world != model_ranks * data:
        raise ConfigError(
            f"{names} x parallel.data = {sizes} x {data} = {model_ranks * data} ranks but {world} were launched: "
            f"change the launch or parallel.data"
        )
    return replace(config, parallel=replace(grid, data=data))


def heads_divide_hidden(config: Config) -> str | None:
    """Each head holds hidden / heads features."""
    model = config.model
    if model.hidden % model.heads:
        return f"model.hidden ({model.hidden}) must be a multiple of model.heads ({model.heads})"
    return None


def kv_heads_divide_heads(config: Config) -> str | None:
    """Each key/value head serves heads / kv_heads query heads (arXiv 2305.13245)."""
    model = config.model
    if model.n_kv_heads > model.heads:
        return f"model.kv_heads ({model.kv_heads}) must not exceed model.heads ({model.heads})"
    if model.heads % model.n_kv_heads:
        return f"model.heads ({model.heads}) must be a multiple of model.kv_heads ({model.kv_heads})"
    return None


def rope_needs_even_heads(config: Config) -> str | None:
    """RoPE turns pairs of features."""
    model = config.model
    if model.positions == "rope" and model.head_dim % 2:
        return (
            f"model.positions = 'rope' needs an even number of features per head but model.hidden / model.heads = "
            f"{model.hidden} / {model.heads} = {model.head_dim}: change model.hidden or model.heads"
        )
    return None


def heads_divide_over_tensor(config: Config) -> str | None:
    """Query heads are cut over the tensor axis; key/value heads are cut or held by neighbours."""
    model, tensor = config.model, config.parallel.tensor
    if model.heads % tensor:
        return f"model.heads ({model.heads}) must be a multiple of parallel.tensor ({tensor})"
    kv = model.n_kv_heads
    if kv % tensor and tensor % kv:
        return f"model.kv_heads ({kv}) must be a multiple or a divisor of parallel.tensor ({tensor})"
    return None


def ffn_divides_over_tensor(config: Config) -> str | None:
    """MLP features are cut over the tensor axis."""
    width, tensor = config.model.n_ffn, config.parallel.tensor
    if width % tensor:
        return f"model.ffn_hidden ({width}) must be a multiple of parallel.tensor ({tensor})"
    return None


def sequence_divides_over_tensor(config: Config) -> str | None:
    """Sequence parallelism gives each tensor rank an equal part of the sequence."""
    sequence, tensor, context = config.model.sequence, config.parallel.tensor, config.parallel.context
    if config.parallel.sequence and sequence % (tensor * context):
        of = f"parallel.tensor ({tensor})"
        if context > 1:
            of = f"parallel.tensor x parallel.context ({tensor} x {context})"
        return (
            f"parallel.sequence needs model.sequence ({sequence}) to be a multiple of {of}: change one of them or set "
            f"parallel.sequence to false"
        )
    return None


def context_divides(config: Config) -> str | None:
    """A ring rank holds two chunks of the sequence; Ulysses deals heads out."""
    parallel, model = config.parallel, config.model
    context = parallel.context
    if context == 1:
        return None
    if parallel.context_method == "ring":
        if model.sequence % (2 * context):
            return (
                f"ring attention needs model.sequence ({model.sequence}) to be a multiple of 2 x parallel.context "
                f"({2 * context})"
            )
        return None
    if model.sequence % context:
        return f"model.sequence ({model.sequence}) must be a multiple of parallel.context ({context})"
    kv = max(1, model.n_kv_heads // parallel.tensor)
    if kv % context:
        return (
            f"parallel.context_method = ulysses needs the {kv} key/value heads of a tensor rank to be a multiple of "
            f"parallel.context ({context}): change one of them or use ring"
        )
    return None


def vocabulary_covers_tensor(config: Config) -> str | None:
    """Every tensor rank holds a row of the embedding; 0 is resolved and checked with the data."""
    vocab, tensor = config.model.vocab_size, config.parallel.tensor
    if vocab and vocab < tensor:
        return f"model.vocab_size ({vocab}) must be at least parallel.tensor ({tensor}), or 0 to take the data's"
    return None


def stages_have_blocks(config: Config) -> str | None:
    """Every pipeline stage holds a block; embedding and head share the first and last."""
    layers, ranks, chunks = config.model.layers, config.parallel.pipeline, config.parallel.chunks
    if layers < ranks * chunks:
        stages = f"parallel.pipeline ({ranks})"
        if chunks > 1:
            stages = f"parallel.pipeline x parallel.chunks ({ranks} x {chunks})"
        return f"every pipeline stage needs a block but model.layers ({layers}) is below {stages}: change one of them"
    return None


def schedule_fits(config: Config) -> str | None:
    """Every schedule has its number of stages a rank; interleaving takes microbatches in groups."""
    parallel, train = config.parallel, config.train
    name, chunks = parallel.schedule, parallel.chunks
    if name == "interleaved" and chunks < 2:
        return f"parallel.schedule = interleaved needs parallel.chunks of at least 2, not {chunks}"
    if name == "zb-v" and chunks != 2:
        return f"parallel.schedule = zb-v needs parallel.chunks = 2, not {chunks}"
    if name in ("1f1b", "gpipe", "zb-h1") and chunks != 1:
        return f"parallel.schedule = {name} has one stage per rank: set parallel.chunks to 1, not {chunks}"
    microbatches = train.global_batch // (train.microbatch * parallel.data)
    if name == "interleaved" and microbatches % parallel.pipeline:
        return (
            f"parallel.schedule = interleaved needs microbatches in multiples of parallel.pipeline "
            f"({parallel.pipeline}), not train.global_batch / (train.microbatch x parallel.data) = {microbatches}"
        )
    return None


def offload_fits(config: Config) -> str | None:
    """Only what is gathered before each use can live elsewhere."""
    parallel = config.parallel
    if parallel.offload == "parameters" and parallel.zero != 3:
        return (
            f"parallel.offload = 'parameters' needs parallel.zero = 3, not {parallel.zero}: change one of them, or set "
            f"parallel.offload to 'optimizer'"
        )
    return None


def recompute_has_layers(config: Config) -> str | None:
    """A number of layers belongs to a policy."""
    parallel = config.parallel
    if parallel.recompute == "none" and parallel.recompute_layers:
        return (
            f"parallel.recompute_layers ({parallel.recompute_layers}) needs parallel.recompute = 'selective' or "
            f"'full', not 'none': set it to 0 or change one of them"
        )
    return None


def dropout_tells_heads_apart(config: Config) -> str | None:
    """The counter of a dropout mask holds 10 bits of the head's number."""
    model = config.model
    if model.attention_dropout and model.heads > MOST_HEADS:
        return (
            f"model.attention_dropout needs at most {MOST_HEADS} heads, not model.heads = {model.heads}: set it to 0 "
            f"or take fewer heads"
        )
    return None


def layers_per_stage_fit(config: Config) -> str | None:
    """An explicit split names every stage once and every block once."""
    split, layers = config.parallel.layers_per_stage, config.model.layers
    stages = config.parallel.pipeline * config.parallel.chunks
    if not split:
        return None
    if len(split) != stages:
        made = f"parallel.pipeline = {config.parallel.pipeline} and parallel.chunks = {config.parallel.chunks}"
        return f"parallel.layers_per_stage has {len(split)} entries, but {made} make {stages} stages"
    if min(split) < 1:
        return f"parallel.layers_per_stage holds {min(split)} but every stage needs at least 1 block"
    if sum(split) != layers:
        return f"parallel.layers_per_stage sums to {sum(split)} but model.layers is {layers}"
    return None


def batch_divides(config: Config) -> str | None:
    """A step is a whole number of microbatches on every data-parallel rank."""
    batch, micro, data = config.train.global_batch, config.train.microbatch, config.parallel.data
    if batch % (micro * data):
        return (
            f"train.global_batch ({batch}) must be a multiple of train.microbatch x parallel.data = {micro} x {data} "
            f"= {micro * data}"
        )
    return None


def split_sums_to_one(config: Config) -> str | None:
    """Training, validation and test shares."""
    split = config.data.split
    shown = "[" + ", ".join(f"{share:g}" for share in split) + "]"
    if len(split) != 3:
        return f"data.split must be three shares (training, validation, test), not {shown}"
    if min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        return f"data.split must be three shares of at least 0 that sum to 1 but {shown} sums to {sum(split):g}"
    if split[0] == 0:
        return f"data.split {shown} leaves nothing for training: make its first share positive"
    return None


def weights_match_paths(config: Config) -> str | None:
    """One positive weight per path and stage, or none at all; with stages a path may rest in some."""
    weights, paths, stages = config.data.weights, config.data.paths, config.data.stages
    if (weights or stages) and len(weights) != len(paths) * (len(stages) + 1):
        each = f" in each of {len(stages) + 1} stages" if stages else ""
        return f"data.weights has {len(weights)} entries for {len(paths)} data.paths{each}"
    if stages and (min(stages) < 1 or stages != sorted(set(stages))):
        return f"data.stages must be numbers of samples that rise from above 0, not {stages}"
    if weights and (min(weights) < 0 or (min(weights) == 0 and not stages)):
        return f"data.weights holds {min(weights):g} but every weight must be greater than 0: drop the path instead"
    if "" in paths:
        return f"data.paths holds an empty path at position {paths.index('')}"
    return None


def objective_fits_architecture(config: Config) -> str | None:
    """Causal attention learns the next token, full attention learns hidden ones."""
    architecture, objective = config.model.architecture, config.data.objective
    wanted = "masked" if architecture == "encoder" else "causal"
    if objective != wanted:
        return (
            f"model.architecture = '{architecture}' needs data.objective = '{wanted}', not '{objective}': change one "
            f"of them"
        )
    return None


def masked_objective_hides(config: Config) -> str | None:
    """What the masked objective needs, and what only the causal one may have."""
    data, vocab = config.data, config.model.vocab_size
    if data.mask_token < -1:
        return f"data.mask_token must be a token id or -1 for the tokenizer's own, not {data.mask_token}"
    if data.objective != "masked":
        return None
    if data.mask_probability == 0:
        return "data.mask_probability is 0, which leaves data.objective = 'masked' nothing to predict"
    if vocab and data.mask_token >= vocab:
        return f"data.mask_token ({data.mask_token}) must be below model.vocab_size ({vocab})"
    if data.eod_mask_loss:
        return "data.eod_mask_loss belongs to data.objective = 'causal' but this one is 'masked': set it to false"
    return None


def warmup_ends_before_decay(config: Config) -> str | None:
    """The decay needs steps after the warm-up."""
    schedule = config.schedule
    end = schedule.decay or clock(config, config.train.steps)
    if schedule.kind in ("cosine", "linear") and schedule.warmup >= end:
        source = "schedule.decay" if schedule.decay else "train.steps"
        return f"schedule.warmup ({schedule.warmup}) must be below {source} ({end}), where the decay ends"
    return None


def schedule_is_described(config: Config) -> str | None:
    """Each schedule has what it needs, and nothing that only another one reads."""
    schedule = config.schedule
    kind, end = schedule.kind, schedule.decay or clock(config, config.train.steps)
    if kind != "wsd" and schedule.cooldown:
        return f"schedule.cooldown ({schedule.cooldown}) belongs to schedule.kind = 'wsd' but this one is '{kind}'"
    if kind != "piecewise" and (schedule.milestones or schedule.factors):
        return f"schedule.milestones and schedule.factors belong to schedule.kind = 'piecewise', not to '{kind}'"
    if kind == "wsd" and not 0 < schedule.cooldown <= end - schedule.warmup:
        return (
            f"schedule.kind = 'wsd' needs schedule.cooldown between 1 and {end - schedule.warmup}, the steps from "
            f"schedule.warmup ({schedule.warmup}) to the end of the decay ({end}), not {schedule.cooldown}"
        )
    if kind == "inverse-sqrt" and not schedule.warmup:
        return "schedule.kind = 'inverse-sqrt' needs schedule.warmup of at least 1, from which the rate falls, not 0"
    if kind != "piecewise":
        return None
    milestones, factors = schedule.milestones, schedule.factors
    if not milestones or len(milestones) != len(factors):
        return (
            f"schedule.kind = 'piecewise' needs one of schedule.factors for each of schedule.milestones, not "
            f"{len(factors)} for {len(milestones)}"
        )
    if sorted(set(milestones)) != milestones or milestones[0] < schedule.warmup:
        return (
            f"schedule.milestones must rise from schedule.warmup ({schedule.warmup}) or later, not "
            f"{', '.join(map(str, milestones))}"
        )
    return f"schedule.factors must be at least 0, not {min(factors):g}" if min(factors) < 0 else None


def loss_scale_is_exact(config: Config) -> str | None:
    """Scaling by a power of two changes no gradient bit (arXiv 1710.03740)."""
    scale = config.precision.initial_loss_scale
    if config.precision.dtype == "fp16" and (scale < 1 or math.frexp(scale)[0] != 0.5):
        return f"precision.initial_loss_scale must be a power of two of at least 1 under fp16, not {scale:g}"
    return None


def run_dir_is_named(config: Config) -> str | None:
    """A run writes somewhere."""
    if not config.train.run_dir.strip() or "\0" in config.train.run_dir:
        return f"train.run_dir must name a folder, not {config.train.run_dir!r}"
    return None


def allowed_changes_are_keys(config: Config) -> str | None:
    """A misspelt key would allow nothing, and be found out at the next resume."""
    for name in config.checkpoint.allow_changes:
        table, _, key = name.partition(".")
        if not hasattr(getattr(config, table, None), key):
            return f"checkpoint.allow_changes names {name!r}, which is no key: write it as train.global_batch"
    return None


def skipped_batches_exist(config: Config) -> str | None:
    """Batches are counted from 0, each once."""
    skipped = config.data.skip_batches
    if skipped and (min(skipped) < 0 or len(set(skipped)) < len(skipped)):
        return f"data.skip_batches must name batches from 0 on, each once, not {skipped}"
    return None


RULES = (
    heads_divide_hidden,
    kv_heads_divide_heads,
    rope_needs_even_heads,
    heads_divide_over_tensor,
    ffn_divides_over_tensor,
    sequence_divides_over_tensor,
    context_divides,
    experts_fit,
    expert_mesh_fits,
    vocabulary_covers_tensor,
    stages_have_blocks,
    recompute_has_layers,
    dropout_tells_heads_apart,
    layers_per_stage_fit,
    batch_divides,
    *RAMP_RULES,
    schedule_fits,
    offload_fits,
    split_sums_to_one,
    weights_match_paths,
    objective_fits_architecture,
    masked_objective_hides,
    warmup_ends_before_decay,
    schedule_is_described,
    loss_scale_is_exact,
    run_dir_is_named,
    allowed_changes_are_keys,
    skipped_batches_exist,
)
