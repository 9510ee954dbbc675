"""Bandwidth and latency of messages between ranks, by axis of a layout, operation and size.

    python benchmarks/collectives.py [--parallel tensor=2 data=2] [--sizes 4K 64K 1M 16M 64M] [--rounds 9]

The grid is the one that a job of that layout gets, all groups of an axis work at once, and a size is that of the whole
tensor. GB/s are those of the busiest link: 2 (n - 1) / n of the tensor for an all-reduce over n ranks, (n - 1) / n for
all-gather, reduce-scatter and all-to-all, all of it for send/recv, where every rank sends to the next. Times are
medians of the slowest rank's wall time. An operation whose result is wrong has no speed printed, and the exit code is
1. GPUs use NCCL; CPUs shared memory within a host, gloo between two ranks and between hosts.

Started alone it makes the ranks on this host; under torchrun or srun with a task per rank it is one of them.
``benchmarks/gemm.py --profile`` writes `measure` into a profile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from megapre.config.check import ConfigError, check
from megapre.config.load import from_dict
from megapre.config.schema import Config
from megapre.parallel.comm import Axis, Work
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks, discover
from megapre.verify.pool import RankPool

SIZES = (1 << 12, 1 << 24)
"""Bytes of `measure`: one that shows the latency, one that shows the bandwidth."""
SHOWN = ("4K", "64K", "1M", "16M", "64M")
ROUNDS = 9
NAMED = ("tensor", "context", "expert", "data", "replicas", "pipeline")
"""Axes in the order of the table; one that is another's under a second name is left out."""
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Case:
    """One operation on tensors of one size."""

    run: Callable[[], Work]
    result: Tensor
    right: Tensor
    """What ``result`` must hold after the first run."""


def all_reduce(axis: Axis, count: int, device: torch.device) -> Case:
    tensor = torch.full((count,), axis.rank + 1.0, device=device)
    return Case(lambda: axis.all_reduce(tensor), tensor, torch.full((count,), _sum(axis)))


def all_gather(axis: Axis, count: int, device: torch.device) -> Case:
    output = torch.empty(count, device=device)
    shard = torch.full((count // axis.size,), axis.rank + 1.0, device=device)
    return Case(lambda: axis.all_gather(output, shard), output, _ranks(axis, count) + 1)


def reduce_scatter(axis: Axis, count: int, device: torch.device) -> Case:
    shard, tensor = torch.empty(count // axis.size, device=device), torch.full((count,), axis.rank + 1.0, device=device)
    return Case(lambda: axis.reduce_scatter(shard, tensor), shard, torch.full((count // axis.size,), _sum(axis)))


def all_to_all(axis: Axis, count: int, device: torch.device) -> Case:
    output, to = torch.empty(count, device=device), _ranks(axis, count)
    tensor = (axis.rank * axis.size + to).to(device)
    return Case(lambda: axis.all_to_all(output, tensor), output, to * axis.size + axis.rank)


def send_recv(axis: Axis, count: int, device: torch.device) -> Case:
    tensor, received = torch.full((count,), axis.rank + 1.0, device=device), torch.empty(count, device=device)
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return Case(lambda: axis.exchange(tensor, after, received, before), received, torch.full((count,), before + 1.0))


OPERATIONS: dict[str, tuple[Callable[[Axis, int, torch.device], Case], Callable[[int], float]]] = {
    "all-reduce": (all_reduce, lambda n: 2 * (n - 1) / n),
    "all-gather": (all_gather, lambda n: (n - 1) / n),
    "reduce-scatter": (reduce_scatter, lambda n: (n - 1) / n),
    "all-to-all": (all_to_all, lambda n: (n - 1) / n),
    "send/recv": (send_recv, lambda n: 1.0),
}
"""Operation -> how to make it; share of the tensor's bytes on the busiest link."""


def _sum(axis: Axis) -> float:
    return axis.size * (axis.size + 1) / 2


def _ranks(axis: Axis, count: int) -> Tensor:
    """The rank to which each element belongs, when ``count`` are cut into parts."""
    return torch.arange(axis.size, dtype=torch.float32).repeat_interleave(count // axis.size)


Found = dict[tuple[str, int, str, int], float | None]
"""(axis, its size, operation, bytes) -> seconds; None where the result is wrong."""


def time_axes(ranks: Ranks, config: Config, sizes: Sequence[int], rounds: int) -> Found:
    """Every operation on every axis of more than one rank, the same on all ranks."""
    found: Found = {}
    with connected(config, ranks) as (grid, device):
        seen: set[int] = set()
        for name in NAMED:
            axis = getattr(grid, name)
            if axis.size == 1 or id(axis) in seen:
                continue
            seen.add(id(axis))
            for operation, (make, _) in OPERATIONS.items():
                for size in sizes:
                    case = make(axis, axis.size * -(-size // (4 * axis.size)), device)
                    found[name, axis.size, operation, size] = timed(case, grid.host, device, rounds)
    return found


def timed(case: Case, host: Axis, device: torch.device, rounds: int) -> float | None:
    """Median over ``rounds`` of the slowest rank's seconds; None where any rank's first result is wrong."""
    case.run().wait()
    wrong = torch.tensor([float(not torch.equal(case.result.cpu(), case.right))])
    host.all_reduce(wrong, "max").wait()
    if wrong.item():
        return None
    case.result.zero_()  # an all-reduce in place would grow from round to round
    times = torch.zeros(rounds, dtype=torch.float64)
    for index in range(rounds):
        _synchronize(device)
        host.barrier()
        start = time.perf_counter()
        case.run().wait()
        _synchronize(device)
        times[index] = time.perf_counter() - start
    host.all_reduce(times, "max").wait()
    return statistics.median(times.tolist())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(found: Found, sizes: Sequence[int]) -> list[str]:
    """Markdown: a row for each axis and operation, the time of the smallest size and GB/s of all."""
    head = ["axis", "ranks", "operation", f"us at {shown(sizes[0])}", *(f"GB/s at {shown(size)}" for size in sizes)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for axis, ranks, operation in dict.fromkeys(key[:3] for key in found):
        times = [found[axis, ranks, operation, size] for size in sizes]
        share = OPERATIONS[operation][1](ranks)
        cells = ["wrong" if times[0] is None else f"{1e6 * times[0]:.0f}"]
        cells += ["wrong" if t is None else f"{share * size / t / 1e9:.3g}" for t, size in zip(times, sizes)]
        lines.append(f"| {' | '.join([axis, str(ranks), operation, *cells])} |")
    return lines


def shown(size: int) -> str:
    """1 MiB of 1048576."""
    unit, scale = max(((u, s) for u, s in UNITS.items() if size >= s), key=lambda pair: pair[1], default=("", 1))
    return f"{size / scale:g} {unit}iB" if unit else f"{size} B"


def size_of(text: str) -> int:
    """Bytes of ``64K``; ValueError, as argparse wants it, for what is no size."""
    scale = UNITS.get(text[-1:].upper(), 1)
    size = int(text[:-1] if scale > 1 else text) * scale
    if size < 4:
        raise ValueError(text)
    return size


def layout(settings: Sequence[str]) -> Config:
    """A job whose grid is that of ``tensor=2 data=2``; ConfigError in one sentence for a layout that no job has."""
    parallel: dict[str, Any] = {"data": 1}
    for setting in settings:
        name, _, value = setting.partition("=")
        if not value.isdigit():
            raise ConfigError(f"--parallel takes axis=ranks, such as tensor=2, not {setting}")
        parallel[name] = int(value)
    tensor, pipeline, context, expert = (parallel.get(n, 1) for n in ("tensor", "pipeline", "context", "expert"))
    heads = 2 * tensor * context
    model = {"layers": 2 * pipeline, "heads": heads, "hidden": 8 * heads, "sequence": 16 * tensor * context}
    if expert > 1:
        model |= {"experts": expert, "experts_per_token": 1, "bias": False, "activation": "swiglu"}
    batch = parallel["data"] * pipeline
    return check(from_dict({"model": model, "parallel": parallel, "train": {"global_batch": batch}}))


def time_reductions(ranks: Ranks, apart: bool) -> list[float]:
    """Median CPU seconds of an all-reduce of each size; ``apart``: as between ranks of different hosts."""
    config = check(from_dict({"parallel": {"data": ranks.world}, "train": {"global_batch": 8}}), ranks.world)
    found = []
    if apart:
        ranks = replace(ranks, node=ranks.rank)
    with connected(config, ranks) as (grid, _):
        for size in SIZES:
            tensor, times = torch.ones(size // 4), []
            for _ in range(ROUNDS):
                start = time.process_time()
                grid.data.all_reduce(tensor).wait()
                times.append(time.process_time() - start)
            found.append(statistics.median(times))
    return found


def measure() -> tuple[float, float, float]:
    """(GB/s of bus bandwidth within a host, between hosts, seconds of latency) of an all-reduce, in CPU seconds.

    Over two ranks a ring moves 2 x 1/2 of the bytes.
    """
    with RankPool(2) as pool:
        (short, long), other = ([max(t) for t in zip(*pool.run(2, time_reductions, apart))] for apart in (False, True))
    within, between = ((SIZES[1] - SIZES[0]) / 1e9 / seconds for seconds in (long - short, other[1] - other[0]))
    return within, between, short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", nargs="+", default=["data=2"], metavar="AXIS=RANKS")
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[size_of(text) for text in SHOWN])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    try:
        config = layout(args.parallel)
        world = prod(getattr(config.parallel, axis) for axis in ("tensor", "pipeline", "data", "context"))
        plan = discover(os.environ, world)
        if world == 1 or (plan is not None and (not isinstance(plan, Ranks) or plan.world != world)):
            raise ConfigError(f"{' '.join(args.parallel)} is {world} rank(s): start two or more, a task each")
        if plan is None and torch.cuda.is_available() and torch.cuda.device_count() < world:
            raise ConfigError(f"{world} ranks need as many GPUs, not {torch.cuda.device_count()}: hide them for gloo")
    except ValueError as error:
        print(f"collectives.py: {error}", file=sys.stderr)
        return 2
    if isinstance(plan, Ranks):
        found = time_axes(plan, config, args.sizes, args.rounds)
    else:
        with RankPool(world) as pool:
            found = pool.run(world, time_axes, config, args.sizes, args.rounds, timeout=1800)[0]
    if plan is None or plan.rank == 0:
        device = torch.cuda.get_device_name() + ", NCCL" if torch.cuda.is_available() else "CPU, shared memory and gloo"
        print("\n".join([f"{device}, {world} ranks: {' '.join(args.parallel)}", "", *table(found, args.sizes)]))
    return int(None in found.values())


if __name__ == "__main__":
    sys.exit(main())
