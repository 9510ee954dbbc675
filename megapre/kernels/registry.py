"""Which version of each op runs, and why: a literal table, the choice for one job, and the rows of ``megapre kernels``.

A version is named in [kernels] of the job file or picked by ``auto``: C++ first, then torch's own fused op, then the
reference. Under fp64 ``auto`` picks the references, since that type is for proofs. CUDA versions are taken by name
only: they have not yet been executed on a GPU.
"""

from __future__ import annotations

import importlib
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
    """``cpp``, ``torch``, ``sdpa``, ``cuda`` or ``reference``."""
    path: str
    """module:function under ``megapre.kernels``."""
    deterministic: tuple[str, ...] = BOTH
    """Device types on which two runs give the same bits."""


TABLE = (
    Version("layer_norm", "norm", "cpp", "norm:layer_norm_cpp"),
    Version("layer_norm", "norm", "torch", "norm:layer_norm_torch"),
    Version("layer_norm", "norm", "reference", "norm:layer_norm_reference"),
    Version("rms_norm", "norm", "cpp", "norm:rms_norm_cpp"),
    Version("rms_norm", "norm", "torch", "norm:rms_norm_torch"),
    Version("rms_norm", "norm", "reference", "norm:rms_norm_reference"),
    Version("rms_norm", "norm", "cuda", "norm:rms_norm_cuda"),
    Version("gelu", "activation", "cpp", "activation:gelu_cpp"),
    Version("gelu", "activation", "torch", "activation:gelu_torch"),
    Version("gelu", "activation", "reference", "activation:gelu_reference"),
    Version("swiglu", "activation", "cpp", "activation:swiglu_cpp"),
    Version("swiglu", "activation", "torch", "activation:swiglu_torch"),
    Version("swiglu", "activation", "reference", "activation:swiglu_reference"),
    Version("rope", "rope", "reference", "rope:apply_reference"),
    Version("attention", "attention", "sdpa", "attention:attention_sdpa", deterministic=("cpu",)),
    Version("attention", "attention", "reference", "attention:attention_reference"),
    Version("ce_statistics", "cross_entropy", "cpp", "cross_entropy:statistics_cpp"),
    Version("ce_statistics", "cross_entropy", "reference", "cross_entropy:statistics_reference"),
    Version("ce_gradient_", "cross_entropy", "cpp", "cross_entropy:gradient_cpp_"),
    Version("ce_gradient_", "cross_entropy", "reference", "cross_entropy:gradient_reference_"),
    Version("dropout", "dropout", "cpp", "dropout:dropout_cpp"),
    Version("dropout", "dropout", "reference", "dropout:dropout_reference"),
    Version("dropout", "dropout", "cuda", "dropout:dropout_cuda"),
)
"""Every version of every op; an op's rows stand in the order in which ``auto`` tries them."""


@dataclass(frozen=True)
class Kernels:
    """The chosen versions as callables; signatures in the op's file."""

    layer_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    gelu: Callable[..., Any]
    swiglu: Callable[..., Any]
    rope: Callable[..., Any]
    attention: Callable[..., Any]
    ce_statistics: Callable[..., Any]
    ce_gradient_: Callable[..., Any]
    dropout: Callable[..., Any]
    chosen: dict[str, str]
    """Op -> name of its version."""


OPS = tuple(field.name for field in fields(Kernels) if field.name != "chosen")


def usable(version: Version, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``version`` cannot run on ``device`` with activations of ``dtype``, or ""."""
    if version.name == "cpp":
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        return _narrow(dtype) or native.load()
    if version.name == "cuda":
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        return _narrow(dtype) or cuda.unavailable()
    return ""


def _narrow(dtype: torch.dtype) -> str:
    if dtype in (torch.float32, torch.bfloat16):
        return ""
    return f"handles fp32 and bf16, not {str(dtype).removeprefix('torch.')}"


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
    return next(version for version in versions if version.name != "cuda" and not usable(version, device, dtype))


def _load(version: Version) -> Callable[..., Any]:
    module, function = version.path.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"megapre.kernels.{module}"), function)
    return loaded
