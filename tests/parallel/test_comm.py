"""Axis over real gloo, and the instruments that stand in for it: each must notice what it is there to notice."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megapre.parallel.comm import Axis
from megapre.resilience.ranks import Ranks
from megapre.resilience.rendezvous import open_store
from megapre.verify import instruments
from megapre.verify.instruments import CountingAxis, DelayedAxis, FifoAxis
from megapre.verify.pool import RankError, RankPool

KINDS = {
    "plain": lambda axis: axis,
    "fifo": FifoAxis,
    "delay": lambda axis: DelayedAxis(axis, 3),
    "count": lambda axis: CountingAxis(axis, {}),
}


def joined(ranks: Ranks, kind: str) -> Axis:
    dist.init_process_group(
        "gloo", store=open_store(ranks, 20), rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=20)
    )
    return KINDS[kind](Axis("test", ranks.rank, ranks.world, dist.group.WORLD))


def every_operation(ranks: Ranks, kind: str, dtype: torch.dtype) -> None:
    axis = joined(ranks, kind)
    size, rank = axis.size, axis.rank
    try:
        mine = torch.full((2, 3), rank + 1.0, dtype=dtype)
        x = mine.clone()
        axis.all_reduce(x).wait()
        assert (x == sum(range(1, size + 1))).all()
        x = mine.clone()
        axis.all_reduce(x, "max").wait()
        assert (x == size).all()
        whole = torch.empty(2 * size, 3, dtype=dtype)
        axis.all_gather(whole, mine).wait()
        assert torch.equal(whole[::2, 0], torch.arange(1, size + 1, dtype=dtype))
        part = torch.empty(1, 3, dtype=dtype)
        axis.reduce_scatter(part, torch.arange(size, dtype=dtype).unsqueeze(1).expand(size, 3).contiguous()).wait()
        assert (part == rank * size).all()
        inside = torch.arange(size * 4, dtype=dtype)  # a shard that lies in the whole, as ZeRO's does
        axis.reduce_scatter(inside[rank * 4 : rank * 4 + 4], inside.clone()).wait()
        assert torch.equal(inside[rank * 4 : rank * 4 + 4], torch.arange(rank * 4, rank * 4 + 4, dtype=dtype) * size)
        axis.all_gather(inside, inside[rank * 4 : rank * 4 + 4]).wait()
        assert torch.equal(inside, torch.arange(size * 4, dtype=dtype) * size)
        out = torch.empty(size, dtype=dtype)
        axis.all_to_all(out, torch.arange(size, dtype=dtype) + 10 * rank).wait()
        assert torch.equal(out, torch.arange(size, dtype=dtype) * 10 + rank)
        got = torch.empty(2, 3, dtype=dtype)
        axis.exchange(mine, (rank + 1) % size, got, (rank - 1) % size).wait()
        assert (got == (rank - 1) % size + 1).all()
        if rank < 2:
            work = axis.send(mine, 1) if rank == 0 else axis.recv(got, 0)
            work.wait()
            assert rank == 0 or (got == 1).all()
        assert axis.gather_text("é" * rank) == ["é" * r for r in range(size)]
        axis.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_operation(kind: str, dtype: torch.dtype, pool: RankPool) -> None:
    pool.run(3, every_operation, kind, dtype)


def read_too_early(ranks: Ranks) -> bool:
    axis = joined(ranks, "fifo")
    try:
        x = torch.ones(4)
        work = axis.all_reduce(x)
        early = bool(torch.isnan(x).all())
        work.wait()
        return early and bool((x == 2).all())
    finally:
        dist.destroy_process_group()


def test_fifo_shows_poison_before_wait(pool: RankPool) -> None:
    assert pool.run(2, read_too_early) == [True, True]


def receive_first(ranks: Ranks) -> None:
    """Both post a receive, then send on the same axis: gloo matches them, an in-order queue never does."""
    axis = joined(ranks, "fifo")
    instruments.PATIENCE = 5.0  # in this process, which ends with the test
    peer = 1 - axis.rank
    got = torch.empty(1)
    receiving = axis.recv(got, peer)
    axis.send(torch.ones(1), peer)
    receiving.wait()


def test_fifo_refuses_an_order_that_deadlocks_on_nccl() -> None:
    with RankPool(2) as own, pytest.raises(RankError):
        own.run(2, receive_first, timeout=90)
