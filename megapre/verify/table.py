"""``megapre verify``: the layouts of a job against the oracle, as a table, and what a failure is made of."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megapre.config.check import check
from megapre.config.schema import Config
from megapre.data.check import check_data
from megapre.verify.cells import Cell, parse, scaled_down
from megapre.verify.matrix import SIZES, Matrix, blame, matrix, options, pairs, smallest_failure
from megapre.verify.pool import PRELOAD, RankPool
from megapre.verify.run import Prover

MOST_REFUSALS = 3


@dataclass(frozen=True)
class Row:
    """One arm of one layout."""

    cell: Cell
    arm: str
    quantity: str
    error: float
    limit: float
    seconds: float
    kernels: dict[str, str]
    problem: str = ""
    """What a rank raised; empty when it ran to its end."""

    @property
    def good(self) -> bool:
        """Whether the error is within its limit."""
        return not self.problem and self.error <= self.limit


def main(
    config: Config, layouts: str, ranks: int, *, seed: int = 0, full_size: bool = False, processes: bool = False
) -> int:
    """Prove the job's model on ``layouts`` (``all``, ``pairs`` or names) of up to ``ranks`` ranks; 0 when all agree."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    small, vocab_size = _sized(config, seed, full_size)
    chosen = choose(small, layouts, ranks, seed)
    m = small.model
    size = "the job's model" if full_size else "the job's model, scaled down"
    console.print(f"{m.layers} blocks of width {m.hidden}, {vocab_size} ids: {size}")
    workers = 1 if processes else max(1, min(len(chosen.cells), len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as folder, _runner(workers, processes, chosen.cells) as runner:
        start = time.monotonic()
        rows = _rows(runner.pool, small, vocab_size, folder, Cell())  # truth and baseline
        alone = time.monotonic() - start
        if len(chosen.cells) > 1:
            guess = sum(_cost(cell) for cell in chosen.cells) * alone * (3 if processes else 1) / workers
            console.print(f"{len(chosen.cells)} layouts, about {max(1.0, guess / 60):.0f} min on {workers} cores")
        jobs = [(cell, runner.start(small, vocab_size, folder, cell)) for cell in chosen.cells]
        rows = [row for _, result in jobs for row in result()]
        _print(console, rows, chosen)
        failed = [row for row in rows if not row.good]
        for line in explain(failed, lambda cell: _rows(runner.pool, small, vocab_size, folder, cell)):
            console.print(escape(line))
    return 1 if failed else 0


def choose(config: Config, layouts: str, ranks: int, seed: int) -> Matrix:
    """The layouts meant by ``layouts``; names are taken as they are, and refused by ``config/check.py``."""
    if layouts not in ("all", "pairs"):
        cells = [parse(text) for text in layouts.split(",")]
        for cell in cells:
            check(cell.apply(config), cell.world)
        return Matrix(cells, Counter())
    found = matrix(config, ranks)
    return found if layouts == "all" else replace(found, cells=pairs(found.cells, seed))


def _sized(config: Config, seed: int, full_size: bool) -> tuple[Config, int]:
    config = replace(config, data=replace(config.data, seed=config.data.seed + seed))
    if not full_size:
        return scaled_down(config)
    vocab_size = config.model.vocab_size or check_data(config)
    train = replace(config.train, global_batch=4, microbatch=1, device="cpu", threads=1)
    return replace(config, train=train), vocab_size


@dataclass(frozen=True)
class _Runner:
    """How layouts are run: here and now over ``pool``, or by worker processes whose ranks are threads."""

    pool: RankPool | None
    workers: ProcessPoolExecutor | None

    def start(self, config: Config, vocab_size: int, folder: str, cell: Cell) -> Callable[[], list[Row]]:
        """Begin; the result waits for the rows."""
        if self.workers is None:
            return lambda: _rows(self.pool, config, vocab_size, folder, cell)
        future: Future[list[Row]] = self.workers.submit(_rows, None, config, vocab_size, folder, cell)
        return future.result


@contextmanager
def _runner(workers: int, processes: bool, cells: list[Cell]) -> Iterator[_Runner]:
    if processes:
        with RankPool(max(cell.world for cell in cells)) as pool:
            yield _Runner(pool, None)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "megapre.verify.table"])
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as executor:
        yield _Runner(None, executor)


def _rows(pool: RankPool | None, config: Config, vocab_size: int, folder: str, cell: Cell) -> list[Row]:
    """Both arms of one layout. The truth and the unsharded run's errors are kept in ``folder`` for the next."""
    start = time.monotonic()
    prover = Prover(config, vocab_size, pool, Path(folder))
    try:
        results = prover.both(cell)
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [repr(problem)]
        spent = time.monotonic() - start
        return [Row(cell, "both", "", float("nan"), 0.0, spent, {}, f"{type(problem).__name__}: {lines[-1]}")]
    spent = (time.monotonic() - start) / len(results)
    return [Row(cell, arm, *worst, spent, report.kernels) for arm, report, worst in results]


def _cost(cell: Cell) -> float:
    """CPU time of a layout in multiples of the unsharded one's: data and pipeline ranks share the work."""
    ring = 1 + 0.4 * (cell.context - 1) if cell.method == "ring" else 1.0
    return cell.tensor * cell.context * ring * (1.3 if cell.recompute else 1.0) + 0.1 * cell.world


def _print(console: Console, rows: list[Row], chosen: Matrix) -> None:
    table = Table("layout", "arm", "worst quantity", "error", "limit", "s", "verdict")
    table.columns[0].overflow = table.columns[2].overflow = "fold"
    for row in rows:
        verdict = "ok" if row.good else "FAILED"
        figures = (f"{row.error:.1e}", f"{row.limit:.1e}", f"{row.seconds:.1f}")
        table.add_row(str(row.cell), row.arm, escape(row.problem or row.quantity), *figures, verdict)
    console.print(table)
    for arm, kernels in {row.arm: row.kernels for row in rows if row.kernels}.items():
        console.print(f"arm {arm} ran: " + ", ".join(f"{op} {version}" for op, version in kernels.items()))
    failures = sum(not row.good for row in rows)
    console.print(f"layouts: {len(chosen.cells)}, failures: {failures}" + _refusals(chosen))


def _refusals(chosen: Matrix) -> str:
    """How many layouts the job does not allow, and why."""
    total = chosen.refused.total()
    if not total:
        return ""
    shown = [f"{count} x {sentence}" for sentence, count in chosen.refused.most_common(MOST_REFUSALS)]
    rest = len(chosen.refused) - len(shown)
    return f"; not allowed: {total} ({'; '.join(shown)}{f'; {rest} other reasons' if rest else ''})"


def explain(failed: list[Row], run: Callable[[Cell], list[Row]]) -> list[str]:
    """One sentence per smallest failing layout: what is off, where, and which axes are at fault.

    ``run`` runs a layout; every failing one is stripped of axes until each that is left is needed.
    """
    known: dict[tuple[Cell, str], Row] = {(row.cell, row.arm): row for row in failed}

    def fails(cell: Cell, arm: str) -> bool:
        """Whether an arm of a layout fails; a layout that stops fails in every arm."""
        if (cell, arm) not in known:
            found = {row.arm: row for row in run(cell)}  # "both" alone where a rank raised
            known[cell, arm] = found.get(arm) or next(iter(found.values()))
        return not known[cell, arm].good

    lines: list[str] = []
    blamed: list[set[str]] = []
    for row in sorted(failed, key=lambda row: (len(options(row.cell)), row.cell.world)):
        if any(axes <= _axes(row.cell) for axes in blamed):
            continue  # explained already
        smallest = smallest_failure(row.cell, lambda cell, arm=row.arm: fails(cell, arm))  # type: ignore[misc]
        blamed.append(_axes(smallest))
        first = known[smallest, row.arm]
        lines.append(f"{describe(first)} {blame(smallest)}")
    return lines


def _axes(cell: Cell) -> set[str]:
    """What a layout uses, whatever the sizes."""
    return {name if name in SIZES else option for name, option in options(cell).items()}


def describe(row: Row) -> str:
    """What is off, where and by how much, as a sentence."""
    if row.problem:
        return f"{row.cell} stopped with {row.problem}."
    kind, _, name = row.quantity.partition("/")
    block = re.match(r"blocks\.(\d+)\.(.*)", name)
    where = f"{block[2]} in layer {int(block[1]) + 1} (blocks.{block[1]})" if block else name
    if kind == "replicas":
        what = f"{row.error:.0f} tensors differ between the ranks that hold them"
    elif kind in ("loss", "grad_norm"):
        what = f"{kind} of step {int(name)} is off by {row.error:.1e}, limit {row.limit:.1e}"
    else:
        what = f"{kind} of {where} is off by {row.error:.1e}, limit {row.limit:.1e}"
    return f"{row.cell}, arm {row.arm}: {what}."
