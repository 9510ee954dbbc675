"""Known answers: what each rank computes and communicates before it may train.

Integers small enough that every partial sum is exact in the number format, so that the answer does not depend on the
order of the sum, the kernel or the device, and a comparison needs no tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from megapre.parallel.grid import Grid

SIZE = 256


def selftest(grid: Grid, device: torch.device, dtype: torch.dtype) -> None:
    """Test arithmetic and every axis. RuntimeError, the same on all ranks, that names the first rank that failed."""
    if failed := failures(grid, device, dtype):
        rank, text = failed[0]
        more = f" (as do {len(failed) - 1} other ranks)" if len(failed) > 1 else ""
        raise RuntimeError(f"rank {rank} fails its self-test{more}: {text}; take its node out of service")


def failures(grid: Grid, device: torch.device, dtype: torch.dtype) -> list[tuple[int, str]]:
    """Ranks that failed and what of, the same on all ranks."""
    # A rank that fails one test takes part in the others: its peers wait for it there.
    found = [_arithmetic(device, dtype), *_collectives(grid, device)]
    reports = grid.host.gather_text(next(filter(None, found), ""))
    return [(rank, text) for rank, text in enumerate(reports) if text]


def _arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """Linear layers and sums against integer arithmetic on the host."""
    generator = torch.Generator().manual_seed(7)
    a = torch.randint(-3, 4, (SIZE, SIZE), generator=generator)
    b = torch.randint(-3, 4, (SIZE, SIZE), generator=generator)
    exact = a @ b.T
    for kind in {torch.float32, dtype}:
        got = functional.linear(a.to(device, kind), b.to(device, kind)).cpu()
        # Products are exact; the result is rounded once where the format has fewer bits than it needs.
        wrong = int((got != exact.to(kind)).sum())
        if wrong:
            return f"{wrong} of {SIZE * SIZE} elements of a {kind} matrix product are wrong"
    total = int(a.to(device, torch.float32).square().sum())
    if total != int(a.square().sum()):
        return f"a float32 sum is {total} instead of {int(a.square().sum())}"
    return ""


def _collectives(grid: Grid, device: torch.device) -> Iterator[str]:
    """Sum and gather of integers on every axis; what is wrong with each, empty when nothing is."""
    for name, axis in grid.axes().items():
        if axis.size == 1:
            continue
        place = torch.device("cpu") if name == "host" else device
        base = torch.arange(SIZE, dtype=torch.float32, device=place)
        summed = base * (axis.rank + 1)
        axis.all_reduce(summed).wait()
        if not torch.equal(summed, base * (axis.size * (axis.size + 1) // 2)):
            yield f"an all-reduce over the {name} axis returns a wrong sum"
        gathered = base.new_empty(axis.size * SIZE)
        axis.all_gather(gathered, base + axis.rank).wait()
        if not torch.equal(gathered, (base + torch.arange(axis.size, device=place)[:, None]).flatten()):
            yield f"an all-gather over the {name} axis returns wrong data"
