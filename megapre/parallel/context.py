"""Context parallelism: a sequence cut over ranks, attention over the whole of it.

``ring`` (arXiv 2310.01889) passes keys and values around; each rank holds two chunks, one from either end of the
sequence, so that causal work is equal (zigzag). ``ulysses`` (arXiv 2309.14509) exchanges sequence for heads by
all-to-all and attends as on one rank. Both compose with any mask: none is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megapre.kernels.attention import AttentionDropout, Chain, Halves, delta_of
from megapre.kernels.mask import Mask
from megapre.parallel.comm import Axis

Core = Callable[..., Tensor]
"""attention(q, k, v, *, mask, bias=None, dropout=None, scale=None) as in ``megapre/kernels/attention.py``."""


def places(length: int, method: str, rank: int, size: int) -> Tensor:
    """int64: places in the sequence of the rows that rank ``rank`` of the context axis holds."""
    if method == "ring" and size > 1:
        chunk = length // (2 * size)
        first, second = rank * chunk, (2 * size - 1 - rank) * chunk
        return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))
    part = length // size
    return torch.arange(rank * part, (rank + 1) * part)


def over_context(method: str, axis: Axis, core: Chain) -> Core:
    """``core`` over the context axis: q, k, v hold this rank's rows; mask and bias are those of the whole sequence."""
    if axis.size == 1:
        return core

    def ring(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask,
        bias: Tensor | None = None,
        dropout: AttentionDropout | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return _Ring.apply(q, k, v, bias, _Pairs(axis, core, mask, dropout, scale, q.shape[0] // 2))

    def ulysses(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask,
        bias: Tensor | None = None,
        dropout: AttentionDropout | None = None,
        scale: float | None = None,
    ) -> Tensor:
        own = q.shape[2] // axis.size
        heads = slice(axis.rank * own, (axis.rank + 1) * own)
        if dropout is not None:
            dropout = replace(dropout, sites=dropout.sites[heads])
        q, k, v = (_Swap.apply(x, axis, True) for x in (q, k, v))
        out = core(q, k, v, mask=mask, bias=None if bias is None else bias[heads], dropout=dropout, scale=scale)
        return _Swap.apply(out, axis, False)

    return {"ring": ring, "ulysses": ulysses}[method]


class _Swap(torch.autograd.Function):
    """[seq / c, batch, heads, d] <-> [seq, batch, heads / c, d] by all-to-all; its backward is its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, to_heads: bool) -> Tensor:
        ctx.axis, ctx.to_heads = axis, to_heads
        return _swap(x, axis, to_heads)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _swap(dy, ctx.axis, not ctx.to_heads), None, None


def _swap(x: Tensor, axis: Axis, to_heads: bool) -> Tensor:
    rows, batch, heads, width = x.shape
    if to_heads:  # the j-th part sent is head group j; the j-th part received is sequence part j
        sent = x.view(rows, batch, axis.size, heads // axis.size, width).permute(2, 0, 1, 3, 4).contiguous()
    else:
        sent = x.contiguous().view(axis.size, rows // axis.size, batch, heads, width)
    received = torch.empty_like(sent)
    axis.all_to_all(received, sent).wait()
    if to_heads:
        return received.view(axis.size * rows, batch, heads // axis.size, width)
    return received.permute(1, 2, 0, 3, 4).reshape(rows // axis.size, batch, heads * axis.size, width)


@dataclass(frozen=True)
class _Pairs:
    """Which chunks of this rank's queries meet which chunks of keys, and the options of each such call."""

    axis: Axis
    core: Chain
    mask: Mask
    """Of the whole sequence."""
    dropout: AttentionDropout | None
    scale: float | None
    chunk: int

    def of(self, owner: int, bias: Tensor | None) -> list[tuple[slice, slice, slice, dict[str, Any]]]:
        """(queries, keys, entries of the bias, options) of each call on the keys of rank ``owner``."""
        last, n = 2 * self.axis.size - 1, self.chunk
        found = []
        for i, query in enumerate((self.axis.rank, last - self.axis.rank)):
            for j, key in enumerate((owner, last - owner)):
                mask = self.mask.part(slice(query * n, (query + 1) * n), slice(key * n, (key + 1) * n))
                if mask.hides_all(n, n):
                    continue
                start = (last + key - query) * n
                along = slice(start, start + 2 * n - 1)
                part = None if bias is None else bias[:, along]
                options = dict(mask=mask, bias=part, dropout=self.dropout, scale=self.scale)
                found.append((slice(i * n, (i + 1) * n), slice(j * n, (j + 1) * n), along, options))
        return found


class _Ring(torch.autograd.Function):
    """Attention by pairs of chunks, each a call of the kernel; keys and values travel, then again with gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pairs: _Pairs) -> Tensor:
        axis, keys = pairs.axis, torch.stack((k, v))
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((*q.shape[1:3], q.shape[0]), -torch.inf, dtype=wide, device=q.device)
        for turn in range(axis.size):
            arriving = _pass_on(keys, axis) if turn + 1 < axis.size else None
            for rows, columns, _, options in pairs.of((axis.rank - turn) % axis.size, bias):
                part = pairs.core.forward(q[rows], keys[0, columns], keys[1, columns], **options)
                _merge(out[rows], lse[..., rows], part)
            if arriving is not None:
                keys = arriving()
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.pairs = pairs
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, bias, out, lse = ctx.saved_tensors
        pairs: _Pairs = ctx.pairs
        axis, delta = pairs.axis, delta_of(dy, out)
        dq, dbias = torch.zeros_like(out), None if bias is None else torch.zeros_like(bias)
        keys = torch.stack((k, v))
        gradients = torch.zeros(keys.shape, dtype=out.dtype, device=q.device)
        for turn in range(axis.size):
            arriving = _pass_on(keys, axis) if turn + 1 < axis.size else None
            for rows, columns, along, options in pairs.of((axis.rank - turn) % axis.size, bias):
                here = dict(lse=lse[..., rows].contiguous(), delta=delta[..., rows].contiguous(), **options)
                parts = pairs.core.backward(dy[rows], q[rows], keys[0, columns], keys[1, columns], **here)
                dq[rows] += parts[0]
                gradients[0, columns] += parts[1]
                gradients[1, columns] += parts[2]
                if dbias is not None and parts[3] is not None:
                    dbias[:, along] += parts[3]
            gradients = _pass_on(gradients, axis)()  # after the last turn they are at home
            if arriving is not None:
                keys = arriving()
        dk, dv = gradients.to(k.dtype)
        return dq.to(q.dtype), dk, dv, dbias, None


def _merge(out: Tensor, lse: Tensor, part: Halves) -> None:
    """Fold the attention over more keys into ``out`` [s, b, heads, d] and ``lse`` [b, heads, s]."""
    after = torch.logaddexp(lse, part[1])
    seen = after.masked_fill(after == -torch.inf, 0.0)  # a row that has read nothing yet stays at zero
    old, new = (torch.exp(x - seen).permute(2, 0, 1).unsqueeze(-1) for x in (lse, part[1]))
    out.mul_(old).add_(part[0] * new)
    lse.copy_(after)


def _pass_on(tensor: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Send ``tensor`` to the next rank; the result waits for that of the rank before."""
    arriving = torch.empty_like(tensor)
    work = axis.exchange(tensor, (axis.rank + 1) % axis.size, arriving, (axis.rank - 1) % axis.size)

    def arrived() -> Tensor:
        work.wait()
        return arriving

    return arrived
