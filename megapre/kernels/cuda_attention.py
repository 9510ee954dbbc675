"""Attention in CUDA (``csrc/cuda/attention.cuh``): bf16, heads of up to 256. Not yet executed on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.kernels import cuda
from megapre.kernels.attention import Gradients, Halves, Problem, Version, diagonals
from megapre.kernels.mask import FEATURES, spans
from megapre.random import philox

SPAN = 64
"""Queries or keys that one span of a mask tells of (``csrc/cuda/attention.cuh``)."""
PLAIN, MASKED, EVERYTHING = range(3)
"""Which kernels a call gets: causal or full alone, with tables of a mask, with bias or dropout too."""
KEYS = 128
"""Keys of a block of the backward pass, at most."""
BLOCKS = 128
"""Blocks of the backward pass that keep a GPU busy: heads' keys are shared among more until there are so many."""
SIZES = (32, 64, 128, 256)
"""Sizes of heads that there are kernels for; others are padded in shared memory."""
MOST_SPLITS = 8
"""Copies of dq at most."""


def _refuses(q: Tensor, k: Tensor) -> str:
    if q.dtype != torch.bfloat16:
        return f"CUDA attention handles bf16, not {q.dtype}"
    d = q.shape[3]
    return "" if d % 8 == 0 and d <= 256 else f"CUDA attention handles heads of up to 256 in steps of 8, not {d}"


def _rows(x: Tensor) -> Tensor:
    """x with features together and rows on 16 bytes, which cp.async needs."""
    whole = x.stride(3) == 1 and all(n % 8 == 0 for n in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if whole else x.contiguous()


def _call(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, results: list[Tensor | None], lse: Tensor,
    delta: Tensor | None, p: Problem, splits: int = 1, padded: int = 0, dbias: Tensor | None = None,
) -> None:  # fmt: skip
    m, d = p.mask, p.dropout
    (s, b, heads, width), t = q.shape, k.shape[0]
    kind = EVERYTHING if p.bias is not None or d is not None else MASKED if m.extra else PLAIN
    tables: tuple[Any, ...] = (None,) * 6
    if kind != PLAIN:
        limit, order, asking, asked = m.tables(s, t, b, q.device)
        tables = (limit, order, asking, asked, spans(limit, asking, SPAN), spans(order, asked, SPAN))
    bias = None if p.bias is None else p.bias.detach().float().contiguous()
    sites = samples = None
    key, step, threshold, gain = 0, 0, 0, 1.0
    if d is not None:
        sites = torch.tensor(d.sites, dtype=torch.int64, device=q.device)
        samples, gain = d.samples.contiguous(), 1 / (1 - d.probability)
        key, step, threshold = philox.mix(d.seed), d.step, philox.threshold(d.probability)
    read = [_rows(x) for x in (q, k, v)] + ([] if grad is None else [_rows(grad)])
    strides = torch.tensor([n for x in (*read, q)[:4] for n in x.stride()[:3]], dtype=torch.int64)
    shape = [s, t, b, heads, k.shape[2], width, m.causal, m.window, m.q_offset, m.k_offset]
    numbers = torch.tensor([*shape, key, step, threshold, p.wide, kind, splits, padded], dtype=torch.int64)
    cuda._call(
        "megapre_attention", *read, *([None] if grad is None else []), *results, lse, delta, *tables, bias, dbias,
        sites, samples, strides, numbers, p.scale, gain,
    )  # fmt: skip


def _forward(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Halves:
    s, b, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float32 if p.wide else q.dtype, device=q.device)
    lse = torch.empty((b, heads, s), dtype=torch.float32, device=q.device)
    if not k.shape[0]:
        return out.zero_(), lse.fill_(-torch.inf)
    _call(q, k, v, None, [out, None, None], lse, None, p)
    return out, lse


def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, p: Problem) -> Gradients:
    (s, b, heads, width), (t, _, groups, _) = q.shape, k.shape
    dtype = torch.float32 if p.wide else q.dtype
    splits = max(1, min(-(-BLOCKS // max(1, b * groups)), -(-t // KEYS), MOST_SPLITS))
    size = next(size for size in SIZES if width <= size)
    tiles_q, tiles_k = -(-s // SPAN), -(-t // SPAN)
    dq = torch.zeros((splits, b, heads, tiles_q * SPAN, size), dtype=torch.float32, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (k, v))
    dbias = None
    if p.bias is not None and p.bias.requires_grad:
        dbias = torch.zeros((heads, max(0, tiles_q + tiles_k - 1), 2 * SPAN), dtype=torch.float32, device=q.device)
    if q.numel() and k.numel():
        more, none = (0, tiles_q * SPAN - s), lse == -torch.inf
        base = F.pad((lse.float() / math.log(2)).masked_fill(none, torch.inf), more, value=torch.inf)
        less = F.pad(delta.float().masked_fill(none, 0.0), more)
        _call(q, k, v, do.to(q.dtype), [dq, dk, dv], base, less, p, splits, tiles_q * SPAN, dbias)
    along = None if dbias is None else diagonals(dbias, s, t).to(p.bias.dtype)  # type: ignore[union-attr]
    dq = dq.sum(0)[:, :, :s, :width].permute(2, 0, 1, 3) * p.scale
    return dq.to(dtype, memory_format=torch.contiguous_format), dk, dv, along


attention_cuda = Version("cuda", FEATURES["cuda"], None, _forward, _backward, _refuses)
