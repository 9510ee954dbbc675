"""What every version of an op may take for granted: the shapes and types of a call, by op.

A rule has the op's parameters and returns the reason why no version can do the call, or "". Rules look at shapes and
types alone: they read no value, so nothing waits for a device, and they vanish from a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def common(*tensors: Any) -> str:
    """The first tensor's type is one that kernels compute in, and all lie on its device; 0-d tensors are numbers."""
    x = tensors[0]
    if not isinstance(x, Tensor):
        return ""
    if x.dtype not in FLOATS:
        return f"its input is {_kind(x.dtype)}, not fp32, bf16, fp16 or fp64"
    for other in tensors[1:]:
        if isinstance(other, Tensor) and other.dim() and other.device != x.device:
            return f"its tensors are on {x.device} and {other.device}"
    return ""


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wants(name: str, x: Tensor | None, shape: list[int]) -> str:
    return "" if x is None or list(x.shape) == shape else f"{name} must be {shape}, not {list(x.shape)}"


def _like(name: str, other: Tensor, x: Tensor) -> str:
    if other.shape == x.shape and other.dtype == x.dtype:
        return ""
    return f"{name} must be {_kind(x.dtype)} {list(x.shape)}, not {_kind(other.dtype)} {list(other.shape)}"


def _integers(name: str, x: Tensor, rows: int) -> str:
    if x.dtype == torch.int64 and list(x.shape) == [rows]:
        return ""
    return f"{name} must be int64 [{rows}], not {_kind(x.dtype)} {list(x.shape)}"


def _features(x: Tensor) -> str:
    return "" if x.dim() and x.shape[-1] else f"its input must have features, not shape {list(x.shape)}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> str:
    """x [..., h], weight [h]."""
    return _features(x) or _wants("weight", weight, [x.shape[-1]])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> str:
    """x [..., h], weight and bias [h]."""
    return rms_norm(x, weight, eps) or _wants("bias", bias, [x.shape[-1]])


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str:
    """x and residual alike [..., h], weight [h]."""
    return _like("residual", residual, x) or rms_norm(x, weight, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> str:
    """x and residual alike [..., h], weight and bias [h]."""
    return _like("residual", residual, x) or layer_norm(x, weight, bias, eps)


def gated(gate_up: Tensor) -> str:
    """gate_up [..., 2f]."""
    if gate_up.dim() and gate_up.shape[-1] % 2 == 0:
        return ""
    return f"gate and up must be equally wide, not {list(gate_up.shape)} together"


def bias_gelu(x: Tensor, bias: Tensor) -> str:
    """x [..., f], bias [f]."""
    return _features(x) or _wants("bias", bias, [x.shape[-1]])


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> str:
    """x [seq, batch, heads, dim], cos and sin [seq, batch, dim/2]."""
    if x.dim() != 4 or x.shape[-1] % 2:
        return f"its input must be [seq, batch, heads, an even dim], not {list(x.shape)}"
    shape = [x.shape[0], x.shape[1], x.shape[3] // 2]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if cos.dtype != wide or sin.dtype != wide:
        return f"its tables must be {_kind(wide)}, not {_kind(cos.dtype)} and {_kind(sin.dtype)}"
    return _wants("the table of cosines", cos, shape) or _wants("the table of sines", sin, shape)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, in_place: bool = False
) -> str:
    """q and k [seq, batch, heads, dim] of one type, cos and sin [seq, batch, dim/2]."""
    if q.dtype != k.dtype:
        return f"q and k must be of one type, not {_kind(q.dtype)} and {_kind(k.dtype)}"
    return rope(q, cos, sin) or rope(k, cos, sin)


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, asking: Tensor, keys: Tensor, other: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None, **more: Any,
) -> str:  # fmt: skip
    """q and asking alike [s, b, hq, d], keys [s + t - 1, hq, d], other [s, b, hq] with segments [s, b] and [t, b]."""
    if q.dim() != 4 or k.dim() != 4:
        return f"q and k must be [seq, batch, heads, dim], not {list(q.shape)} and {list(k.shape)}"
    (s, b, heads, d), (t, _, groups, _) = q.shape, k.shape
    if (other is None) != (segments is None):
        return "what a key of another segment adds needs the segments, and they need it"
    found = _wants("k", k, [t, b, groups, d]) or _like("v", v, k) or _like("asking", asking, q)
    found = found or _wants("keys", keys, [s + t - 1, heads, d])
    for name, x, shape in (("other", other, [s, b, heads]), *zip(("segments of queries", "segments of keys"),
                           segments or (None, None), ([s, b], [t, b]))):  # fmt: skip
        found = found or _wants(name, x, shape)
    return found


def ce_statistics(logits: Tensor, targets: Tensor, valid: int) -> str:
    """logits [n, v], targets int64 [n], 0 <= valid <= v."""
    if logits.dim() != 2 or not 0 <= valid <= logits.shape[1]:
        return f"{valid} valid columns do not fit logits {list(logits.shape)}"
    return _integers("targets", targets, logits.shape[0])


def ce_gradient_(
    logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, valid: int, **terms: float
) -> str:
    """As ``ce_statistics``, with lse and scale [n]."""
    rows = list(logits.shape[:1])
    return ce_statistics(logits, targets, valid) or _wants("lse", lse, rows) or _wants("scale", scale, rows)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, valid: int, *, main_grad: Tensor | None, **more: Any
) -> str:
    """x [n, h], weight and main_grad [v, h] (x's type and a wide one), targets int64 and scale [n], valid <= v."""
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        return (
            f"input [n, h] and weight [v, h] of one type are needed, not {_kind(x.dtype)} {list(x.shape)} and "
            f"{_kind(weight.dtype)} {list(weight.shape)}"
        )
    if not 0 <= valid <= weight.shape[0]:
        return f"{valid} valid columns do not fit weight {list(weight.shape)}"
    found = _integers("targets", targets, x.shape[0]) or _wants("scale", scale, [x.shape[0]])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not found and main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != wide):
        found = (
            f"main_grad must be {_kind(wide)} {list(weight.shape)}, not {_kind(main_grad.dtype)} "
            f"{list(main_grad.shape)}"
        )
    return found


def dropout(x: Tensor, *, positions: Tensor, samples: Tensor, probability: float, **numbers: int) -> str:
    """x [P, B, h], positions int64 [P], samples int64 [B]."""
    if x.dim() != 3:
        return f"its input must be [positions, samples, features], not {list(x.shape)}"
    return _integers("positions", positions, x.shape[0]) or _integers("samples", samples, x.shape[1])


def bias_dropout_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor, *, positions: Tensor, samples: Tensor, probability: float,
    **numbers: int,
) -> str:  # fmt: skip
    """x and residual alike [P, B, h], bias [h], positions int64 [P], samples int64 [B]."""
    found = dropout(x, positions=positions, samples=samples, probability=probability)
    return found or _wants("bias", bias, [x.shape[-1]]) or _like("residual", residual, x)


def weight_gradient_(main_grad: Tensor, dy: Tensor, x: Tensor) -> str:
    """main_grad [out, in] (fp32, or fp64), dy [n, out] and x [n, in] of one type."""
    fits = dy.dim() == x.dim() == 2 and dy.shape[0] == x.shape[0] and dy.dtype == x.dtype
    if fits and list(main_grad.shape) == [dy.shape[1], x.shape[1]]:
        return ""
    shapes = " and ".join(f"{_kind(t.dtype)} {list(t.shape)}" for t in (dy, x))
    return f"dy [n, out] and x [n, in] of one type must fit main_grad {list(main_grad.shape)}, not {shapes}"


def adamw_(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor | None, **numbers: Any
) -> str:
    """Shards of one length: fp32 (or fp64) ones of one type, and the model's copy."""
    tensors = [master, gradient, exp_avg, exp_avg_sq]
    if any(t.shape != master.shape for t in tensors) or (model is not None and model.shape != master.shape):
        shapes = [list(t.shape) for t in [*tensors, model] if t is not None]
        return f"all shards must be of one length, not {shapes}"
    if master.dtype in (torch.float32, torch.float64) and all(t.dtype == master.dtype for t in tensors):
        return ""
    return f"master, gradient and averages must all be fp32 or all fp64, not {[_kind(t.dtype) for t in tensors]}"


def top_k(scores: Tensor, k: int) -> str:
    """scores [..., experts], 0 < k <= experts."""
    experts = scores.shape[-1] if scores.dim() else 0
    return "" if 0 < k <= experts else f"{k} choices cannot be made among {experts} experts"


def permute(x: Tensor, source: Tensor, rows: Tensor) -> str:
    """x [n, h], source int64 [N], rows int64 [n, k]."""
    if x.dim() != 2 or rows.dim() != 2 or rows.dtype != torch.int64 or rows.shape[0] != x.shape[0]:
        found = f"{_kind(rows.dtype)} {list(rows.shape)}"
        return f"rows must be int64 [tokens, choices] of the input {list(x.shape)}, not {found}"
    return _integers("source", source, source.numel())


def unpermute(y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> str:
    """y [N, h], weights [n, k], source int64 [N], rows int64 [n, k]."""
    if y.dim() != 2 or rows.dim() != 2 or rows.dtype != torch.int64:
        return f"rows must be int64 [tokens, choices], not {_kind(rows.dtype)} {list(rows.shape)}"
    return _integers("source", source, y.shape[0]) or _wants("weights", weights, list(rows.shape))


def grouped_mm(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> str:
    """x [N, in] and weight [experts, out, in] of one type, sizes of the experts' rows."""
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1] or weight.dtype != x.dtype:
        return (
            f"input [rows, in] and weight [experts, out, in] of one type are needed, not {_kind(x.dtype)} "
            f"{list(x.shape)} and {_kind(weight.dtype)} {list(weight.shape)}"
        )
    return _cut(sizes, weight.shape[0], x.shape[0])


def grouped_dw_(main: Tensor, dy: Tensor, x: Tensor, sizes: Sequence[int]) -> str:
    """main [experts, out, in] (fp32, or fp64), dy [N, out] and x [N, in] of one type."""
    fits = dy.dim() == x.dim() == 2 and dy.shape[0] == x.shape[0] and dy.dtype == x.dtype
    if not fits or main.dim() != 3 or list(main.shape[1:]) != [dy.shape[1], x.shape[1]]:
        shapes = " and ".join(f"{_kind(t.dtype)} {list(t.shape)}" for t in (dy, x))
        return f"dy [rows, out] and x [rows, in] of one type must fit main {list(main.shape)}, not {shapes}"
    return _cut(sizes, main.shape[0], x.shape[0])


def _cut(sizes: Sequence[int], experts: int, rows: int) -> str:
    fits = len(sizes) == experts and sum(sizes) == rows and min(sizes, default=0) >= 0
    return "" if fits else f"{len(sizes)} sizes, {sum(sizes)} in all, do not cut {rows} rows for {experts} experts"


RULES: dict[str, Callable[..., str]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "add_layer_norm": add_layer_norm,
    "add_rms_norm": add_rms_norm,
    "swiglu": gated,
    "geglu": gated,
    "bias_gelu": bias_gelu,
    "rope": rope,
    "rope_qk": rope_qk,
    "relative_attention": relative_attention,
    "ce_statistics": ce_statistics,
    "ce_gradient_": ce_gradient_,
    "linear_cross_entropy": linear_cross_entropy,
    "dropout": dropout,
    "bias_dropout_residual": bias_dropout_residual,
    "weight_gradient_": weight_gradient_,
    "top_k": top_k,
    "permute": permute,
    "unpermute": unpermute,
    "grouped_mm": grouped_mm,
    "grouped_dw_": grouped_dw_,
    "adamw_": adamw_,
}
"""Ops without a row take any shape (``gelu``, ``square_sum``) or check themselves (``attention``)."""
