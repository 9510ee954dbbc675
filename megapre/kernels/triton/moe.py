"""Top-k, the ways of tokens to experts and back, and products grouped by expert, in Triton; formulas in ``moe.py``.

Rows move once: combine reads a token's k rows and writes one, with the sum in registers. A program of the grouped
product has a tile of rows of one expert and a block of columns; which rows are whose is a small table from the host, so
that no program is for nothing. The weight's gradient is added to where it lives, each element by one program: no
atomics, the same bits in every run.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.moe import Ways, _Permute, _Unpermute
from megapre.kernels.triton import launch


@triton.jit
def _top_k(scores, ids, rows, experts, k, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    row, expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    inside = (row[:, None] < rows) & (expert[None, :] < experts)
    x = tl.load(scores + row[:, None] * experts + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # order as the scores do
    keys = tl.where(x != x, 0x7FFFFFFF, tl.where(x == 0.0, 0, keys))
    least = -0x7FFFFFFF - 1
    keys = tl.where(inside, keys, least)
    for j in range(k):
        top = tl.max(keys, 1)
        found = tl.min(tl.where(keys == top[:, None], expert[None, :], EXPERTS), 1)
        tl.store(ids + row * k + j, found.to(tl.int64), mask=row < rows)
        keys = tl.where(expert[None, :] == found[:, None], least, keys)


@triton.jit
def _gather(x, source, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + tl.load(source + row) * width + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, values, mask=inside)


@triton.jit
def _combine(y, weights, rows, out, kept, choices, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(choices):
        row = tl.load(rows + token * choices + j)
        x = tl.load(y + row * width + column, mask=inside & (row < kept), other=0.0).to(tl.float32)
        total += x * tl.load(weights + token * choices + j) if WEIGHTED else x
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread(grad, y, weights, rows, dy, dweights, kept, choices, width, BLOCK: tl.constexpr):
    """One choice of a token: the gradient of its row, and of its weight."""
    place = tl.program_id(0).to(tl.int64)
    token, row, weight = place // choices, tl.load(rows + place), tl.load(weights + place)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (column < width) & (row < kept)
        up = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
        total += up * tl.load(y + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dy + row * width + column, (up * weight).to(dy.dtype.element_ty), mask=inside)
    tl.store(dweights + place, tl.sum(total, 0))


@triton.jit
def _grouped_mm(
    x, weight, y, tiles, outs, depth, w_expert, w_out, w_in,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    expert, first, last = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    row, column = first + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, DEPTH)
    left = x + row[:, None].to(tl.int64) * depth + along[None, :]
    right = weight + expert * w_expert + column[None, :].to(tl.int64) * w_out + along[:, None].to(tl.int64) * w_in
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for l in range(0, depth, DEPTH):
        a = tl.load(left + l, mask=(row[:, None] < last) & (l + along[None, :] < depth), other=0.0)
        b = tl.load(right, mask=(column[None, :] < outs) & (l + along[:, None] < depth), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        right += w_in * DEPTH
    at = row[:, None].to(tl.int64) * outs + column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(row[:, None] < last) & (column[None, :] < outs))


@triton.jit
def _grouped_dw(
    main, dy, x, bounds, outs, ins, m_expert, m_out,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    first, last = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    out, column = tl.program_id(1) * OUTS + tl.arange(0, OUTS), tl.program_id(0) * INS + tl.arange(0, INS)
    along = tl.arange(0, ROWS)
    total = tl.zeros([OUTS, INS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + along[:, None]
        mine = row < last
        a = tl.load(dy + row.to(tl.int64) * outs + out[None, :], mask=mine & (out[None, :] < outs), other=0.0)
        b = tl.load(x + row.to(tl.int64) * ins + column[None, :], mask=mine & (column[None, :] < ins), other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    at = main + expert.to(tl.int64) * m_expert + out[:, None].to(tl.int64) * m_out + column[None, :]
    inside = (out[:, None] < outs) & (column[None, :] < ins) & (first < last)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def top_k_triton(scores: Tensor, k: int) -> Tensor:
    """``top_k_reference`` for fp32, bf16 and fp16."""
    launch.check("top_k", scores)
    flat = launch.flat_rows(scores)
    ids = torch.empty((flat.shape[0], k), dtype=torch.int64, device=scores.device)
    experts = launch.power_of_two(scores.shape[-1])
    rows = max(1, 1024 // experts)
    if flat.shape[0]:
        with launch.on(scores):
            _top_k[(triton.cdiv(flat.shape[0], rows),)](
                flat, ids, flat.shape[0], scores.shape[-1], k, ROWS=rows, EXPERTS=experts, num_warps=4
            )
    return ids.view(*scores.shape[:-1], k)


def _block(width: int) -> int:
    return min(1024, launch.power_of_two(width))


def _gather_triton(x: Tensor, source: Tensor) -> Tensor:
    x, source = x.contiguous(), source.contiguous()
    out = x.new_empty((source.shape[0], x.shape[1]))
    if out.numel():
        block = _block(x.shape[1])
        with launch.on(x):
            _gather[(out.shape[0], triton.cdiv(x.shape[1], block))](
                x, source, out, x.shape[1], BLOCK=block, num_warps=launch.warps(block, 8)
            )
    return out


def _combine_triton(y: Tensor, weights: Tensor | None, rows: Tensor) -> Tensor:
    y, rows = y.contiguous(), rows.contiguous()
    out = y.new_empty((rows.shape[0], y.shape[1]))
    if out.numel():
        block = _block(y.shape[1])
        with launch.on(y):
            _combine[(rows.shape[0], triton.cdiv(y.shape[1], block))](
                y, rows if weights is None else weights.contiguous(), rows, out, *y.shape[:1], rows.shape[1],
                y.shape[1], WEIGHTED=weights is not None, BLOCK=block, num_warps=launch.warps(block, 8),
            )  # fmt: skip
    return out


def _spread_triton(dout: Tensor, y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    dout, y, rows, weights = dout.contiguous(), y.contiguous(), rows.contiguous(), weights.contiguous()
    dy, dweights = torch.empty_like(y), torch.empty_like(weights, dtype=torch.float32)
    if rows.numel():
        block = _block(y.shape[1])
        with launch.on(y):
            _spread[(rows.numel(),)](
                dout, y, weights, rows, dy, dweights, y.shape[0], rows.shape[1], y.shape[1], BLOCK=block,
                num_warps=launch.warps(block, 8),
            )  # fmt: skip
    return dy, dweights.to(weights.dtype)


TRITON = Ways(_gather_triton, _combine_triton, _spread_triton)


def permute_triton(x: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """``permute_reference`` for fp32, bf16 and fp16."""
    launch.check("permute", x, source, rows)
    return _Permute.apply(x, source, rows, TRITON)


def unpermute_triton(y: Tensor, weights: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """``unpermute_reference`` for fp32, bf16 and fp16."""
    launch.check("unpermute", y, weights, source, rows)
    return _Unpermute.apply(y, weights, source, rows, TRITON)


def _on_device(numbers: Sequence[Sequence[int]] | Sequence[int], x: Tensor) -> Tensor:
    """Host numbers beside x, int32, without waiting for the device."""
    host = torch.tensor(numbers, dtype=torch.int32)
    return host.pin_memory().to(x.device, non_blocking=True) if x.device.type == "cuda" else host.to(x.device)


def grouped_mm_triton(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """``grouped_mm_reference`` for fp32, bf16 and fp16; ``weight`` in any strides."""
    launch.check("grouped_mm", x, weight)
    x, (_, outs, depth) = x.contiguous(), weight.shape
    y = x.new_empty((x.shape[0], outs))
    rows, columns, along = (64, 64, 16) if x.dtype == torch.float32 else (128, 128, 64)
    tiles = [
        (expert, first, last)
        for expert, (begin, last) in enumerate(pairwise(accumulate(sizes, initial=0)))
        for first in range(begin, last, rows)
    ]
    if tiles and outs:
        with launch.on(x):
            _grouped_mm[(len(tiles), triton.cdiv(outs, columns))](
                x, weight, y, _on_device(tiles, x), outs, depth, *weight.stride(), ROWS=rows, COLUMNS=columns,
                DEPTH=along, num_warps=4 if x.dtype == torch.float32 else 8, num_stages=3,
            )  # fmt: skip
    return y


def grouped_dw_triton_(main: Tensor, dy: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    """``grouped_dw_reference_`` for fp32, bf16 and fp16, added to fp32 ``main`` in place; its rows lie in one piece."""
    launch.check("grouped_dw_", x, dy, main)
    assert main.stride(2) == 1 and main.dtype == torch.float32
    dy, x, (experts, outs, ins) = dy.contiguous(), x.contiguous(), main.shape
    rows, side = (16, 64) if x.dtype == torch.float32 else (64, 128)
    if main.numel() and x.shape[0]:
        bounds = _on_device(list(accumulate(sizes, initial=0)), x)
        with launch.on(x):
            _grouped_dw[(triton.cdiv(ins, side), triton.cdiv(outs, side), experts)](
                main, dy, x, bounds, outs, ins, *main.stride()[:2], ROWS=rows, OUTS=side, INS=side,
                num_warps=4 if x.dtype == torch.float32 else 8, num_stages=3,
            )  # fmt: skip
