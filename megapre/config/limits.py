"""What every field of a job may be, alone: the choices of strings and the ranges of numbers, for ``check.py``."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from megapre.config.schema import Config

CHOICES = {
    "model.architecture": ("decoder", "encoder", "encoder_decoder", "two_stream", "replaced_token"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "gelu_exact", "relu", "swiglu", "geglu"),
    "model.norm_placement": ("pre", "post"),
    "model.positions": ("learned", "sinusoidal", "rope", "alibi", "t5", "transformer_xl", "none"),
    "model.init": ("scaled", "normal", "depth", "xavier", "he", "tfixup"),
    "model.rope_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    "model.router_scores": ("softmax", "sigmoid"),
    "data.tokenizer_type": (
        "HuggingFaceTokenizer",
        "SentencePieceTokenizer",
        "GPT2BPETokenizer",
        "BertWordPieceLowerCase",
        "BertWordPieceCase",
        "TikTokenizer",
        "ByteTokenizer",
        "NullTokenizer",
    ),
    "data.packing": ("concatenate", "best-fit"),
    "data.objective": (
        "causal",
        "infill",
        "prefix",
        "masked",
        "next_sentence",
        "sentence_order",
        "replaced",
        "permuted",
        "span_corruption",
        "denoising",
    ),
    "data.mask_unit": ("token", "word", "span"),
    "parallel.schedule": ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"),
    "parallel.context_method": ("ring", "ulysses"),
    "parallel.recompute": ("none", "selective", "full"),
    "parallel.zero": (0, 1, 2, 3),
    "parallel.offload": ("none", "optimizer", "parameters"),
    "optimizer.kind": ("adamw", "lion", "muon", "adafactor"),
    "schedule.unit": ("steps", "samples", "tokens"),
    "schedule.kind": ("cosine", "linear", "wsd", "inverse-sqrt", "piecewise", "plateau", "constant"),
    "precision.dtype": ("fp32", "bf16", "fp16", "fp64"),
    "train.device": ("auto", "cpu", "cuda"),
    "resilience.on_nonfinite": ("skip", "rerun"),
    "kernels.norm": ("auto", "cpp", "torch", "reference", "triton", "cuda", "apex"),
    "kernels.attention": ("auto", "cpp", "flash", "sdpa", "torch", "reference", "triton", "cuda"),
    "kernels.activation": ("auto", "cpp", "torch", "reference", "triton", "cuda"),
    "kernels.rope": ("auto", "cpp", "reference", "triton", "cuda"),
    "kernels.cross_entropy": ("auto", "cpp", "torch", "reference", "triton", "cuda"),
    "kernels.dropout": ("auto", "cpp", "reference", "triton", "cuda"),
    "kernels.linear": ("auto", "cpp", "reference"),
    "kernels.moe": ("auto", "cpp", "reference", "triton"),
    "kernels.optimizer": ("auto", "cpp", "torch", "reference", "triton", "cuda", "apex"),
}

COUNT, NATURAL, POSITIVE, NON_NEGATIVE = "at least 1", "at least 0", "greater than 0", "at least 0"
SHARE, PROBABILITY = "between 0 and 1", "at least 0 and below 1"
RANGES = {
    "model.layers": COUNT,
    "model.encoder_layers": NATURAL,
    "model.generator_layers": NATURAL,
    "model.generator_hidden": NATURAL,
    "model.detection_loss": POSITIVE,
    "model.hidden": COUNT,
    "model.heads": COUNT,
    "model.kv_heads": NATURAL,
    "model.head_size": NATURAL,
    "model.ffn_hidden": NATURAL,
    "model.vocab_size": NATURAL,
    "model.sequence": COUNT,
    "model.source_sequence": NATURAL,
    "model.norm_eps": POSITIVE,
    "model.rope_theta": POSITIVE,
    "model.rope_factor": POSITIVE,
    "model.rope_original": NATURAL,
    "model.rope_low": POSITIVE,
    "model.rope_high": NON_NEGATIVE,
    "model.rope_attention": NON_NEGATIVE,
    "model.relative_buckets": COUNT,
    "model.relative_distance": COUNT,
    "model.relative_clamp": NATURAL,
    "model.window": NATURAL,
    "model.embedding_size": NATURAL,
    "model.embedding_scale": POSITIVE,
    "model.output_scale": POSITIVE,
    "model.token_types": NATURAL,
    "model.sentence_classes": NATURAL,
    "model.attention_scale": NON_NEGATIVE,
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
    "data.fraction": SHARE,
    "data.mask_probability": PROBABILITY,
    "data.mask_span": POSITIVE,
    "data.delete_probability": PROBABILITY,
    "data.permute_sentences": SHARE,
    "data.rotate_documents": SHARE,
    "data.fim_rate": SHARE,
    "data.fim_spm_rate": SHARE,
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
    "optimizer.momentum": PROBABILITY,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NON_NEGATIVE,
    "optimizer.clip": NON_NEGATIVE,
    "optimizer.router_bias_rate": NON_NEGATIVE,
    "schedule.warmup": NATURAL,
    "schedule.decay": NATURAL,
    "schedule.min_lr_ratio": SHARE,
    "schedule.cooldown": NATURAL,
    "schedule.patience": NATURAL,
    "schedule.plateau_factor": PROBABILITY,
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


def fields_fit(config: Config) -> str | None:
    """Every field alone: finite, in its choices, in its range."""
    for table in fields(config):
        values = getattr(config, table.name)
        for entry in fields(values):
            name = f"{table.name}.{entry.name}"
            value = getattr(values, entry.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and not (math.isfinite(number) and abs(number) <= LARGEST):
                    return f"{name} must be a finite number below 2^63, not {number}"
            if name in CHOICES and value not in CHOICES[name]:
                return f"{name} must be {_either(CHOICES[name])}, not {value!r}"
            if name in RANGES and not _within(value, RANGES[name]):
                return f"{name} must be {RANGES[name]}, not {value}"
    return None


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
