"""Attention in Triton; formula, masks and options in ``megapre/kernels/attention.py`` and ``mask.py``.

A program takes a block of queries (forward, dq) or of keys (dk, dv) through tiles of the other side; no scores are kept
(arXiv 2307.08691). The backward pass is two kernels, each sum with one owner and one order: runs agree bit for bit.
Plain causal and full attention are compiled without anything else; EXTRA adds limits, documents and windows, and skips
tiles by their spans.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.attention import Gradients, Halves, Problem, Version
from megapre.kernels.mask import FEATURES, spans
from megapre.kernels.triton import launch
from megapre.kernels.triton.dropout import _words
from megapre.random import philox

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sight(rows, columns, row_at, column_at, ROWS: tl.constexpr, COLUMNS: tl.constexpr, window):
    """Whether a query of a tile, whose span is at ``rows``, may read a key of the tile whose span is at ``columns``."""
    last, q_from, q_to = tl.load(rows + 1), tl.load(rows + 2), tl.load(rows + 3)
    first, k_from, k_to = tl.load(columns), tl.load(columns + 2), tl.load(columns + 3)
    near = (row_at - (column_at + COLUMNS - 1) < window) & (column_at - (row_at + ROWS - 1) < window)
    return (first <= last) & (k_from <= q_to) & (k_to >= q_from) & near


@triton.jit
def _visible(
    i, j, s, t, q_offset, k_offset, window, limit, order, asking, asked, CAUSAL: tl.constexpr, EXTRA: tl.constexpr
):
    """Whether query i reads key j, for indices that broadcast."""
    seen = (i < s) & (j < t)
    if EXTRA:
        apart = i + q_offset - j - k_offset
        seen = seen & (tl.load(order + j, mask=j < t, other=0) <= tl.load(limit + i, mask=i < s, other=0))
        seen = seen & (tl.load(asked + j, mask=j < t, other=0) == tl.load(asking + i, mask=i < s, other=0))
        seen = seen & (apart < window) & (apart > -window)
    elif CAUSAL:
        seen = seen & (j + k_offset <= i + q_offset)
    return seen


@triton.jit
def _kept(i, j, q_offset, k_offset, sample, site, seed, step, threshold, gain):
    """Factors of dropout, 0 or gain, for indices i and j that broadcast."""
    place = j + k_offset
    zero = (i * 0 + j * 0).to(tl.uint32)
    k0 = zero + ((sample >> 32).to(tl.uint32) ^ seed.to(tl.uint32))
    a, b, c, d = _words(
        zero + sample.to(tl.uint32), zero + (i + q_offset).to(tl.uint32), zero + (place >> 2).to(tl.uint32),
        zero + site.to(tl.uint32), k0, zero + step.to(tl.uint32),
    )  # fmt: skip
    lane = place & 3
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    return tl.where(word >= threshold.to(tl.uint32), gain, 0.0)


@triton.jit
def _tile(x, first, rows, stride, width, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows [first, first + ROWS) of x, zeros where there is none."""
    i, c = first + tl.arange(0, ROWS), tl.arange(0, D)
    return tl.load(
        x + i[:, None].to(tl.int64) * stride + c[None, :], mask=(i[:, None] < rows) & (c[None, :] < width), other=0.0
    )


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def _forward(
    q, k, v, out, lse, limit, order, asking, asked, q_spans, k_spans, bias, sites, samples,
    s, t, batch, heads, groups, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
    q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    q += b * q_batch + head * q_head
    k += b * k_batch + group * k_head
    v += b * v_batch + group * v_head
    i = block * ROWS + tl.arange(0, ROWS)
    slope = scale * LOG2E
    mine = _tile(q, block * ROWS, s, q_row, width, ROWS, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    rows = tl.zeros([ROWS, D], tl.float32)
    stop = t
    if CAUSAL and not EXTRA:
        stop = tl.minimum(t, tl.maximum(0, block * ROWS + ROWS + q_offset - k_offset))
    for first in range(0, stop, COLUMNS):
        see = True
        if EXTRA:
            at_q = q_spans + (b * tl.cdiv(s, ROWS) + block) * 4
            at_k = k_spans + (b * tl.cdiv(t, COLUMNS) + first // COLUMNS) * 4
            see = _sight(at_q, at_k, block * ROWS + q_offset, first + k_offset, ROWS, COLUMNS, window)
        if see:
            j = first + tl.arange(0, COLUMNS)
            keys = _tile(k, first, t, k_row, width, COLUMNS, D)
            scores = tl.dot(mine, tl.trans(keys), input_precision="ieee") * slope
            seen = _visible(
                i[:, None], j[None, :], s, t, q_offset, k_offset, window, limit + b * s, order + b * t, asking + b * s,
                asked + b * t, CAUSAL, EXTRA,
            )  # fmt: skip
            if BIAS:
                at = head * (s + t - 1) + s - 1 - i[:, None] + j[None, :]
                scores += tl.load(bias + at, mask=(i[:, None] < s) & (j[None, :] < t), other=0.0) * LOG2E
            scores = tl.where(seen, scores, float("-inf"))
            most = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(most == float("-inf"), 0.0, most)
            weights = tl.math.exp2(scores - base[:, None])
            factor = tl.math.exp2(top - base)
            total = total * factor + tl.sum(weights, 1)
            if DROP:
                weights *= _kept(
                    i[:, None], j[None, :], q_offset, k_offset, tl.load(samples + b), tl.load(sites + head), seed, step,
                    threshold, gain,
                )  # fmt: skip
            values = _tile(v, first, t, v_row, width, COLUMNS, D)
            rows = rows * factor[:, None]
            rows = tl.dot(weights.to(values.dtype), values, rows, input_precision="ieee")
            top = most
    share = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    column = tl.arange(0, D)
    at = ((i[:, None].to(tl.int64) * batch + b) * heads + head) * width + column[None, :]
    inside = (i[:, None] < s) & (column[None, :] < width)
    tl.store(out + at, (rows * share[:, None]).to(out.dtype.element_ty), mask=inside)
    sum_ = tl.where(total == 0.0, float("-inf"), (top + tl.math.log2(tl.where(total == 0.0, 1.0, total))) * LN2)
    tl.store(lse + (b * heads + head) * s + i, sum_, mask=i < s)


@triton.jit
def _slopes(
    scores, inner, i, j, seen, lse, delta, head, b, s, t, scale, q_offset, k_offset, seed, step, threshold, gain, bias,
    sites, samples, BIAS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Weights as they leave dropout and gradients of the scores, for indices that broadcast."""
    scores = scores * (scale * LOG2E)
    if BIAS:
        at = head * (s + t - 1) + s - 1 - i + j
        scores += tl.load(bias + at, mask=(i < s) & (j < t), other=0.0) * LOG2E
    weights = tl.where(seen, tl.math.exp2(scores - lse), 0.0)
    dropped = weights
    if DROP:
        factor = _kept(
            i, j, q_offset, k_offset, tl.load(samples + b), tl.load(sites + head), seed, step, threshold, gain
        )
        dropped = weights * factor
        inner = inner * factor
    return dropped, weights * (inner - delta)


@triton.jit
def _statistics(lse, delta, i, s):
    """lse in base 2 and delta; a query that reads nothing has weights 0."""
    sums = tl.load(lse + i, mask=i < s, other=float("-inf"))
    reads = sums > float("-inf")
    return tl.where(reads, sums * LOG2E, float("inf")), tl.where(reads, tl.load(delta + i, mask=i < s, other=0.0), 0.0)


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def _backward_queries(
    q, k, v, grad, dq, lse, delta, limit, order, asking, asked, q_spans, k_spans, bias, sites, samples,
    s, t, batch, heads, groups, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
    q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, g_row, g_batch, g_head,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    k += b * k_batch + group * k_head
    v += b * v_batch + group * v_head
    i = block * ROWS + tl.arange(0, ROWS)
    mine = _tile(q + b * q_batch + head * q_head, block * ROWS, s, q_row, width, ROWS, D)
    up = _tile(grad + b * g_batch + head * g_head, block * ROWS, s, g_row, width, ROWS, D)
    sums, less = _statistics(lse + (b * heads + head) * s, delta + (b * heads + head) * s, i, s)
    rows = tl.zeros([ROWS, D], tl.float32)
    stop = t
    if CAUSAL and not EXTRA:
        stop = tl.minimum(t, tl.maximum(0, block * ROWS + ROWS + q_offset - k_offset))
    for first in range(0, stop, COLUMNS):
        see = True
        if EXTRA:
            at_q = q_spans + (b * tl.cdiv(s, ROWS) + block) * 4
            at_k = k_spans + (b * tl.cdiv(t, COLUMNS) + first // COLUMNS) * 4
            see = _sight(at_q, at_k, block * ROWS + q_offset, first + k_offset, ROWS, COLUMNS, window)
        if see:
            j = first + tl.arange(0, COLUMNS)
            keys = _tile(k, first, t, k_row, width, COLUMNS, D)
            values = _tile(v, first, t, v_row, width, COLUMNS, D)
            scores = tl.dot(mine, tl.trans(keys), input_precision="ieee")
            inner = tl.dot(up, tl.trans(values), input_precision="ieee")
            seen = _visible(
                i[:, None], j[None, :], s, t, q_offset, k_offset, window, limit + b * s, order + b * t, asking + b * s,
                asked + b * t, CAUSAL, EXTRA,
            )  # fmt: skip
            _, slopes = _slopes(
                scores, inner, i[:, None], j[None, :], seen, sums[:, None], less[:, None], head, b, s, t, scale,
                q_offset, k_offset, seed, step, threshold, gain, bias, sites, samples, BIAS, DROP,
            )  # fmt: skip
            rows = tl.dot(slopes.to(keys.dtype), keys, rows, input_precision="ieee")
    column = tl.arange(0, D)
    at = ((i[:, None].to(tl.int64) * batch + b) * heads + head) * width + column[None, :]
    tl.store(dq + at, (rows * scale).to(dq.dtype.element_ty), mask=(i[:, None] < s) & (column[None, :] < width))


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def _backward_keys(
    q, k, v, grad, dk, dv, lse, delta, limit, order, asking, asked, q_spans, k_spans, bias, sites, samples,
    s, t, batch, heads, groups, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
    q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, g_row, g_batch, g_head,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS keys through tiles of ROWS queries of every head that reads them; the scores are transposed."""
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    keys = _tile(k + b * k_batch + group * k_head, block * COLUMNS, t, k_row, width, COLUMNS, D)
    values = _tile(v + b * v_batch + group * v_head, block * COLUMNS, t, v_row, width, COLUMNS, D)
    to_keys = tl.zeros([COLUMNS, D], tl.float32)
    to_values = tl.zeros([COLUMNS, D], tl.float32)
    start = 0
    if CAUSAL and not EXTRA:
        start = tl.minimum(s, tl.maximum(0, block * COLUMNS + k_offset - q_offset)) // ROWS * ROWS
    each = heads // groups
    for head in range(group * each, (group + 1) * each):
        for first in range(start, s, ROWS):
            see = True
            if EXTRA:
                at_q = q_spans + (b * tl.cdiv(s, ROWS) + first // ROWS) * 4
                at_k = k_spans + (b * tl.cdiv(t, COLUMNS) + block) * 4
                see = _sight(at_q, at_k, first + q_offset, block * COLUMNS + k_offset, ROWS, COLUMNS, window)
            if see:
                i = first + tl.arange(0, ROWS)
                theirs = _tile(q + b * q_batch + head * q_head, first, s, q_row, width, ROWS, D)
                up = _tile(grad + b * g_batch + head * g_head, first, s, g_row, width, ROWS, D)
                sums, less = _statistics(lse + (b * heads + head) * s, delta + (b * heads + head) * s, i, s)
                scores = tl.dot(keys, tl.trans(theirs), input_precision="ieee")
                inner = tl.dot(values, tl.trans(up), input_precision="ieee")
                seen = _visible(
                    i[None, :], j[:, None], s, t, q_offset, k_offset, window, limit + b * s, order + b * t,
                    asking + b * s, asked + b * t, CAUSAL, EXTRA,
                )  # fmt: skip
                weights, slopes = _slopes(
                    scores, inner, i[None, :], j[:, None], seen, sums[None, :], less[None, :], head, b, s, t, scale,
                    q_offset, k_offset, seed, step, threshold, gain, bias, sites, samples, BIAS, DROP,
                )  # fmt: skip
                to_values = tl.dot(weights.to(up.dtype), up, to_values, input_precision="ieee")
                to_keys = tl.dot(slopes.to(theirs.dtype), theirs, to_keys, input_precision="ieee")
    column = tl.arange(0, D)
    at = ((j[:, None].to(tl.int64) * batch + b) * groups + group) * width + column[None, :]
    inside = (j[:, None] < t) & (column[None, :] < width)
    tl.store(dk + at, (to_keys * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, to_values.to(dv.dtype.element_ty), mask=inside)


def _tiles(width: int, dtype: torch.dtype, backward: bool) -> tuple[int, int, int, int]:
    """Rows, columns, warps and stages for heads padded to a power of two."""
    if dtype == torch.float32 or width > 128:
        return 32, 32, 4, 1
    if backward:
        return (64, 64, 4, 2) if width <= 64 else (64, 64, 8, 2)
    return (128, 64, 4, 3) if width <= 64 else (128, 64, 8, 2)


class _Call:
    """What the kernels share of one call's arguments."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, p: Problem, backward: bool) -> None:
        launch.check("attention", q, k, v, p.bias)
        m, d = p.mask, p.dropout
        (s, b, heads, width), t = q.shape, k.shape[0]
        size = max(16, launch.power_of_two(width))
        rows, columns, self.warps, self.stages = _tiles(size, q.dtype, backward)
        self.read = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)]
        none = q  # stands for a tensor that is not read
        self.tensors: list[Tensor] = [none] * 9
        if m.extra:
            limit, order, asking, asked = m.tables(s, t, b, q.device)
            self.tensors[:6] = [limit, order, asking, asked, spans(limit, asking, rows), spans(order, asked, columns)]
        if p.bias is not None:
            self.tensors[6] = p.bias.detach().float().contiguous()
        words = [0, 0, 0]
        if d is not None:
            self.tensors[7:] = [torch.tensor(d.sites, dtype=torch.int64, device=q.device), d.samples.contiguous()]
            words = launch.signed([philox.mix(d.seed), d.step, philox.threshold(d.probability)])
        gain = 1.0 if d is None else 1 / (1 - d.probability)
        window = m.window or 2**30
        self.numbers = [s, t, b, heads, k.shape[2], width, p.scale, m.q_offset, m.k_offset, window, *words, gain]
        self.constants: dict[str, Any] = dict(
            CAUSAL=m.causal, EXTRA=m.extra, BIAS=p.bias is not None, DROP=d is not None, D=size, ROWS=rows,
            COLUMNS=columns, num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip
        self.over_queries = (triton.cdiv(s, rows), heads, b)
        self.over_keys = (triton.cdiv(t, columns), k.shape[2], b)
        self.dtype = torch.float32 if p.wide else q.dtype

    def strides(self, *more: Tensor) -> list[int]:
        """Row, batch and head of q, k, v and more."""
        return [n for x in (*self.read, *more) for n in x.stride()[:3]]


def _forward_triton(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Halves:
    s, b, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float32 if p.wide else q.dtype, device=q.device)
    lse = torch.empty((b, heads, s), dtype=torch.float32, device=q.device)
    if not k.shape[0] or not q.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    call = _Call(q, k, v, p, backward=False)
    with launch.on(q):
        _forward[call.over_queries](
            *call.read, out, lse, *call.tensors, *call.numbers, *call.strides(), **call.constants
        )
    return out, lse


def _backward_triton(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, p: Problem) -> Gradients:
    call = _Call(q, k, v, p, backward=True)
    dq, dk, dv = (torch.zeros(x.shape, dtype=call.dtype, device=q.device) for x in (q, k, v))
    if not q.numel() or not k.numel():
        return dq, dk, dv, None
    grad = do.to(q.dtype).contiguous()
    rest = (lse.float().contiguous(), delta.float().contiguous(), *call.tensors, *call.numbers, *call.strides(grad))
    with launch.on(q):
        _backward_queries[call.over_queries](*call.read, grad, dq, *rest, **call.constants)
        _backward_keys[call.over_keys](*call.read, grad, dk, dv, *rest, **call.constants)
    return dq, dk, dv, None


attention_triton = Version("triton", FEATURES["triton"], None, _forward_triton, _backward_triton)
