"""One rank of a grid of any size, on one CPU, without its memory: what it holds at its peak and what it sends.

The rank's real grid is built on torch's fake process group, its real model on fake tensors (shapes without data), and
one optimizer step runs through the same ``TrainStep`` as training. Every storage that an operation makes is counted
from its birth to its death, so that the peak is that of the step's own order of events; every ``Axis`` counts its
bytes.

The kernels are those of the CPU. What a GPU adds is not seen: the allocator's fragments, NCCL's buffers, the
workspaces inside kernels, the CUDA context.
"""

from __future__ import annotations

import json
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from megapre.config.check import ConfigError
from megapre.config.schema import Config
from megapre.data.loader import Counts, Microbatch
from megapre.parallel.grid import Grid
from megapre.resilience.connect import build_grid
from megapre.training.engine import Engine, build
from megapre.verify.instruments import counted

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "update", "host")
"""What memory is for. ``activations`` holds all that forward and backward make, messages included, but logits and
their gradient; ``update`` what clipping and the optimizer make; ``host`` what ``parallel.offload`` keeps elsewhere."""


@dataclass(frozen=True)
class Trace:
    """One step of one rank."""

    rank: int
    world: int
    coordinates: dict[str, tuple[int, int]]
    """Axis -> (rank, size)."""
    parameters: int
    """Elements of weights that this rank holds."""
    microbatches: int
    peak: dict[str, int]
    """Kind -> bytes at the moment when their sum is largest."""
    static: dict[str, int]
    """Kind -> bytes before the first step."""
    traffic: dict[str, int]
    """axis/operation -> bytes of the whole tensors that this rank hands in, per step."""
    seconds: float
    """What the trace itself took."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of every living storage by kind; ``phase`` is the kind of what is made next."""

    def __init__(self, logits_width: int = 0) -> None:
        super().__init__()
        self.phase, self.logits_width = "weights", logits_width
        self.sizes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.living: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``op``, then look at what it made and what it was given: a storage may have been freed or grown."""
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves((result, args, kwargs)):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        if sum(self.living.values()) > sum(self.peak.values()):
            self.refresh()
        return result

    def see(self, tensor: Tensor, kind: str = "") -> None:
        """Count ``tensor``'s storage as ``kind``, or as what it was first seen as."""
        storage = tensor.untyped_storage()
        known = self.sizes.get(storage)
        if known is None:
            known = _Size(self.living)
            known.kind = kind or self._kind(tensor)
            self.sizes[storage] = known
            weakref.finalize(storage, known.set, 0)
        elif kind:
            known.move(kind)
        known.set(storage.nbytes())

    def refresh(self) -> None:
        """Storages resized to nothing are noticed here: let them go, then raise the peak if it still is one."""
        for storage, known in list(self.sizes.items()):
            known.set(storage.nbytes())
        if sum(self.living.values()) > sum(self.peak.values()):
            self.peak = self.living.copy()

    def name_static(self, engine: Engine) -> None:
        """What building has made belongs to the optimizer, but for weights and gradients."""
        for known in list(self.sizes.values()):
            known.move("optimizer")
        flat = engine.model.flat
        for kind, home in (("weights", flat.weights), ("gradients", flat.gradients)):
            for tensor in (*home.shards, *(room.tensor for room in home.rooms)):
                self.see(tensor, kind)
        away = [t for held in engine.step.optimizer.state.values() for t in held] if flat.home.away else []
        for tensor in away + (flat.weights.shards if flat.weights.home.away else []):
            self.see(tensor, "host")

    def _kind(self, tensor: Tensor) -> str:
        inside = self.phase == "activations" and tensor.dim() > 0
        return "logits" if inside and tensor.shape[-1] == self.logits_width else self.phase


class _Size:
    """Bytes of one storage, kept in step with the sum of its kind."""

    def __init__(self, sums: Counter[str]) -> None:
        self.sums, self.kind, self.bytes = sums, "", 0

    def move(self, kind: str) -> None:
        size = self.bytes
        self.set(0)
        self.kind = kind
        self.set(size)

    def set(self, size: int) -> None:
        self.sums[self.kind] += size - self.bytes
        self.bytes = size


def trace(config: Config, vocab_size: int, rank: int) -> Trace:
    """One step of ``rank`` of the checked job ``config``, its parallel sizes being the world."""
    started = time.monotonic()
    counts: dict[str, int] = {}
    with fake_grid(config, rank) as (grid, world), FakeTensorMode():
        engine, static, peak = observe(config, counted(grid, counts), vocab_size)
    axes = {name: getattr(grid, name) for name in ("pipeline", "data", "context", "tensor")}
    return Trace(
        rank=rank,
        world=world,
        coordinates={name: (axis.rank, axis.size) for name, axis in axes.items()},
        parameters=engine.model.flat.layout.total,
        microbatches=config.train.global_batch // (config.train.microbatch * grid.data.size),
        peak=peak,
        static=static,
        traffic=dict(sorted(counts.items())),
        seconds=time.monotonic() - started,
    )


def observe(config: Config, grid: Grid, vocab_size: int) -> tuple[Engine, dict[str, int], dict[str, int]]:
    """Build this rank and run its first step; returns the engine, and bytes by kind before the step and at its peak.

    On fake tensors under ``FakeTensorMode``; on real ones it measures what ``trace`` predicts.
    """
    with Ledger() as ledger:
        engine = build(config, grid, torch.device("cpu"), vocab_size, initialise=False)
        ledger.name_static(engine)
        ledger.refresh()
        ledger.peak = ledger.living.copy()  # of the step, not of building
        static = {kind: ledger.living[kind] for kind in KINDS}
        ledger.phase, ledger.logits_width = "activations", -(-vocab_size // grid.tensor.size)
        loss, rms = engine.step.compute_gradients(_microbatches(config), Counts(1), 0)
        ledger.phase = "update"
        engine.step.apply_gradients(loss, rms, 0.0)
    return engine, static, {kind: ledger.peak[kind] for kind in KINDS}


@contextmanager
def fake_grid(config: Config, rank: int) -> Iterator[tuple[Grid, int]]:
    """The real grid of ``rank`` on a process group that sends nothing, and the number of its ranks."""
    parallel = config.parallel
    world = parallel.tensor * parallel.pipeline * parallel.data * parallel.context
    if not 0 <= rank < world:
        raise ConfigError(f"--rank must be between 0 and {world - 1}, the last of the job's ranks, not {rank}")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield build_grid(config, torch.device("cpu"), host="fake"), world
    finally:
        dist.destroy_process_group()


def _microbatches(config: Config) -> list[Microbatch]:
    """This rank's part of a global batch, in shapes only: with all that the job's objective makes."""
    train, model, data = config.train, config.model, config.data
    length, batch, pairs = model.sequence, train.microbatch, config.model.sentence_classes > 0

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    made: dict[str, Tensor] = {}
    if data.reset_attention or pairs:
        made["segments"] = ids(length, batch)
    if model.source_sequence:
        made["source"] = ids(model.source_sequence, batch)
    if model.architecture == "two_stream":
        made["ranks"] = ids(length, batch)
    if data.objective == "prefix":
        made["prefix"] = ids(batch)
    if pairs:
        made |= {"token_types": ids(length, batch), "labels": ids(batch), "label_weights": torch.ones(batch)}
    one = Microbatch(
        tokens=ids(length, batch), targets=ids(length, batch), weights=torch.ones(length, batch),
        positions=ids(length, batch), segments=made.pop("segments", None), samples=ids(batch), **made,
    )  # fmt: skip
    return [replace(one) for _ in range(train.global_batch // (batch * config.parallel.data))]


def main(config: Config, rank: int, as_json: bool) -> int:
    """``megapre trace``: print one rank's memory by kind and bytes by axis."""
    if config.model.experts:
        raise ConfigError("trace has no values, so it cannot route tokens: set model.experts to 0")
    if not config.model.vocab_size:
        raise ConfigError("model.vocab_size is 0, to be taken from the data, which trace does not read: set it")
    found = trace(config, config.model.vocab_size, rank)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _print(found, Console())
    return 0


def _print(found: Trace, console: Console) -> None:
    places = ", ".join(f"{name} {rank}/{size}" for name, (rank, size) in found.coordinates.items())
    console.print(f"rank {found.rank} of {found.world:,} ({places}): {found.parameters:,} parameters, "
                  f"{found.microbatches} microbatches a step; traced in {found.seconds:.1f} s")  # fmt: skip
    table = Table(title="memory, GiB")
    for column in ("kind", "before the step", "at the peak"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in KINDS:
        table.add_row(kind, f"{found.static[kind] / 2**30:.3f}", f"{found.peak[kind] / 2**30:.3f}")
    sums = [sum(size for kind, size in held.items() if kind != "host") for held in (found.static, found.peak)]
    table.add_row("sum on the device", *(f"{size / 2**30:.3f}" for size in sums))
    console.print(table)
    table = Table(title="bytes a step by axis and operation, GiB (of the whole tensor, as this rank hands it in)")
    table.add_column("axis / operation")
    table.add_column("GiB", justify="right")
    for name, size in found.traffic.items():
        table.add_row(name.replace("/", " / "), f"{size / 2**30:.3f}")
    console.print(table)
