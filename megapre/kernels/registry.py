"""Which version of each op runs, and why: a literal table, the choice for one job, and the rows of ``megapre kernels``.

A version is named in [kernels] of the job file or picked by ``auto``: C++ first, then torch's own fused op, then the
reference. Under fp64 ``auto`` picks the references, since that type is for proofs. CUDA and Triton versions are taken
by name only: they have not yet been executed on a GPU.

A new version is one row of ``TABLE``; its module is imported when it is picked, and no sooner.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from megapre.config.schema import KernelsConfig
from megapre.kernels import cuda
from megapre.random import native

BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Version:
    """One way to compute one op."""

    op: str
    """Field of ``Kernels``."""
    key: str
    """Field of ``KernelsConfig`` that picks it."""
    name: str
    """``cpp``, ``torch``, ``sdpa``, ``triton``, ``cuda`` or ``reference``."""
    path: str
    """module:function under ``megapre.kernels``."""
    deterministic: tuple[str, ...] = BOTH
    """Device types on which two runs give the same bits."""


TABLE = (
    Version("layer_norm", "norm", "cpp", "norm:layer_norm_cpp"),
    Version("layer_norm", "norm", "torch", "norm:layer_norm_torch"),
    Version("layer_norm", "norm", "reference", "norm:layer_norm_reference"),
    Version("layer_norm", "norm", "triton", "triton.norm:layer_norm_triton"),
    Version("rms_norm", "norm", "cpp", "norm:rms_norm_cpp"),
    Version("rms_norm", "norm", "torch", "norm:rms_norm_torch"),
    Version("rms_norm", "norm", "reference", "norm:rms_norm_reference"),
    Version("rms_norm", "norm", "triton", "triton.norm:rms_norm_triton"),
    Version("rms_norm", "norm", "cuda", "norm:rms_norm_cuda"),
    Version("add_layer_norm", "norm", "cpp", "norm:add_layer_norm_cpp"),
    Version("add_layer_norm", "norm", "torch", "norm:add_layer_norm_torch"),
    Version("add_layer_norm", "norm", "reference", "norm:add_layer_norm_reference"),
    Version("add_layer_norm", "norm", "triton", "triton.norm:add_layer_norm_triton"),
    Version("add_rms_norm", "norm", "cpp", "norm:add_rms_norm_cpp"),
    Version("add_rms_norm", "norm", "torch", "norm:add_rms_norm_torch"),
    Version("add_rms_norm", "norm", "reference", "norm:add_rms_norm_reference"),
    Version("add_rms_norm", "norm", "triton", "triton.norm:add_rms_norm_triton"),
    Version("gelu", "activation", "cpp", "activation:gelu_cpp"),
    Version("gelu", "activation", "torch", "activation:gelu_torch"),
    Version("gelu", "activation", "reference", "activation:gelu_reference"),
    Version("gelu", "activation", "triton", "triton.activation:gelu_triton"),
    Version("swiglu", "activation", "cpp", "activation:swiglu_cpp"),
    Version("swiglu", "activation", "torch", "activation:swiglu_torch"),
    Version("swiglu", "activation", "reference", "activation:swiglu_reference"),
    Version("swiglu", "activation", "triton", "triton.activation:swiglu_triton"),
    Version("geglu", "activation", "cpp", "activation:geglu_cpp"),
    Version("geglu", "activation", "torch", "activation:geglu_torch"),
    Version("geglu", "activation", "reference", "activation:geglu_reference"),
    Version("geglu", "activation", "triton", "triton.activation:geglu_triton"),
    Version("bias_gelu", "activation", "cpp", "activation:bias_gelu_cpp"),
    Version("bias_gelu", "activation", "torch", "activation:bias_gelu_torch"),
    Version("bias_gelu", "activation", "reference", "activation:bias_gelu_reference"),
    Version("bias_gelu", "activation", "triton", "triton.activation:bias_gelu_triton"),
    Version("rope", "rope", "cpp", "rope:apply_cpp"),
    Version("rope", "rope", "reference", "rope:apply_reference"),
    Version("rope", "rope", "triton", "triton.rope:apply_triton"),
    Version("rope_qk", "rope", "cpp", "rope:rope_qk_cpp"),
    Version("rope_qk", "rope", "reference", "rope:rope_qk_reference"),
    Version("rope_qk", "rope", "triton", "triton.rope:rope_qk_triton"),
    Version("attention", "attention", "sdpa", "attention:attention_sdpa", deterministic=("cpu",)),
    Version("attention", "attention", "reference", "attention:attention_reference"),
    Version("ce_statistics", "cross_entropy", "cpp", "cross_entropy:statistics_cpp"),
    Version("ce_statistics", "cross_entropy", "reference", "cross_entropy:statistics_reference"),
    Version("ce_statistics", "cross_entropy", "triton", "triton.cross_entropy:statistics_triton"),
    Version("ce_gradient_", "cross_entropy", "cpp", "cross_entropy:gradient_cpp_"),
    Version("ce_gradient_", "cross_entropy", "reference", "cross_entropy:gradient_reference_"),
    Version("ce_gradient_", "cross_entropy", "triton", "triton.cross_entropy:gradient_triton_"),
    Version("linear_cross_entropy", "cross_entropy", "cpp", "linear_cross_entropy:linear_ce_cpp"),
    Version("linear_cross_entropy", "cross_entropy", "torch", "linear_cross_entropy:linear_ce_torch"),
    Version("linear_cross_entropy", "cross_entropy", "reference", "linear_cross_entropy:linear_ce_reference"),
    Version("linear_cross_entropy", "cross_entropy", "triton", "triton.linear_cross_entropy:linear_ce_triton"),
    Version("dropout", "dropout", "cpp", "dropout:dropout_cpp"),
    Version("dropout", "dropout", "reference", "dropout:dropout_reference"),
    Version("dropout", "dropout", "triton", "triton.dropout:dropout_triton"),
    Version("dropout", "dropout", "cuda", "dropout:dropout_cuda"),
    Version("bias_dropout_residual", "dropout", "cpp", "dropout:bias_dropout_residual_cpp"),
    Version("bias_dropout_residual", "dropout", "reference", "dropout:bias_dropout_residual_reference"),
    Version("bias_dropout_residual", "dropout", "triton", "triton.dropout:bias_dropout_residual_triton"),
    Version("adamw_", "optimizer", "cpp", "optimizer:adamw_cpp_"),
    Version("adamw_", "optimizer", "torch", "optimizer:adamw_torch_"),
    Version("adamw_", "optimizer", "reference", "optimizer:adamw_reference_"),
    Version("adamw_", "optimizer", "triton", "triton.optimizer:adamw_triton_"),
    Version("square_sum", "optimizer", "cpp", "optimizer:square_sum_cpp"),
    Version("square_sum", "optimizer", "torch", "optimizer:square_sum_torch"),
    Version("square_sum", "optimizer", "reference", "optimizer:square_sum_reference"),
    Version("square_sum", "optimizer", "triton", "triton.optimizer:square_sum_triton"),
)
"""Every version of every op; an op's rows stand in the order in which ``auto`` tries them."""

BY_NAME_ONLY = ("triton", "cuda")
"""Versions that ``auto`` leaves alone."""


@dataclass(frozen=True)
class Kernels:
    """The chosen versions as callables; signatures in the op's file."""

    layer_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_layer_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    gelu: Callable[..., Any]
    swiglu: Callable[..., Any]
    geglu: Callable[..., Any]
    bias_gelu: Callable[..., Any]
    rope: Callable[..., Any]
    rope_qk: Callable[..., Any]
    attention: Callable[..., Any]
    ce_statistics: Callable[..., Any]
    ce_gradient_: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    dropout: Callable[..., Any]
    bias_dropout_residual: Callable[..., Any]
    adamw_: Callable[..., Any]
    square_sum: Callable[..., Any]
    chosen: dict[str, str]
    """Op -> name of its version."""


OPS = tuple(field.name for field in fields(Kernels) if field.name != "chosen")


def usable(version: Version, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``version`` cannot run on ``device`` with activations of ``dtype``, or ""."""
    if version.name == "cpp":
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        return _narrow(dtype) or native.load()
    if version.name in ("triton", "cuda"):
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        return _narrow(dtype) or (cuda.unavailable() if version.name == "cuda" else _no_triton())
    return ""


def _narrow(dtype: torch.dtype) -> str:
    if dtype in (torch.float32, torch.bfloat16):
        return ""
    return f"handles fp32 and bf16, not {str(dtype).removeprefix('torch.')}"


def _no_triton() -> str:
    return "" if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"


def choose(config: KernelsConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The versions for a job on ``device`` with activations of ``dtype``.

    A named version that only some ops of its key have (``norm = "cuda"``) leaves the others to ``auto``; ``chosen``
    tells. Raises ValueError for a name that no op of the key has, or one that cannot run here.
    """
    picked = {op: _pick(op, config, device, dtype) for op in OPS}
    return Kernels(**{op: _load(version) for op, version in picked.items()},
                   chosen={op: version.name for op, version in picked.items()})


def rows(device: torch.device, dtype: torch.dtype, config: KernelsConfig | None = None) -> list[dict[str, Any]]:
    """One row per version: op, version, usable, why not, deterministic, picked (by ``config``, default ``auto``)."""
    chosen = {op: _pick(op, config or KernelsConfig(), device, dtype) for op in OPS}
    return [
        {
            "op": version.op,
            "version": version.name,
            "usable": not reason,
            "why not": reason,
            "deterministic": device.type in version.deterministic,
            "picked": chosen[version.op] is version,
        }
        for version in TABLE
        for reason in [usable(version, device, dtype)]
    ]


def _pick(op: str, config: KernelsConfig, device: torch.device, dtype: torch.dtype) -> Version:
    versions = [version for version in TABLE if version.op == op]
    key = versions[0].key
    wanted = getattr(config, key)
    of_key = {version.name for version in TABLE if version.key == key}
    if wanted != "auto" and wanted not in of_key:
        raise ValueError(f"{op} has no version {wanted!r}: set kernels.{key} to auto or one of {sorted(of_key)}")
    named = [version for version in versions if version.name == wanted]
    if named:
        reason = usable(named[0], device, dtype)
        if reason:
            others = [version.name for version in versions if not usable(version, device, dtype)]
            raise ValueError(f"{op} version {wanted!r} {reason}: set kernels.{key} to auto or one of {others}")
        return named[0]
    if dtype == torch.float64:
        return next(version for version in versions if version.name == "reference")
    return next(v for v in versions if v.name not in BY_NAME_ONLY and not usable(v, device, dtype))


def _load(version: Version) -> Callable[..., Any]:
    module, function = version.path.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"megapre.kernels.{module}"), function)
    return loaded
