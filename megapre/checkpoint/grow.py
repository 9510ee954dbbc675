"""Write a checkpoint that a larger model starts from, out of a smaller one's weights, a few gigabytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path

from torch import Tensor

from megapre.checkpoint import store
from megapre.checkpoint.format import write_rank
from megapre.config.schema import Config
from megapre.models.grow import Growth
from megapre.parallel.placement import Address

SHARD_BYTES = 4 << 30
"""Of fp64 weights that are made before they are written."""


def write_grown(
    root: Path, plan: Sequence[Growth], read: Callable[[str], Tensor], config: Config, vocab_size: int,
    *, noise: float = 0.0, seed: int = 1, shard_bytes: int = SHARD_BYTES,
) -> Path:  # fmt: skip
    """Write the weights of ``plan``, grown from the tensors that ``read`` gives by name, as step 0 under ``root``.

    ``config`` is the job that will start from them. Returns the checkpoint; it holds weights alone
    (``checkpoint.weights_only``). Raises ValueError when ``root`` is not empty, CheckpointError when the disk refuses.
    """
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty: grow into a new folder.")
    groups = list(_groups(plan, shard_bytes))
    ticket = store.agree(root, 0, 0, len(groups), store.SingleProcess())
    ticket.open()
    try:
        digests = [
            write_rank(
                ticket.partial, [_piece(growth, read, noise, seed) for growth in group], **ticket.place | {"rank": rank}
            )
            for rank, group in enumerate(groups)
        ]
        ticket.commit(digests, {"step": 0, "vocab_size": vocab_size, "job": asdict(config)})
    except BaseException:
        ticket.withdraw()
        raise
    return ticket.final


def _groups(plan: Sequence[Growth], limit: int) -> Iterator[list[Growth]]:
    """The tensors in order, in groups of at most ``limit`` bytes or of one tensor."""
    group: list[Growth] = []
    size = 0
    for growth in plan:
        more = 8 * prod(growth.shape)
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append(growth)
        size += more
    yield group


def _piece(growth: Growth, read: Callable[[str], Tensor], noise: float, seed: int) -> tuple[Address, Tensor]:
    shape = growth.shape
    address = Address(f"weight/{growth.name}", shape, (0,) * len(shape), shape, 0, prod(shape))
    return address, growth.of(read(growth.source), noise, seed).flatten()
