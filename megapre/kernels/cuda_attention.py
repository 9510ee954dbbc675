"""Attention in CUDA (``csrc/cuda/attention.cuh``): bf16, heads of up to 256. Not yet executed on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapre.kernels import cuda
from megapre.kernels.attention import Gradients, Halves, Problem, Version
from megapre.kernels.mask import FEATURES, spans
from megapre.random import philox

TILE = 64


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
    delta: Tensor | None, p: Problem,
) -> None:  # fmt: skip
    m, d = p.mask, p.dropout
    (s, b, heads, width), t = q.shape, k.shape[0]
    extra = m.extra or p.bias is not None or d is not None
    tables: tuple[Any, ...] = (None,) * 6
    if extra:
        limit, order, asking, asked = m.tables(s, t, b, q.device)
        tables = (limit, order, asking, asked, spans(limit, asking, TILE), spans(order, asked, TILE))
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
    numbers = torch.tensor([*shape, key, step, threshold, p.wide, extra], dtype=torch.int64)
    cuda._call(
        "megapre_attention", *read, *([None] if grad is None else []), *results, lse, delta, *tables, bias, sites,
        samples, strides, numbers, p.scale, gain,
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
    dtype = torch.float32 if p.wide else q.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
    if q.numel() and k.numel():
        _call(q, k, v, do.to(q.dtype), [dq, dk, dv], lse.float().contiguous(), delta.float().contiguous(), p)
    return dq, dk, dv, None


attention_cuda = Version("cuda", FEATURES["cuda"], None, _forward, _backward, _refuses)
