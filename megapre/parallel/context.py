"""Context parallelism: a sequence cut over ranks, attention over the whole of it.

``ring`` (arXiv 2310.01889) passes keys and values around; each rank holds two chunks, one from either end of the
sequence, so that causal work is equal (zigzag). ``ulysses`` (arXiv 2309.14509) exchanges sequence for heads by
all-to-all and attends as on one rank. Both compose with any mask: none is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megapre.kernels.attention import AttentionDropout
from megapre.parallel.comm import Axis
from megapre.random.philox import keep_mask

Core = Callable[..., Tensor]
"""attention(q, k, v, *, causal, segments, dropout, offset) as in ``megapre/kernels/attention.py``."""


def places(length: int, method: str, rank: int, size: int) -> Tensor:
    """int64: places in the sequence of the rows that rank ``rank`` of the context axis holds."""
    if method == "ring" and size > 1:
        chunk = length // (2 * size)
        first, second = rank * chunk, (2 * size - 1 - rank) * chunk
        return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))
    part = length // size
    return torch.arange(rank * part, (rank + 1) * part)


def over_context(method: str, axis: Axis, core: Core) -> Core:
    """``core`` over the context axis: q, k, v hold this rank's rows; ``segments`` [seq, batch] is whole."""
    if axis.size == 1:
        return core

    def ring(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, segments: Tensor | None, dropout: Any, offset: int
    ) -> Tensor:
        return _Ring.apply(q, k, v, axis, causal, segments, dropout)

    def ulysses(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, segments: Tensor | None, dropout: Any, offset: int
    ) -> Tensor:
        if dropout is not None:
            own = len(dropout.sites) // axis.size
            sites = dropout.sites[axis.rank * own : (axis.rank + 1) * own]
            dropout = replace(dropout, sites=sites, positions=torch.arange(q.shape[0] * axis.size, device=q.device))
        q, k, v = (_Swap.apply(x, axis, True) for x in (q, k, v))
        return _Swap.apply(core(q, k, v, causal=causal, segments=segments, dropout=dropout, offset=offset), axis, False)

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
class _Pair:
    """One chunk of queries against one chunk of keys."""

    rows: slice
    """Of this rank's queries."""
    columns: slice
    """Of the keys at hand."""
    mask: Tensor | None
    """[batch or 1, 1, 1, queries, keys], true where a query may read a key; None when it may read all."""
    kept: Tensor | None
    """Dropout of the weights, [batch, kv heads, group, queries, keys]."""


class _Ring(torch.autograd.Function):
    """Blockwise attention with a running log-sum-exp; keys and values travel, then again with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        axis: Axis,
        causal: bool,
        segments: Tensor | None,
        dropout: AttentionDropout | None,
    ) -> Tensor:
        blocks = _Blocks(q, k, axis, causal, segments, dropout)
        keys = torch.stack((k, v))
        out = torch.zeros_like(blocks.q)
        lse = torch.full(out.shape[:-1], -torch.inf, dtype=out.dtype, device=q.device)
        for turn in range(axis.size):
            arriving = _pass_on(keys, axis) if turn + 1 < axis.size else None
            key, value = blocks.wide(keys[0]), blocks.wide(keys[1])
            for pair in blocks.pairs((axis.rank - turn) % axis.size):
                blocks.attend(pair, key, value, out, lse)
            if arriving is not None:
                keys = arriving()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks = blocks
        return blocks.narrow(out, q)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        axis = blocks.axis
        do = blocks.split(dy)
        delta = (do * out).sum(-1)
        dq = torch.zeros_like(blocks.q)
        keys = torch.stack((k, v))
        gradients = torch.zeros(keys.shape, dtype=out.dtype, device=q.device)
        for turn in range(axis.size):
            arriving = _pass_on(keys, axis) if turn + 1 < axis.size else None
            key, value = blocks.wide(keys[0]), blocks.wide(keys[1])
            for pair in blocks.pairs((axis.rank - turn) % axis.size):
                blocks.differentiate(pair, key, value, do, lse, delta, dq, gradients)
            gradients = _pass_on(gradients, axis)()  # after the last turn they are at home
            if arriving is not None:
                keys = arriving()
        dk, dv = gradients.to(k.dtype)
        return blocks.narrow(dq, q), dk, dv, None, None, None, None


def _pass_on(tensor: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Send ``tensor`` to the next rank; the result waits for that of the rank before."""
    arriving = torch.empty_like(tensor)
    work = axis.exchange(tensor, (axis.rank + 1) % axis.size, arriving, (axis.rank - 1) % axis.size)

    def arrived() -> Tensor:
        work.wait()
        return arriving

    return arrived


class _Blocks:
    """Attention between chunks, in fp32 (fp64 under fp64), as [batch, kv heads, group, rows, d]."""

    def __init__(
        self, q: Tensor, k: Tensor, axis: Axis, causal: bool, segments: Tensor | None, dropout: AttentionDropout | None
    ) -> None:
        self.axis, self.causal, self.segments, self.dropout = axis, causal, segments, dropout
        self.groups, self.type = k.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
        self.chunk = q.shape[0] // 2
        self.scale = 1 / math.sqrt(q.shape[-1])
        self.q = self.split(q)

    def split(self, x: Tensor) -> Tensor:
        """[rows, batch, heads, d] -> [batch, kv heads, group, rows, d]."""
        return x.to(self.type).unflatten(2, (self.groups, -1)).permute(1, 2, 3, 0, 4).contiguous()

    def narrow(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`split`, in the type of ``like``."""
        return x.permute(3, 0, 1, 2, 4).reshape(like.shape).to(like.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """Keys or values [rows, batch, kv heads, d] -> [batch, kv heads, 1, rows, d]."""
        return x.to(self.type).permute(1, 2, 0, 3).unsqueeze(2)

    def pairs(self, owner: int) -> list[_Pair]:
        """Chunk pairs of this rank's queries and the keys of rank ``owner`` in which anything is visible."""
        last = 2 * self.axis.size - 1
        found = []
        for i, query in enumerate((self.axis.rank, last - self.axis.rank)):
            for j, key in enumerate((owner, last - owner)):
                if self.causal and key > query:
                    continue
                mask = self._mask(query, key)
                rows, columns = (slice(n * self.chunk, (n + 1) * self.chunk) for n in (i, j))
                found.append(_Pair(rows, columns, mask, self._kept(rows, key)))
        return found

    def _mask(self, query: int, key: int) -> Tensor | None:
        mask = None
        size = self.chunk
        if self.causal and query == key:
            mask = torch.ones(size, size, dtype=torch.bool, device=self.q.device).tril().view(1, 1, 1, size, size)
        if self.segments is not None:
            asking = self.segments[query * size : (query + 1) * size].t()
            asked = self.segments[key * size : (key + 1) * size].t()
            same = (asking.unsqueeze(2) == asked.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
            mask = same if mask is None else mask & same
        return mask

    def _kept(self, rows: slice, key: int) -> Tensor | None:
        d = self.dropout
        if d is None:
            return None
        first = key * self.chunk
        kept = keep_mask(d.seed, d.step, d.sites, d.positions[rows], d.samples, first, self.chunk, d.probability)
        return kept.permute(2, 0, 1, 3).unflatten(1, (self.groups, -1)).to(self.type) / (1 - d.probability)

    def _scores(self, pair: _Pair, key: Tensor) -> Tensor:
        scores = self.q[..., pair.rows, :] @ key[..., pair.columns, :].transpose(-1, -2) * self.scale
        return scores if pair.mask is None else scores.masked_fill(~pair.mask, -torch.inf)

    def attend(self, pair: _Pair, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
        """Fold one block into ``out`` and ``lse``, which hold what the rows have read so far."""
        scores = self._scores(pair, key)
        before = lse[..., pair.rows]
        after = torch.logaddexp(before, scores.logsumexp(-1))
        seen = after.masked_fill(after == -torch.inf, 0.0)  # a row that has read nothing yet stays at zero
        weights = torch.exp(scores - seen.unsqueeze(-1))
        if pair.kept is not None:
            weights = weights * pair.kept
        rows = out[..., pair.rows, :]
        rows.mul_(torch.exp(before - seen).unsqueeze(-1)).add_(weights @ value[..., pair.columns, :])
        before.copy_(after)

    def differentiate(
        self,
        pair: _Pair,
        key: Tensor,
        value: Tensor,
        do: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        gradients: Tensor,
    ) -> None:
        """Add one block's part to ``dq`` and to ``gradients`` of keys and values [2, rows, batch, kv heads, d]."""
        k, v = key[..., pair.columns, :], value[..., pair.columns, :]
        weights = torch.exp(self._scores(pair, key) - lse[..., pair.rows].unsqueeze(-1))
        do = do[..., pair.rows, :]
        dweights = do @ v.transpose(-1, -2)
        dropped = weights
        if pair.kept is not None:
            dropped, dweights = weights * pair.kept, dweights * pair.kept
        dscores = weights * (dweights - delta[..., pair.rows].unsqueeze(-1)) * self.scale
        dq[..., pair.rows, :] += dscores @ k
        dk = (dscores.transpose(-1, -2) @ self.q[..., pair.rows, :]).sum(2)  # over the group of query heads
        dv = (dropped.transpose(-1, -2) @ do).sum(2)
        gradients[0, pair.columns] += dk.permute(2, 0, 1, 3)
        gradients[1, pair.columns] += dv.permute(2, 0, 1, 3)
