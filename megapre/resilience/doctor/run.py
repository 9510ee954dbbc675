"""``megapre doctor``: is this node fit for a job? With a job, also how fast its ranks compute and communicate.

Exit codes: 0 fit, 1 refused (one sentence on stderr names the node and why), 2 a bad job.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megapre.config.load import from_toml, to_toml
from megapre.config.schema import Config
from megapre.models.spec import tensors
from megapre.resilience.doctor.gpu import gpu_rows
from megapre.resilience.doctor.host import (
    card_rows,
    clock_rows,
    core_rows,
    disk_rows,
    ecc_rows,
    limit_rows,
    memory_rows,
    space_rows,
    version_rows,
)
from megapre.resilience.doctor.rows import BAD, Row, guarded, node_name
from megapre.resilience.ranks import ALONE, NodePlan, Ranks, discover
from megapre.resilience.signals import StopRequest

BYTES = 12
"""Of a checkpoint per parameter: fp32 master weight and two moments."""


def examine(folder: Path, mib: int, least: tuple[float, float], gpus: int, needed: int) -> list[Row]:
    """All that one node can tell of itself."""
    looks = (
        ("versions", version_rows),
        ("GPUs", lambda: gpu_rows(gpus)),
        ("cores", core_rows),
        ("NICs", card_rows),
        ("limits", limit_rows),
        ("memory", memory_rows),
        ("host ECC", ecc_rows),
        ("clock", clock_rows),
        ("free space", lambda: space_rows(folder, needed)),
        ("file system", lambda: disk_rows(folder, mib, least)),
    )
    return [row for name, look in looks for row in guarded(name, look)]


def checkpoint_bytes(config: Config) -> int:
    """What the kept checkpoints of a job take, and one that is being written."""
    model = config.model
    total = sum(_count(spec.shape) for spec in tensors(model, model.vocab_size or 50_257))
    keep = config.checkpoint
    return BYTES * total * (keep.keep_last + 1 if keep.interval or keep.minutes else 1)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def show(rows: Sequence[Row], nodes: Sequence[str]) -> int:
    """Print the table and a verdict for scripts; 1 and a sentence on stderr when a node is refused, else 0."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.status:<4}  {row.name:<{width}}  {row.text}")
    sys.stdout.flush()
    bad = [row for row in rows if row.status == BAD]
    refused = list(dict.fromkeys(node for row in bad for node in row.nodes or nodes))
    if bad:
        who = f"node {refused[0]} is" if len(refused) == 1 else f"nodes {', '.join(refused)} are"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        print(f"megapre: {who} refused: {bad[0].name}: {bad[0].text}{more}", file=sys.stderr, flush=True)
    for verdict, which in (("fit", [node for node in nodes if node not in refused]), ("refused", refused)):
        if which:
            print(f"{verdict}: {' '.join(which)}", flush=True)
    return int(bool(bad))


def main(
    config: Config | None,
    plan: Ranks | NodePlan | None,
    mib: int,
    least: tuple[float, float],
    gpus: int,
    only: str = "",
) -> int:
    """Examine this node and, of a job, the speed of its ranks, or ``only`` the ``node`` or the ``ranks``; exit code."""
    folder = Path(config.train.run_dir) if config else Path(".")
    if config:
        folder.mkdir(parents=True, exist_ok=True)
    alone = not isinstance(plan, Ranks) or plan.local_rank == 0
    code = 0
    if alone and only != "ranks":
        print(f"node {node_name()}", flush=True)
        rows = examine(folder, mib, least, gpus, checkpoint_bytes(config) if config else 0)
        code = show(rows, [node_name()])
    if config is None or code or only == "node":
        return code
    if isinstance(plan, Ranks):
        return _rank(config, plan)
    from megapre.resilience.launcher import launch

    world = config.parallel.tensor * config.parallel.pipeline * config.parallel.context * config.parallel.data
    node = plan or NodePlan(world, 1, 0, world, ALONE.address, 0)
    if node.world == 1:
        return _rank(config, ALONE)
    return launch(
        node.world, _launched, [to_toml(config)], nnodes=node.nodes, node_rank=node.node, address=node.address,
        port=node.port, max_restarts=0, threads=config.train.threads, preload=("megapre.resilience.doctor.speed",),
    )  # fmt: skip


def _launched(argv: list[str]) -> int:
    """One rank under our launcher."""
    StopRequest().install()
    config = from_toml(argv[0])
    ranks = discover(os.environ, 0)
    assert isinstance(ranks, Ranks), "the launcher sets torchrun's variables"
    return _rank(config, ranks)


def _rank(config: Config, ranks: Ranks) -> int:
    from megapre.resilience.doctor.speed import measure

    rows, nodes = measure(config, ranks)
    return show(rows, nodes) if ranks.rank == 0 else 0
