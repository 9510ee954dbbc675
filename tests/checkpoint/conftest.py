"""Doubles and layouts shared by the checkpoint tests."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megapre.checkpoint.reshard import copy_overlap
from megapre.checkpoint.store import save
from megapre.parallel.placement import Address, Shard

TENSORS = {
    "weight/embed": ((11, 6), torch.float32),
    "weight/w": ((8, 12), torch.bfloat16),
    "exp_avg/w": ((8, 12), torch.float32),
    "exp_avg/cube": ((3, 4, 5), torch.float64),
    "weight/bias": ((13,), torch.float16),
    "seen": ((), torch.int64),
    "mask": ((5, 3), torch.bool),
    "none": ((0, 4), torch.float32),
}
Layout = list[list[Address]]
Pieces = list[tuple[Address, Tensor]]


class ThreadSync:
    """Ranks are threads of this process."""

    def __init__(self, rank: int, texts: list[str], gate: threading.Barrier) -> None:
        self.rank, self.texts, self.gate = rank, texts, gate

    def barrier(self) -> None:
        self.gate.wait()

    def gather_text(self, text: str) -> list[str]:
        self.texts[self.rank] = text
        self.gate.wait()
        gathered = list(self.texts)
        self.gate.wait()
        return gathered

    def broadcast_text(self, text: str | None) -> str:
        assert (text is not None) == (self.rank == 0)
        return self.gather_text(text or "")[0]


class Kit:
    """Logical tensors with random bits, layouts of them, and saves by many ranks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.full = {name: self.bits(shape, dtype) for name, (shape, dtype) in TENSORS.items()}

    def bits(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of random bits, so NaN payloads and infinities included."""
        count = torch.Size(shape).numel()
        if dtype == torch.bool:
            return torch.tensor([self.random.random() < 0.5 for _ in range(count)]).view(shape)
        raw = bytearray(self.random.randbytes(count * dtype.itemsize))
        return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(shape)

    def layout(self, kind: str, world: int) -> Layout:
        """Addresses of each rank; all tile every tensor exactly once."""
        ranks: Layout = [[] for _ in range(world)]
        for name, (shape, _) in TENSORS.items():
            for rank, (offset, size, start, end) in enumerate(self._cuts(kind, shape, world)):
                ranks[rank].append(Address(name, shape, offset, size, start, end))
        return ranks

    def _cuts(self, kind: str, shape: tuple[int, ...], world: int) -> list[tuple]:
        dim = {"row": 0, "column": len(shape) - 1, "middle": len(shape) // 2, "zero_in_column": len(shape) - 1}
        if kind in ("flat", "replicas") or not shape:
            return self._flat((0,) * len(shape), shape, world, even=kind == "replicas")
        if kind == "zero_in_column":
            tensor, data = (2, world // 2) if world % 2 == 0 else (1, world)
            held = [Shard(dim[kind]).box(shape, rank, tensor) for rank in range(tensor)]
            return [cut for box in held for cut in self._flat(*box, data, even=False)]
        held = [Shard(dim[kind]).box(shape, rank, world) for rank in range(world)]
        return [(offset, size, 0, torch.Size(size).numel()) for offset, size in held]

    def _flat(self, offset: tuple, size: tuple, parts: int, *, even: bool) -> list[tuple]:
        count = torch.Size(size).numel()
        cuts = sorted(self.random.randint(0, count) for _ in range(parts - 1))
        if even:
            cuts = [count * n // parts for n in range(1, parts)]
        return [(offset, size, a, b) for a, b in zip([0, *cuts], [*cuts, count])]

    def take(self, address: Address) -> Tensor:
        """The elements of an address, by plain slicing."""
        box = self.full[address.name][tuple(slice(o, o + n) for o, n in zip(address.offset, address.size))]
        return box.reshape(-1)[address.start : address.end].clone()

    def pieces(self, addresses: list[Address]) -> Pieces:
        return [(address, self.take(address)) for address in addresses]

    def blank(self, addresses: list[Address]) -> Pieces:
        """Targets full of a value that no test expects."""
        return [(a, torch.full((a.end - a.start,), 77, dtype=TENSORS[a.name][1])) for a in addresses]

    def whole(self) -> list[Address]:
        return self.layout("row", 1)[0]

    def assert_equal(self, pieces: Pieces) -> None:
        for address, data in pieces:
            assert same_bits(data, self.take(address)), address

    def save(self, root: Path, step: int, kind: str = "flat", world: int = 3, state: dict | None = None) -> Path:
        per_rank = [self.pieces(addresses) for addresses in self.layout(kind, world)]
        outcomes = save_by_threads(root, step, per_rank, state or {"at": step})
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes[0]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def save_by_threads(
    root: Path, step: int, per_rank: list[Pieces], state: dict, before: Callable[[int], None] = lambda rank: None
) -> list:
    """Save with one thread per rank; each rank's path or exception."""
    world = len(per_rank)
    texts, gate, outcomes = [""] * world, threading.Barrier(world, timeout=20), [None] * world

    def run(rank: int) -> None:
        try:
            before(rank)
            sync = ThreadSync(rank, texts, gate)
            outcomes[rank] = save(root, step, per_rank[rank], state, rank=rank, world=world, sync=sync)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank{rank}") for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed so that a failure shows it."""
    value = random.SystemRandom().randrange(2**32)
    print(f"seed {value}")
    return value


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a real disk; that fsync is called, and when, is tested by recording the calls."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def kit(seed: int) -> Kit:
    return Kit(seed)


@pytest.fixture
def by_threads() -> Callable[..., list]:
    return save_by_threads


@pytest.fixture
def resharded() -> Callable[[Pieces, Pieces], int]:
    """Copy every source piece into every target piece; the number of elements copied."""
    return lambda sources, targets: sum(copy_overlap(*s, *t) for s in sources for t in targets)
