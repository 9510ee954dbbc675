"""The compiled library ``megapre/_C*.so``: loading it, and the fake versions of its ops.

Nothing needs the library: every op it holds has a plain-torch reference, and ``load`` says in one sentence why
it is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def load() -> str:
    """Load the C++ ops as ``torch.ops.megapre.*``; returns "" when they are there, else the reason in words."""
    return _load()


# What torch.compiler.assume_constant_result does, which loads the compiler for it: 140 MiB of every rank.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _load() -> str:
    found = sorted(Path(__file__).resolve().parent.parent.glob("_C*.so"))
    if not found:
        return "megapre/_C*.so is not built (pip install -e . --no-build-isolation builds it)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error}"
    for name, fake in FAKES.items():
        torch.library.register_fake(f"megapre::{name}", fake)
    return ""


def _fill(out: Tensor, *_: object) -> None:
    return None


def _keep_mask(key: int, step: int, sites: list[int], positions: Tensor, samples: Tensor, first: int, features: int,
               probability: float) -> Tensor:
    return positions.new_empty((len(sites), positions.shape[0], samples.shape[0], features), dtype=torch.bool)


def _like_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _like_second(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _half_width(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _layer_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[0]), dtype=torch.float32)


def _rms_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((1, x.shape[0]), dtype=torch.float32)


def _layer_backward(grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _rms_backward(grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((1, x.shape[1]), dtype=torch.float32)


def _add_layer_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((2, x.shape[0]), dtype=torch.float32)


def _add_rms_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((1, x.shape[0]), dtype=torch.float32)


def _bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)


def _rope(xs: list[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


def _scalar(flat: Tensor) -> Tensor:
    return flat.new_empty((), dtype=torch.float32)


def _ce_statistics(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty((4, logits.shape[0]), dtype=torch.float32)


def _head_logits(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    rows, blocks = x.shape[0], -(-weight.shape[0] // 512)
    return x.new_empty((blocks, 4, -(-rows // 32) * 32), dtype=torch.float32)[:, :, :rows]


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    s, b, heads, _ = q.shape
    out = q.new_empty(q.shape, dtype=torch.float32 if rest[-1] else q.dtype)
    return out, q.new_empty((b, heads, s), dtype=torch.float32)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    dtype, bias = torch.float32 if rest[-1] else q.dtype, rest[4]
    dbias = q.new_empty(bias.shape if isinstance(bias, Tensor) else (0, 0), dtype=torch.float32)
    return (*(x.new_empty(x.shape, dtype=dtype) for x in (q, k, v)), dbias)


def _attention_delta(grad: Tensor, out: Tensor) -> Tensor:
    s, b, heads, _ = out.shape
    return out.new_empty((b, heads, s), dtype=torch.float32)


def _top_k(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)


def _combine(y: Tensor, weights: Tensor | None, rows: Tensor) -> Tensor:
    return y.new_empty((rows.shape[0], y.shape[1]))


def _spread(grad: Tensor, y: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty(rows.shape, dtype=torch.float32)


def _grouped_mm(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


FAKES: dict[str, Callable[..., object]] = {
    "philox_normal_": _fill,
    "keep_mask": _keep_mask,
    "dropout": _like_first,
    "layer_norm_forward": _layer_forward,
    "layer_norm_backward": _layer_backward,
    "rms_norm_forward": _rms_forward,
    "rms_norm_backward": _rms_backward,
    "gelu_forward": _like_first,
    "gelu_backward": _like_second,
    "swiglu_forward": _half_width,
    "swiglu_backward": _like_second,
    "add_layer_norm_forward": _add_layer_forward,
    "add_rms_norm_forward": _add_rms_forward,
    "bias_gelu_forward": _like_first,
    "bias_gelu_backward": _bias_gelu_backward,
    "geglu_forward": _half_width,
    "geglu_backward": _like_second,
    "bias_dropout_residual": _like_first,
    "rope": _rope,
    "rope_": _fill,
    "adamw_": _fill,
    "accumulate_": _fill,
    "square_sum": _scalar,
    "cross_entropy_statistics": _ce_statistics,
    "cross_entropy_gradient_": _fill,
    "head_logits": _head_logits,
    "head_gradient_": _fill,
    "add_product_": _fill,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_delta": _attention_delta,
    "moe_top_k": _top_k,
    "moe_combine": _combine,
    "moe_spread": _spread,
    "grouped_mm": _grouped_mm,
    "grouped_dw_": _fill,
}
"""Shapes and dtypes of every op of the library, for fake tensors and torch.compile."""
