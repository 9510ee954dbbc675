"""Axis: one dimension of the grid, and the only door to communication.

Every collective and every point-to-point message of the engine goes through an ``Axis``, so that a test can
put a byte counter, a delayer or a FIFO stream in its place, and so that differences between gloo and NCCL
live in this file alone. ``shared.py`` puts one in its place that is faster within a host without GPUs. An axis
of size 1 has no process group and communicates nothing.

A communicator is an in-order queue under NCCL: calls on one axis must be made in the same order by all its
ranks, and a receive posted early holds up what is posted after it on the same axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """Something under way."""

    def wait(self) -> object:
        """Return when the result may be used (on a GPU: when the current stream has been told to wait)."""


class Done:
    """Work that is complete already."""

    def wait(self) -> None:
        """Return at once."""


class Together:
    """Several pieces of work as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """Return when all are done."""
        for work in self._works:
            work.wait()


_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Axis:
    """Ranks that communicate: ``rank`` of ``size``, over ``group`` (None when ``size`` is 1).

    All tensors must be contiguous. Methods return :class:`Work`; nothing may be read before ``wait()``.
    """

    def __init__(self, name: str, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.name, self.rank, self.size, self.group = name, rank, size, group

    def __repr__(self) -> str:
        return f"Axis({self.name}, {self.rank} of {self.size})"

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """Reduce ``tensor`` in place over the axis; ``op`` is ``sum``, ``max`` or ``min``."""
        if self.size == 1:
            return Done()
        return dist.all_reduce(tensor, op=_REDUCE[op], group=self.group, async_op=True)

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """Concatenate every rank's ``shard`` along dimension 0 into ``output``; ``shard`` may lie inside it."""
        if self.size == 1:
            if not _same(output, shard):
                output.copy_(shard)
            return Done()
        return _all_gather(output, shard, group=self.group, async_op=True)

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """Sum ``tensor`` over the axis; this rank's part of dimension 0 lands in ``shard``."""
        if self.size == 1:
            if not _same(shard, tensor):
                shard.copy_(tensor)
            return Done()
        return _reduce_scatter(shard, tensor, group=self.group, async_op=True)

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """Send the j-th part of dimension 0 to rank j; receive likewise. Parts are equal, or have the rows given."""
        if self.size == 1:
            output.copy_(tensor)
            return Done()
        return dist.all_to_all_single(output, tensor, received, sent, group=self.group, async_op=True)

    def send(self, tensor: Tensor, to: int) -> Work:
        """Send to rank ``to`` of the axis. Rendezvous: completes only when the peer has posted its receive."""
        return _posted(dist.isend(tensor, group=self.group, group_dst=to))

    def recv(self, tensor: Tensor, source: int) -> Work:
        """Receive into ``tensor`` from rank ``source`` of the axis."""
        return _posted(dist.irecv(tensor, group=self.group, group_src=source))

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """Send ``tensor`` to rank ``to`` and receive from rank ``source`` as one operation that cannot deadlock."""
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, group=self.group, group_peer=to),
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=source),
            ]
        )
        return Together(works)

    def gather_text(self, text: str) -> list[str]:
        """Every rank's ``text``, in rank order, on every rank. For a host (CPU) axis."""
        if self.size == 1:
            return [text]
        data = text.encode()
        longest = torch.tensor([len(data)])
        self.all_reduce(longest, "max").wait()
        width = 8 + -(-int(longest) // 8) * 8  # whole words, since the length is one
        shard = torch.zeros(width, dtype=torch.uint8)
        shard[:8] = torch.tensor([len(data)]).view(torch.uint8)
        shard[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else shard[:0]
        output = torch.empty(self.size * width, dtype=torch.uint8)
        self.all_gather(output, shard).wait()
        rows = output.view(self.size, width)
        return [bytes(row[8 : 8 + int(row[:8].view(torch.int64))].tolist()).decode() for row in rows]

    def barrier(self) -> None:
        """Return when every rank of the axis has arrived."""
        if self.size > 1:
            self.all_reduce(torch.zeros(1)).wait()


class Around(Axis):
    """An axis with another one inside, which does the work; what is not overridden is that of ``Axis``."""

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis.name, axis.rank, axis.size, axis.group)
        self.inner = axis


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both begin at the same element of the same memory; also answers for fake tensors, which have none."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()


def _posted(work: Work | None) -> Work:
    assert work is not None, "this rank is not in the group of its own axis"
    return work


def _first(*names: str) -> Callable[..., Work]:
    """torch 2.13 renamed these collectives; older releases have the older name."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


_all_gather = _first("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _first("reduce_scatter_single", "reduce_scatter_tensor")
