"""Which version of each op runs, and why: a literal table, the choice for one job, and the rows of ``megapre kernels``.

A version is named in [kernels] of the job file or picked by ``auto``: C++ first, then torch's own fused op, then the
reference. Under fp64 ``auto`` picks the references, since that type is for proofs. CUDA, Triton and apex versions are
taken by name only: they have not yet been executed on a GPU here.

A new version is one row of ``TABLE``; its module is imported when it is picked, and no sooner. A call that the chosen
version cannot do goes to the first that can, and one that none can do is refused in a sentence (:class:`Op`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megapre.config.schema import KernelsConfig
from megapre.kernels import apex, cuda
from megapre.kernels.attention import Chain
from megapre.kernels.mask import FEATURES
from megapre.kernels.rules import RULES, common
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
    """``cpp``, ``torch``, ``sdpa``, ``triton``, ``cuda``, ``apex`` or ``reference``."""
    path: str
    """module:function under ``megapre.kernels``."""
    deterministic: tuple[str, ...] = BOTH
    """Device types on which two runs give the same bits, as far as is known."""
    strided: bool = True
    """Whether it takes tensors whose last dimension does not lie in one piece."""
    features: tuple[str, ...] = ()
    """What a call may ask of it beyond the least; one that asks for more goes to the op's next version that can."""


TABLE = (
    Version("layer_norm", "norm", "cpp", "norm:layer_norm_cpp"),
    Version("layer_norm", "norm", "torch", "norm:layer_norm_torch"),
    Version("layer_norm", "norm", "reference", "norm:layer_norm_reference"),
    Version("layer_norm", "norm", "triton", "triton.norm:layer_norm_triton"),
    Version("layer_norm", "norm", "cuda", "cuda_functions:layer_norm"),
    Version("layer_norm", "norm", "apex", "apex:layer_norm_apex", deterministic=()),
    Version("rms_norm", "norm", "cpp", "norm:rms_norm_cpp"),
    Version("rms_norm", "norm", "torch", "norm:rms_norm_torch"),
    Version("rms_norm", "norm", "reference", "norm:rms_norm_reference"),
    Version("rms_norm", "norm", "triton", "triton.norm:rms_norm_triton"),
    Version("rms_norm", "norm", "cuda", "cuda_functions:rms_norm"),
    Version("rms_norm", "norm", "apex", "apex:rms_norm_apex", deterministic=()),
    Version("add_layer_norm", "norm", "cpp", "norm:add_layer_norm_cpp"),
    Version("add_layer_norm", "norm", "torch", "norm:add_layer_norm_torch"),
    Version("add_layer_norm", "norm", "reference", "norm:add_layer_norm_reference"),
    Version("add_layer_norm", "norm", "triton", "triton.norm:add_layer_norm_triton"),
    Version("add_layer_norm", "norm", "cuda", "cuda_functions:add_layer_norm"),
    Version("add_rms_norm", "norm", "cpp", "norm:add_rms_norm_cpp"),
    Version("add_rms_norm", "norm", "torch", "norm:add_rms_norm_torch"),
    Version("add_rms_norm", "norm", "reference", "norm:add_rms_norm_reference"),
    Version("add_rms_norm", "norm", "triton", "triton.norm:add_rms_norm_triton"),
    Version("add_rms_norm", "norm", "cuda", "cuda_functions:add_rms_norm"),
    Version("gelu", "activation", "cpp", "activation:gelu_cpp"),
    Version("gelu", "activation", "torch", "activation:gelu_torch"),
    Version("gelu", "activation", "reference", "activation:gelu_reference"),
    Version("gelu", "activation", "triton", "triton.activation:gelu_triton"),
    Version("gelu_exact", "activation", "torch", "activation:gelu_exact_torch"),
    Version("gelu_exact", "activation", "reference", "activation:gelu_exact_reference"),
    Version("relu", "activation", "torch", "activation:relu_torch"),
    Version("relu", "activation", "reference", "activation:relu_reference"),
    Version("swiglu", "activation", "cpp", "activation:swiglu_cpp"),
    Version("swiglu", "activation", "torch", "activation:swiglu_torch"),
    Version("swiglu", "activation", "reference", "activation:swiglu_reference"),
    Version("swiglu", "activation", "triton", "triton.activation:swiglu_triton"),
    Version("swiglu", "activation", "cuda", "cuda_functions:swiglu"),
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
    Version("rope", "rope", "cuda", "cuda_functions:rope"),
    Version("rope_qk", "rope", "cpp", "rope:rope_qk_cpp"),
    Version("rope_qk", "rope", "reference", "rope:rope_qk_reference"),
    Version("rope_qk", "rope", "triton", "triton.rope:rope_qk_triton"),
    Version("rope_qk", "rope", "cuda", "cuda_functions:rope_qk"),
    Version("attention", "attention", "cpp", "attention:attention_cpp", features=FEATURES["cpp"]),
    Version("attention", "attention", "flash", "attention:attention_flash", (), features=FEATURES["flash"]),
    Version("attention", "attention", "sdpa", "attention:attention_sdpa", ("cpu",), features=FEATURES["sdpa"]),
    Version("attention", "attention", "reference", "attention:attention_reference", features=FEATURES["reference"]),
    Version("attention", "attention", "triton", "triton.attention:attention_triton", features=FEATURES["triton"]),
    Version("attention", "attention", "cuda", "cuda_attention:attention_cuda", features=FEATURES["cuda"]),
    Version("relative_attention", "attention", "torch", "relative_attention:relative_attention_torch"),
    Version("relative_attention", "attention", "reference", "relative_attention:relative_attention_reference"),
    Version("ce_statistics", "cross_entropy", "cpp", "cross_entropy:statistics_cpp"),
    Version("ce_statistics", "cross_entropy", "reference", "cross_entropy:statistics_reference"),
    Version("ce_statistics", "cross_entropy", "triton", "triton.cross_entropy:statistics_triton", strided=False),
    Version("ce_statistics", "cross_entropy", "cuda", "cuda:cross_entropy_statistics", strided=False),
    Version("ce_gradient_", "cross_entropy", "cpp", "cross_entropy:gradient_cpp_"),
    Version("ce_gradient_", "cross_entropy", "reference", "cross_entropy:gradient_reference_"),
    Version("ce_gradient_", "cross_entropy", "triton", "triton.cross_entropy:gradient_triton_", strided=False),
    Version("ce_gradient_", "cross_entropy", "cuda", "cuda:cross_entropy_gradient_", strided=False),
    Version("linear_cross_entropy", "cross_entropy", "cpp", "linear_cross_entropy:linear_ce_cpp"),
    Version("linear_cross_entropy", "cross_entropy", "torch", "linear_cross_entropy:linear_ce_torch"),
    Version("linear_cross_entropy", "cross_entropy", "reference", "linear_cross_entropy:linear_ce_reference"),
    Version("linear_cross_entropy", "cross_entropy", "triton", "triton.linear_cross_entropy:linear_ce_triton"),
    Version("linear_cross_entropy", "cross_entropy", "cuda", "cuda_functions:linear_cross_entropy"),
    Version("dropout", "dropout", "cpp", "dropout:dropout_cpp"),
    Version("dropout", "dropout", "reference", "dropout:dropout_reference"),
    Version("dropout", "dropout", "triton", "triton.dropout:dropout_triton"),
    Version("dropout", "dropout", "cuda", "dropout:dropout_cuda"),
    Version("bias_dropout_residual", "dropout", "cpp", "dropout:bias_dropout_residual_cpp"),
    Version("bias_dropout_residual", "dropout", "reference", "dropout:bias_dropout_residual_reference"),
    Version("bias_dropout_residual", "dropout", "triton", "triton.dropout:bias_dropout_residual_triton"),
    Version("weight_gradient_", "linear", "cpp", "weight_gradient:weight_gradient_cpp_"),
    Version("weight_gradient_", "linear", "reference", "weight_gradient:weight_gradient_reference_"),
    Version("top_k", "moe", "cpp", "moe:top_k_cpp"),
    Version("top_k", "moe", "reference", "moe:top_k_reference"),
    Version("top_k", "moe", "triton", "triton.moe:top_k_triton"),
    Version("permute", "moe", "cpp", "moe:permute_cpp"),
    Version("permute", "moe", "reference", "moe:permute_reference"),
    Version("permute", "moe", "triton", "triton.moe:permute_triton"),
    Version("unpermute", "moe", "cpp", "moe:unpermute_cpp"),
    Version("unpermute", "moe", "reference", "moe:unpermute_reference"),
    Version("unpermute", "moe", "triton", "triton.moe:unpermute_triton"),
    Version("grouped_mm", "moe", "cpp", "moe:grouped_mm_cpp"),
    Version("grouped_mm", "moe", "reference", "moe:grouped_mm_reference"),
    Version("grouped_mm", "moe", "triton", "triton.moe:grouped_mm_triton"),
    Version("grouped_dw_", "moe", "cpp", "moe:grouped_dw_cpp_", strided=False),
    Version("grouped_dw_", "moe", "reference", "moe:grouped_dw_reference_"),
    Version("grouped_dw_", "moe", "triton", "triton.moe:grouped_dw_triton_", strided=False),
    Version("adamw_", "optimizer", "cpp", "optimizer:adamw_cpp_", strided=False),
    Version("adamw_", "optimizer", "torch", "optimizer:adamw_torch_", strided=False),
    Version("adamw_", "optimizer", "reference", "optimizer:adamw_reference_"),
    Version("adamw_", "optimizer", "triton", "triton.optimizer:adamw_triton_", strided=False),
    Version("adamw_", "optimizer", "cuda", "cuda:adamw_", strided=False),
    Version("adamw_", "optimizer", "apex", "apex:adamw_apex_", deterministic=(), strided=False),
    Version("square_sum", "optimizer", "cpp", "optimizer:square_sum_cpp", strided=False),
    Version("square_sum", "optimizer", "torch", "optimizer:square_sum_torch"),
    Version("square_sum", "optimizer", "reference", "optimizer:square_sum_reference"),
    Version("square_sum", "optimizer", "triton", "triton.optimizer:square_sum_triton", strided=False),
    Version("square_sum", "optimizer", "cuda", "cuda:square_sum", strided=False),
)
"""Every version of every op; an op's rows stand in the order in which ``auto`` tries them."""

BY_NAME_ONLY = ("triton", "cuda", "apex")
"""Versions that ``auto`` leaves alone."""

DEVICES = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda", "apex": "cuda", "flash": "cuda"}
"""Device type of the versions that run on one alone."""

DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "apex": (torch.float32, torch.bfloat16, torch.float16),
    "flash": (torch.bfloat16, torch.float16),
}
"""Types of activations that a version handles; versions without a row handle all."""
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Kernels:
    """The chosen versions as callables; signatures in the op's file."""

    layer_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_layer_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    gelu: Callable[..., Any]
    gelu_exact: Callable[..., Any]
    relu: Callable[..., Any]
    swiglu: Callable[..., Any]
    geglu: Callable[..., Any]
    bias_gelu: Callable[..., Any]
    rope: Callable[..., Any]
    rope_qk: Callable[..., Any]
    attention: Any  # Chain
    relative_attention: Callable[..., Any]
    ce_statistics: Callable[..., Any]
    ce_gradient_: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    dropout: Callable[..., Any]
    bias_dropout_residual: Callable[..., Any]
    weight_gradient_: Callable[..., Any]
    top_k: Callable[..., Any]
    permute: Callable[..., Any]
    unpermute: Callable[..., Any]
    grouped_mm: Callable[..., Any]
    grouped_dw_: Callable[..., Any]
    adamw_: Callable[..., Any]
    square_sum: Callable[..., Any]
    chosen: dict[str, str]
    """Op -> name of its version."""


OPS = tuple(field.name for field in fields(Kernels) if field.name != "chosen")


@dataclass(frozen=True)
class Op:
    """One op as the engine calls it: the chosen version, or for a call it cannot do the first that can."""

    version: Version
    """The chosen one."""
    function: Callable[..., Any]
    """Its callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op. Raises ValueError, naming op, reason and versions, for a call that no version can do."""
        name, x = self.version.op, args[0]
        rule = RULES.get(name)
        reason = common(*args, *kwargs.values()) or (rule(*args, **kwargs) if rule else "")
        if reason:
            tried = [version.name for version in TABLE if version.op == name and not usable(version, x.device, x.dtype)]
            raise ValueError(f"{name} cannot do this call: {reason} (versions tried: {', '.join(tried) or 'none'})")
        tensors = [t for t in args if isinstance(t, Tensor) and t.dim()]
        types = [t.dtype for t in tensors if t.is_floating_point()]
        scattered = not self.version.strided and any(t.numel() > 1 and t.stride(-1) != 1 for t in tensors)
        if tensors and (scattered or not _fits(self.version, x.device, types)):
            return _load(_first(name, x.device, types, scattered))(*args, **kwargs)
        return self.function(*args, **kwargs)


def _fits(version: Version, device: torch.device, types: list[torch.dtype]) -> bool:
    """Whether ``version`` is for this device and these types; its library was looked for when it was chosen."""
    handled = DTYPES.get(version.name, types)
    return DEVICES.get(version.name, device.type) == device.type and all(t in handled for t in types)


def usable(version: Version, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``version`` cannot run on ``device`` with activations of ``dtype``, or ""."""
    home, types = DEVICES.get(version.name, device.type), DTYPES.get(version.name, (dtype,))
    if home != device.type:
        return f"runs on {'the CPU' if home == 'cpu' else 'CUDA devices'}, not on {device.type}"
    if dtype not in types:
        *most, last = [SHORT[t] for t in types]
        return f"handles {', '.join(most)} and {last}, not {SHORT.get(dtype, str(dtype).removeprefix('torch.'))}"
    return _library(version)


def _library(version: Version) -> str:
    """What the version needs and this machine lacks, or ""."""
    if version.name == "cpp":
        return native.load()
    if version.name == "cuda":
        return cuda.unavailable()
    if version.name == "triton":
        return "" if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"
    if version.name == "flash":
        return "" if importlib.util.find_spec("flash_attn") else "needs the package flash-attn, which is not installed"
    if version.name == "apex":
        return apex.missing_adam() if version.op == "adamw_" else apex.missing_norms()
    return ""


def report(kernels: Kernels, device: torch.device) -> list[str]:
    """Lines for the start of a run: which versions it uses, and which failed to build or load on this device."""
    used: dict[str, list[str]] = {}
    for op, name in kernels.chosen.items():
        used.setdefault(name, []).append(op)
    lines = ["kernels: " + "; ".join(f"{name}: {', '.join(ops)}" for name, ops in used.items())]
    broken: dict[tuple[str, str], list[str]] = {}
    for version in TABLE:
        # apex is a guest: its absence is no failure. Others belong to the installation.
        reason = _library(version) if DEVICES.get(version.name) == device.type and version.name != "apex" else ""
        if reason:
            broken.setdefault((version.name, reason), []).append(version.op)
    return lines + [f"kernels: no {name} version of {', '.join(ops)}: it {why}" for (name, why), ops in broken.items()]


def choose(config: KernelsConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The versions for a job on ``device`` with activations of ``dtype``.

    A named version that only some ops of its key have (``norm = "cuda"``) leaves the others to ``auto``; ``chosen``
    tells. Raises ValueError for a name that no op of the key has, or one that cannot run here.
    """
    picked = {op: _pick(op, config, device, dtype) for op in OPS}
    return Kernels(**{op: _callable(version, device, dtype) for op, version in picked.items()},
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
            "features": " ".join(version.features),
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
    return _first(op, device, [dtype])


def _first(op: str, device: torch.device, types: list[torch.dtype], scattered: bool = False) -> Version:
    """What ``auto`` picks for tensors of all these types; ``scattered``: among the versions that take strided ones."""
    versions = [version for version in TABLE if version.op == op]
    if torch.float64 in types:
        return next(version for version in versions if version.name == "reference")
    return next(
        v for v in versions
        if v.name not in BY_NAME_ONLY and (v.strided or not scattered) and not any(usable(v, device, t) for t in types)
    )  # fmt: skip


def _callable(version: Version, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The version as the engine calls it; where it has features, with those after it for calls that ask for others."""
    if not version.features:
        return Op(version, _load(version))
    others = [v for v in TABLE if v.op == version.op and v is not version and v.name not in BY_NAME_ONLY]
    usable_ones = [version, *(v for v in others if not usable(v, device, dtype))]
    return Chain(tuple(_load(v) for v in usable_ones))  # type: ignore[misc]


def _load(version: Version) -> Callable[..., Any]:
    module, function = version.path.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"megapre.kernels.{module}"), function)
    return loaded
