"""Attention in Triton; formula, masks and options in ``megapre/kernels/attention.py`` and ``mask.py``.

A program takes a block of queries (forward, dq) or of keys (dk, dv) through tiles of the other side; no scores are kept
(arXiv 2307.08691). The backward pass is two kernels, each sum with one owner and one order: runs agree bit for bit.
Plain causal and full attention are compiled without anything else, with a loop for whole tiles that knows neither masks
nor bounds, and another for those that the diagonal or an end cuts; EXTRA adds limits, documents and windows, and skips
tiles by their spans.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.attention import Gradients, Halves, Problem, Version, diagonals
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
def _tile(x, first, rows, stride, width, ROWS: tl.constexpr, D: tl.constexpr, CUT: tl.constexpr, PAD: tl.constexpr):
    """Rows [first, first + ROWS) of x; zeros beyond its last row (where CUT says there may be one) and its width."""
    i, c = tl.arange(0, ROWS), tl.arange(0, D)
    start = tl.full([], 1, tl.int64) * first * stride  # of the whole tile, so that the rest fits 32 bits and stays
    at = x + start + (i[:, None] * stride + c[None, :])
    if CUT:
        return tl.load(at, mask=(first + i[:, None] < rows) & (c[None, :] < width), other=0.0)
    if PAD:
        return tl.load(at, mask=c[None, :] < width, other=0.0)
    return tl.load(at)


@triton.jit
def _keys_of(first, s, t, q_offset, k_offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
             PLAIN: tl.constexpr):  # fmt: skip
    """Of the queries from ``first`` on: keys in tiles without any mask, keys in all."""
    whole, stop = t // COLUMNS * COLUMNS, t
    if CAUSAL:
        reads = tl.maximum(0, first + q_offset - k_offset + 1)  # the first query's keys
        whole = tl.minimum(whole, reads // COLUMNS * COLUMNS)
        stop = tl.minimum(t, tl.maximum(0, first + ROWS + q_offset - k_offset))
    if not PLAIN:
        whole, stop = 0, t
    return whole, stop


@triton.jit
def _attend(
    mine, top, total, rows, i, first, block, head, b, k, v, limit, order, asking, asked, q_spans, k_spans, bias, sites,
    samples, s, t, width, scale, q_offset, k_offset, window, seed, step, threshold, gain, k_row, v_row,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One tile of keys for a block of queries: top, total and rows with it."""
    j = first + tl.arange(0, COLUMNS)
    slope = scale * LOG2E
    keys = _tile(k, first, t, k_row, width, COLUMNS, D, CUT, PAD)
    scores = tl.dot(mine, tl.trans(keys), input_precision="ieee")
    if BIAS:
        at = head * (s + t - 1) + s - 1 - i[:, None] + j[None, :]
        scores += tl.load(bias + at, mask=(i[:, None] < s) & (j[None, :] < t), other=0.0) / scale
    if CUT:
        seen = _visible(
            i[:, None], j[None, :], s, t, q_offset, k_offset, window, limit + b * s, order + b * t, asking + b * s,
            asked + b * t, CAUSAL, EXTRA,
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
    most = tl.maximum(top, tl.max(scores, 1) * slope)
    base = tl.where(most == float("-inf"), 0.0, most) if CUT else most
    weights = tl.math.exp2(scores * slope - base[:, None])
    factor = tl.math.exp2(top - base)
    total = total * factor + tl.sum(weights, 1)
    if DROP:
        weights *= _kept(
            i[:, None], j[None, :], q_offset, k_offset, tl.load(samples + b), tl.load(sites + head), seed, step,
            threshold, gain,
        )  # fmt: skip
    values = _tile(v, first, t, v_row, width, COLUMNS, D, CUT, PAD)
    rows = rows * factor[:, None]
    return most, total, tl.dot(weights.to(values.dtype), values, rows, input_precision="ieee")


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def _forward(
    q, k, v, out, lse, limit, order, asking, asked, q_spans, k_spans, bias, sites, samples,
    s, t, batch, heads, groups, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
    q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    q += b * q_batch + head * q_head
    k += b * k_batch + group * k_head
    v += b * v_batch + group * v_head
    i = block * ROWS + tl.arange(0, ROWS)
    mine = _tile(q, block * ROWS, s, q_row, width, ROWS, D, True, PAD)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    rows = tl.zeros([ROWS, D], tl.float32)
    PLAIN: tl.constexpr = not (EXTRA or BIAS or DROP)
    whole, stop = _keys_of(block * ROWS, s, t, q_offset, k_offset, ROWS, COLUMNS, CAUSAL and not EXTRA, PLAIN)
    if PLAIN:
        for first in range(0, whole, COLUMNS):
            top, total, rows = _attend(
                mine, top, total, rows, i, first, block, head, b, k, v, limit, order, asking, asked, q_spans, k_spans,
                bias, sites, samples, s, t, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
                k_row, v_row, CAUSAL, EXTRA, BIAS, DROP, D, ROWS, COLUMNS, PAD, False,
            )  # fmt: skip
    for first in range(whole, stop, COLUMNS):
        see = True
        if EXTRA:
            at_q = q_spans + (b * tl.cdiv(s, ROWS) + block) * 4
            at_k = k_spans + (b * tl.cdiv(t, COLUMNS) + first // COLUMNS) * 4
            see = _sight(at_q, at_k, block * ROWS + q_offset, first + k_offset, ROWS, COLUMNS, window)
        if see:
            top, total, rows = _attend(
                mine, top, total, rows, i, first, block, head, b, k, v, limit, order, asking, asked, q_spans, k_spans,
                bias, sites, samples, s, t, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
                k_row, v_row, CAUSAL, EXTRA, BIAS, DROP, D, ROWS, COLUMNS, PAD, True,
            )  # fmt: skip
    share = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    column = tl.arange(0, D)
    at = ((i[:, None].to(tl.int64) * batch + b) * heads + head) * width + column[None, :]
    inside = (i[:, None] < s) & (column[None, :] < width)
    tl.store(out + at, (rows * share[:, None]).to(out.dtype.element_ty), mask=inside)
    sum_ = tl.where(total == 0.0, float("-inf"), (top + tl.math.log2(tl.where(total == 0.0, 1.0, total))) * LN2)
    tl.store(lse + (b * heads + head) * s + i, sum_, mask=i < s)


@triton.jit
def _slopes(
    scores, inner, i, j, lse, delta, limit, order, asking, asked, head, b, s, t, scale, q_offset, k_offset, window,
    seed, step, threshold, gain, bias, sites, samples,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Weights as they leave dropout and gradients of the scores, for indices that broadcast."""
    scores = scores * (scale * LOG2E)
    if BIAS:
        at = head * (s + t - 1) + s - 1 - i + j
        scores += tl.load(bias + at, mask=(i < s) & (j < t), other=0.0) * LOG2E
    weights = tl.math.exp2(scores - lse)
    if CUT:
        seen = _visible(
            i, j, s, t, q_offset, k_offset, window, limit + b * s, order + b * t, asking + b * s, asked + b * t,
            CAUSAL, EXTRA,
        )  # fmt: skip
        weights = tl.where(seen, weights, 0.0)
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


@triton.jit
def _to_queries(
    mine, up, sums, less, rows, i, first, head, b, k, v, limit, order, asking, asked, bias, sites, samples, s, t, width,
    scale, q_offset, k_offset, window, seed, step, threshold, gain, k_row, v_row,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries with one tile of keys more."""
    j = first + tl.arange(0, COLUMNS)
    keys = _tile(k, first, t, k_row, width, COLUMNS, D, CUT, PAD)
    values = _tile(v, first, t, v_row, width, COLUMNS, D, CUT, PAD)
    scores = tl.dot(mine, tl.trans(keys), input_precision="ieee")
    inner = tl.dot(up, tl.trans(values), input_precision="ieee")
    _, slopes = _slopes(
        scores, inner, i[:, None], j[None, :], sums[:, None], less[:, None], limit, order, asking, asked, head, b, s, t,
        scale, q_offset, k_offset, window, seed, step, threshold, gain, bias, sites, samples, CAUSAL, EXTRA, BIAS, DROP,
        CUT,
    )  # fmt: skip
    return tl.dot(slopes.to(keys.dtype), keys, rows, input_precision="ieee")


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def _backward_queries(
    q, k, v, grad, dq, lse, delta, limit, order, asking, asked, q_spans, k_spans, bias, sites, samples,
    s, t, batch, heads, groups, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
    q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, g_row, g_batch, g_head,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    k += b * k_batch + group * k_head
    v += b * v_batch + group * v_head
    i = block * ROWS + tl.arange(0, ROWS)
    mine = _tile(q + b * q_batch + head * q_head, block * ROWS, s, q_row, width, ROWS, D, True, PAD)
    up = _tile(grad + b * g_batch + head * g_head, block * ROWS, s, g_row, width, ROWS, D, True, PAD)
    sums, less = _statistics(lse + (b * heads + head) * s, delta + (b * heads + head) * s, i, s)
    rows = tl.zeros([ROWS, D], tl.float32)
    PLAIN: tl.constexpr = not (EXTRA or BIAS or DROP)
    whole, stop = _keys_of(block * ROWS, s, t, q_offset, k_offset, ROWS, COLUMNS, CAUSAL and not EXTRA, PLAIN)
    if PLAIN:
        for first in range(0, whole, COLUMNS):
            rows = _to_queries(
                mine, up, sums, less, rows, i, first, head, b, k, v, limit, order, asking, asked, bias, sites, samples,
                s, t, width, scale, q_offset, k_offset, window, seed, step, threshold, gain, k_row, v_row, CAUSAL,
                EXTRA, BIAS, DROP, D, COLUMNS, PAD, False,
            )  # fmt: skip
    for first in range(whole, stop, COLUMNS):
        see = True
        if EXTRA:
            at_q = q_spans + (b * tl.cdiv(s, ROWS) + block) * 4
            at_k = k_spans + (b * tl.cdiv(t, COLUMNS) + first // COLUMNS) * 4
            see = _sight(at_q, at_k, block * ROWS + q_offset, first + k_offset, ROWS, COLUMNS, window)
        if see:
            rows = _to_queries(
                mine, up, sums, less, rows, i, first, head, b, k, v, limit, order, asking, asked, bias, sites, samples,
                s, t, width, scale, q_offset, k_offset, window, seed, step, threshold, gain, k_row, v_row, CAUSAL,
                EXTRA, BIAS, DROP, D, COLUMNS, PAD, True,
            )  # fmt: skip
    column = tl.arange(0, D)
    at = ((i[:, None].to(tl.int64) * batch + b) * heads + head) * width + column[None, :]
    tl.store(dq + at, (rows * scale).to(dq.dtype.element_ty), mask=(i[:, None] < s) & (column[None, :] < width))


@triton.jit
def _to_keys(
    keys, values, to_keys, to_values, j, first, head, b, q, grad, lse, delta, limit, order, asking, asked, bias, sites,
    samples, s, t, width, scale, q_offset, k_offset, window, seed, step, threshold, gain, q_row, g_row,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys with one tile of queries more; the scores are transposed."""
    i = first + tl.arange(0, ROWS)
    theirs = _tile(q, first, s, q_row, width, ROWS, D, CUT, PAD)
    up = _tile(grad, first, s, g_row, width, ROWS, D, CUT, PAD)
    sums, less = _statistics(lse, delta, i, s)
    scores = tl.dot(keys, tl.trans(theirs), input_precision="ieee")
    inner = tl.dot(values, tl.trans(up), input_precision="ieee")
    weights, slopes = _slopes(
        scores, inner, i[None, :], j[:, None], sums[None, :], less[None, :], limit, order, asking, asked, head, b, s, t,
        scale, q_offset, k_offset, window, seed, step, threshold, gain, bias, sites, samples, CAUSAL, EXTRA, BIAS, DROP,
        CUT,
    )  # fmt: skip
    to_values = tl.dot(weights.to(up.dtype), up, to_values, input_precision="ieee")
    return tl.dot(slopes.to(theirs.dtype), theirs, to_keys, input_precision="ieee"), to_values


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def _backward_keys(
    q, k, v, grad, dk, dv, lse, delta, limit, order, asking, asked, q_spans, k_spans, bias, sites, samples,
    s, t, batch, heads, groups, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
    q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, g_row, g_batch, g_head,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """COLUMNS keys through tiles of ROWS queries of every head that reads them."""
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    keys = _tile(k + b * k_batch + group * k_head, block * COLUMNS, t, k_row, width, COLUMNS, D, True, PAD)
    values = _tile(v + b * v_batch + group * v_head, block * COLUMNS, t, v_row, width, COLUMNS, D, True, PAD)
    to_keys = tl.zeros([COLUMNS, D], tl.float32)
    to_values = tl.zeros([COLUMNS, D], tl.float32)
    PLAIN: tl.constexpr = not (EXTRA or BIAS or DROP)
    # Queries [start, cut) and [last, s) lie in tiles that a mask or the end cuts, [cut, last) in whole ones.
    start, cut, last = 0, 0, s // ROWS * ROWS
    if CAUSAL and not EXTRA:
        ahead = tl.maximum(0, block * COLUMNS + k_offset - q_offset)
        start = tl.minimum(s, ahead) // ROWS * ROWS
        cut = tl.cdiv(tl.maximum(0, block * COLUMNS + COLUMNS - 1 + k_offset - q_offset), ROWS) * ROWS
    if block * COLUMNS + COLUMNS > t:
        cut = last
    cut = tl.minimum(cut, last) if PLAIN else last
    each = heads // groups
    for head in range(group * each, (group + 1) * each):
        from_q, from_g = q + b * q_batch + head * q_head, grad + b * g_batch + head * g_head
        of_lse, of_delta = lse + (b * heads + head) * s, delta + (b * heads + head) * s
        for part in tl.static_range(3):
            if part == 1:
                if PLAIN:
                    for first in range(cut, last, ROWS):
                        to_keys, to_values = _to_keys(
                            keys, values, to_keys, to_values, j, first, head, b, from_q, from_g, of_lse, of_delta,
                            limit, order, asking, asked, bias, sites, samples, s, t, width, scale, q_offset, k_offset,
                            window, seed, step, threshold, gain, q_row, g_row, CAUSAL, EXTRA, BIAS, DROP, D, ROWS, PAD,
                            False,
                        )  # fmt: skip
            else:
                for first in range(start if part == 0 else tl.maximum(start, last), cut if part == 0 else s, ROWS):
                    see = True
                    if EXTRA:
                        at_q = q_spans + (b * tl.cdiv(s, ROWS) + first // ROWS) * 4
                        at_k = k_spans + (b * tl.cdiv(t, COLUMNS) + block) * 4
                        see = _sight(at_q, at_k, first + q_offset, block * COLUMNS + k_offset, ROWS, COLUMNS, window)
                    if see:
                        to_keys, to_values = _to_keys(
                            keys, values, to_keys, to_values, j, first, head, b, from_q, from_g, of_lse, of_delta,
                            limit, order, asking, asked, bias, sites, samples, s, t, width, scale, q_offset, k_offset,
                            window, seed, step, threshold, gain, q_row, g_row, CAUSAL, EXTRA, BIAS, DROP, D, ROWS, PAD,
                            True,
                        )  # fmt: skip
    column = tl.arange(0, D)
    at = ((j[:, None].to(tl.int64) * batch + b) * groups + group) * width + column[None, :]
    inside = (j[:, None] < t) & (column[None, :] < width)
    tl.store(dk + at, (to_keys * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, to_values.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def _backward_bias(
    q, k, v, grad, partial, lse, delta, limit, order, asking, asked, q_spans, k_spans, bias, sites, samples,
    s, t, batch, heads, groups, width, scale, q_offset, k_offset, window, seed, step, threshold, gain,
    q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, g_row, g_batch, g_head,
    CAUSAL: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Sums over the diagonals of all tiles whose keys lie as many tiles behind their queries, of all samples."""
    head, tiles = tl.program_id(1), tl.cdiv(s, TILE)
    ahead, group = tl.program_id(0) - (tiles - 1), head // (heads // groups)
    along, place = tl.arange(0, TILE)[None, :], tl.arange(0, TILE)[:, None]
    behind, before = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)  # of keys - queries = n, and n - TILE
    for sample in range(0, batch):
        b = tl.program_id(2).to(tl.int64) + sample
        for tile in range(tl.maximum(0, -ahead), tl.minimum(tiles, tl.cdiv(t, TILE) - ahead)):
            i, j = tile * TILE + tl.arange(0, TILE), (tile + ahead) * TILE + tl.arange(0, TILE)
            mine = _tile(q + b * q_batch + head * q_head, tile * TILE, s, q_row, width, TILE, D, True, PAD)
            up = _tile(grad + b * g_batch + head * g_head, tile * TILE, s, g_row, width, TILE, D, True, PAD)
            keys = _tile(k + b * k_batch + group * k_head, (tile + ahead) * TILE, t, k_row, width, TILE, D, True, PAD)
            values = _tile(v + b * v_batch + group * v_head, (tile + ahead) * TILE, t, v_row, width, TILE, D, True, PAD)
            sums, less = _statistics(lse + (b * heads + head) * s, delta + (b * heads + head) * s, i, s)
            scores = tl.dot(mine, tl.trans(keys), input_precision="ieee")
            inner = tl.dot(up, tl.trans(values), input_precision="ieee")
            _, slopes = _slopes(
                scores, inner, i[:, None], j[None, :], sums[:, None], less[:, None], limit, order, asking, asked, head,
                b, s, t, scale, q_offset, k_offset, window, seed, step, threshold, gain, bias, sites, samples, CAUSAL,
                EXTRA, BIAS, DROP, True,
            )  # fmt: skip
            turned = tl.gather(slopes, (place + along) % TILE, 1)  # column n: diagonals n and n - TILE
            behind += tl.sum(tl.where(place + along < TILE, turned, 0.0), 0)
            before += tl.sum(tl.where(place + along < TILE, 0.0, turned), 0)
    n = tl.arange(0, TILE)
    out = partial + (head * tl.num_programs(0) + tl.program_id(0)) * 2 * TILE
    tl.store(out + TILE - 1 + n, behind)
    tl.store(out + n - 1, before, mask=n > 0)


def _tiles(width: int, dtype: torch.dtype, backward: bool) -> tuple[int, int, int, int]:
    """Rows, columns, warps and stages for heads padded to a power of two."""
    if not backward and width == 128 and dtype != torch.float32 and launch.hopper():
        return 128, 128, 8, 2
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
            COLUMNS=columns, PAD=size != width, num_warps=self.warps, num_stages=self.stages,
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
        along = None
        if p.bias is not None and p.bias.requires_grad:
            along = _bias_gradient(call, grad, rest, p).to(p.bias.dtype)
    return dq, dk, dv, along


def _bias_gradient(call: _Call, grad: Tensor, rest: tuple[Any, ...], p: Problem) -> Tensor:
    """fp32 [heads, s + t - 1] of a learned bias: tiles on one diagonal are one program's, in one order."""
    (s, _, heads, _), t = grad.shape, call.read[1].shape[0]
    tile = 64 if grad.dtype != torch.float32 and call.constants["D"] <= 128 else 32
    pairs = triton.cdiv(s, tile) + triton.cdiv(t, tile) - 1
    partial = torch.zeros((heads, pairs, 2 * tile), dtype=torch.float32, device=grad.device)
    constants = {name: value for name, value in call.constants.items() if name not in ("ROWS", "COLUMNS", "num_stages")}
    _backward_bias[(pairs, heads)](*call.read, grad, partial, *rest, TILE=tile, num_stages=1, **constants)
    return diagonals(partial, s, t)


attention_triton = Version("triton", FEATURES["triton"], None, _forward_triton, _backward_triton)
