"""How fast each rank multiplies and each axis reduces, measured over the job's own grid before the job."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from megapre.config.schema import Config
from megapre.parallel.comm import Axis
from megapre.parallel.grid import AXES, Grid
from megapre.resilience.connect import connected
from megapre.resilience.doctor.rows import BAD, NOTE, OK, Row, node_name
from megapre.resilience.ranks import Ranks
from megapre.resilience.selftest import failures

ROUNDS = 5
SLOW = 0.8
"""Share of the median below which a GPU, or a group of them, is called slow. CPU ranks share their cores with others,
so that there it is only noted."""


def measure(config: Config, ranks: Ranks) -> tuple[list[Row], list[str]]:
    """One rank's part; the rows, and the names of all nodes, on every rank the same."""
    with connected(config, ranks) as (grid, device):
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        wrong = failures(grid, device, kind)
        mine = {
            "host": node_name(),
            "tflops": _multiply(grid, device, kind),
            "axes": {name: _reduce(grid, getattr(grid, name), device) for name in AXES if name != "host"},
        }
        reports = [json.loads(text) for text in grid.host.gather_text(json.dumps(mine))]
        nodes = list(dict.fromkeys(str(report["host"]) for report in reports))
        failed = tuple(dict.fromkeys(str(reports[rank]["host"]) for rank, _ in wrong))
        told = "; ".join(f"rank {rank}: {text}" for rank, text in wrong) or "right on every rank and axis"
        tests = Row("known answers", BAD if wrong else OK, told, failed)
        return [tests, *rows_of(reports, device.type)], nodes


def rows_of(reports: list[dict[str, object]], device: str) -> list[Row]:
    """What the ranks' figures mean: the median of each, and who is far below it."""
    rows = [_compared("matrix product", "TFLOP/s", [(rank, r["host"], r["tflops"]) for rank, r in enumerate(reports)],
                      device)]  # fmt: skip
    for name in reports[0]["axes"]:  # type: ignore[attr-defined]
        found = [(rank, r["host"], r["axes"][name]) for rank, r in enumerate(reports)]  # type: ignore[index]
        if any(rate for _, _, rate in found):
            rows.append(_compared(f"all-reduce over {name}", "GB/s", [one for one in found if one[2]], device))
    return rows


def _compared(name: str, unit: str, found: list[tuple[int, object, object]], device: str) -> Row:
    rates = [float(rate) for _, _, rate in found]  # type: ignore[arg-type]
    median = statistics.median(rates)
    text = f"median {median:.3g} {unit} of {len(found)} ranks, least {min(rates):.3g}"
    slow = [(rank, host) for (rank, host, _), rate in zip(found, rates) if rate < SLOW * median]
    if not slow:
        return Row(name, OK, text)
    hosts = tuple(dict.fromkeys(str(host) for _, host in slow))
    text += f": slow on {', '.join(hosts)} (ranks {', '.join(str(rank) for rank, _ in slow)})"
    return Row(name, BAD if device == "cuda" else NOTE, text, hosts)


def _best(action: Callable[[], None], grid: Grid, device: torch.device) -> float:
    """Least seconds of `ROUNDS` turns that all ranks begin together."""
    best = float("inf")
    for turn in range(ROUNDS + 1):
        grid.host.barrier()
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:  # the first sets up connections and picks kernels
            best = min(best, time.perf_counter() - began)
    return best


def _multiply(grid: Grid, device: torch.device, kind: torch.dtype) -> float:
    """TFLOP/s of a square product, all ranks at once."""
    size = 8192 if device.type == "cuda" else 512
    left = torch.ones(size, size, dtype=kind, device=device)
    out = torch.empty_like(left)
    return 2 * size**3 / _best(lambda: (torch.mm(left, left, out=out), None)[1], grid, device) / 1e12


def _reduce(grid: Grid, axis: Axis, device: torch.device) -> float:
    """GB/s on the busiest link of a ring all-reduce, all groups of the axis at once; 0 for an axis of one rank."""
    if axis.size == 1:
        _best(lambda: None, grid, device)  # other ranks of an uneven axis measure meanwhile
        return 0.0
    data = torch.ones((256 if device.type == "cuda" else 4) * 2**20 // 4, device=device)

    def reduce() -> None:
        axis.all_reduce(data).wait()
        data.fill_(1.0)

    return 2 * (axis.size - 1) / axis.size * data.nbytes / _best(reduce, grid, device) / 1e9
