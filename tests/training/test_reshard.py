"""A checkpoint of any layout loads into any other, bitwise in logical tensors."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megapre.checkpoint import store
from megapre.config.check import check
from megapre.config.schema import Config
from megapre.models.spec import kv_copies
from megapre.parallel.comm import Axis, Done, Work
from megapre.parallel.grid import AXES, Grid
from megapre.training.engine import build
from megapre.training.resume import restore
from megapre.verify.cells import Cell, every, parse
from megapre.verify.pool import RankPool
from tests.training.jobs import VOCAB, corpus, job, logical, run

SEED = random.SystemRandom().randrange(10**6)
CELLS = list(every(8))
WIDE = [cell for cell in CELLS if cell.world == 8]
ZERO = [
    parse(layout)
    for layout in (
        "1x1x2+zero2", "2x1x2+sp+zero3", "1x2x2+zero3+offload", "1x1x4+zero3+offload-parameters", "1x1x1+offload",
        "2x2x2+sp+zero2+interleaved:2", "1x2x2+zero3+zb-v:2",
    )
]  # fmt: skip


class Silent(Axis):
    """A place on an axis without its peers: what a rank holds and loads needs none of them."""

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """Leave the peers' parts as they are."""
        return Done()


def places(config: Config) -> list[Grid]:
    """The grid as each of the layout's ranks sees it, without process groups."""
    p = config.parallel
    copies = kv_copies(config.model, p.tensor)
    grids = []
    for pipeline in range(p.pipeline):
        for data in range(p.data):
            for tensor in range(p.tensor):
                axes = {"pipeline": (pipeline, p.pipeline), "data": (data, p.data), "tensor": (tensor, p.tensor)}
                axes |= {"kv": (tensor % copies, copies)}
                axes["replicas"] = axes["data"]
                grids.append(Grid(**{name: Silent(name, *axes.get(name, (0, 1))) for name in AXES}))
    return grids


def loads_and_saves_all(path: Path, config: Config, target: Cell, truth: dict[str, Tensor], told: str) -> None:
    """Every rank of ``target`` reads its part of ``truth``; together they would save each element once."""
    other = check(target.apply(config), target.world)
    seen: dict[str, int] = {}
    for grid in places(other):
        engine = build(other, grid, torch.device("cpu"), VOCAB)
        restore(path, other, engine.step)
        for address, piece in engine.step.optimizer.pieces(share=False):
            box = truth[address.name].view(address.shape)
            box = box[tuple(slice(o, o + n) for o, n in zip(address.offset, address.size))]
            assert torch.equal(piece, box.flatten()[address.start : address.end]), f"{address} {target} {told}"
        for address, _ in engine.step.optimizer.pieces(share=True):
            seen[address.name] = seen.get(address.name, 0) + address.end - address.start
    assert seen == {name: value.numel() for name, value in truth.items()}, f"{target} saves another set; {told}"


@pytest.mark.parametrize("source", [Cell(), *random.Random(SEED).sample(WIDE, 3), ZERO[3]], ids=str)
def test_loads_into_every_layout(source: Cell, pool: RankPool, tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "text")
    config = job(prefix, tmp_path / "run", source, steps=2, interval=2)
    assert pool.run(source.world, run, config) == [0] * source.world
    path = tmp_path / "run" / "checkpoints" / store.step_name(2)
    assert store.check(path) == []
    truth = logical(path)
    assert len({name.split("/")[0] for name in truth}) == 3  # weights and both moments
    for target in CELLS + ZERO:
        loads_and_saves_all(path, config, target, truth, f"{SEED=}")
