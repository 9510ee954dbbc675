"""Collectives through shared memory: sums in the order of the ranks, to the bit, and what a peer that is gone does."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megapre.config.load import from_dict
from megapre.config.schema import Config
from megapre.parallel import shared
from megapre.parallel.comm import Axis, Work
from megapre.parallel.shared import Channel, Memory, SharedAxis, library
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.verify.pool import RankPool
from tests.kernels.simt import build
from tests.kernels.simt.test_sanitizers import runtime

HERE = Path(__file__).resolve().parent
MODEL = {"layers": 2, "hidden": 32, "heads": 4, "vocab_size": 64}


def config(**parallel: int) -> Config:
    return from_dict({"model": MODEL, "parallel": parallel, "train": {"device": "cpu"}})


KINDS = (
    "all_reduce", "all_gather", "gather_inside", "reduce_scatter", "scatter_inside", "all_to_all", "all_to_all_uneven",
)  # fmt: skip


def numbers(generator: torch.Generator, count: int, dtype: torch.dtype) -> Tensor:
    values = 100 * torch.randn(count, generator=generator)
    if dtype.is_floating_point:
        values[torch.rand(count, generator=generator) < 0.05] = float("nan")
    return values.to(dtype)


def in_order(parts: list[Tensor], op: str) -> Tensor:
    """The parts reduced one after the other; bf16 is rounded once, at the end."""
    wide = torch.float32 if parts[0].dtype == torch.bfloat16 else parts[0].dtype
    result = parts[0].to(wide)
    for part in parts[1:]:
        result = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[op](result, part.to(wide))
    return result.to(parts[0].dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(12345), b.nan_to_num(12345)) if a.is_floating_point() else torch.equal(a, b)


def drawn_operations(ranks: Ranks, seed: int, slot: int) -> int:
    """Operations of all kinds, posted several at a time and awaited in another order; how many were right."""
    shared.SLOT = slot  # this rank's process works on for other tests with the same small slots
    world, draw, lots = ranks.world, random.Random(seed), random.Random(seed + ranks.rank)
    generator = torch.Generator().manual_seed(seed)
    checked = 0
    with connected(config(data=world), ranks) as (grid, _):
        axis = grid.data
        assert type(axis) is SharedAxis and type(grid.host) is Axis
        for _ in range(30):
            group: list[tuple[Work, Tensor, Tensor, str]] = []
            for _ in range(draw.randint(1, 4)):
                dtype = draw.choice([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32])
                count = draw.choice([1, 3, draw.randint(1, 700), draw.randint(1, 40_000)])
                parts = [numbers(generator, count * world, dtype) for _ in range(world)]
                mine, op = parts[ranks.rank].clone(), draw.choice(["sum", "max", "min"])
                kind = draw.choice(KINDS)
                own = mine.view(world, count)[ranks.rank]
                if kind == "all_reduce":
                    group.append((axis.all_reduce(mine, op), mine, in_order(parts, op), kind))
                elif kind == "all_gather":
                    output = torch.empty(world * mine.numel(), dtype=dtype)
                    group.append((axis.all_gather(output, mine), output, torch.cat(parts), kind))
                elif kind.startswith("all_to_all"):  # of [rank, rank] parts, some empty, as rows of 3
                    most = count if kind == "all_to_all" else draw.randint(0, count)
                    rows = [
                        [most if kind == "all_to_all" else draw.randint(0, most) for _ in range(world)]
                        for _ in range(world)
                    ]
                    sources = [numbers(generator, 3 * sum(each), dtype).view(-1, 3) for each in rows]
                    sent, got = rows[ranks.rank], [each[ranks.rank] for each in rows]
                    right = torch.cat([source.split(each)[ranks.rank] for source, each in zip(sources, rows)])
                    output = torch.empty_like(right)
                    given = () if kind == "all_to_all" else (got, sent)
                    group.append((axis.all_to_all(output, sources[ranks.rank], *given), output, right, kind))
                elif kind == "gather_inside":
                    whole = torch.cat([part.view(world, count)[rank] for rank, part in enumerate(parts)])
                    group.append((axis.all_gather(mine, own), mine, whole, kind))
                else:
                    output = own if kind == "scatter_inside" else torch.empty_like(own)
                    right = in_order(parts, "sum").view(world, count)[ranks.rank]
                    group.append((axis.reduce_scatter(output, mine), output, right, kind))
            lots.shuffle(group)
            for work, result, right, kind in group:
                work.wait()
                work.wait()
                assert same(result, right), f"seed {seed}: {kind} of {result.numel()} x {result.dtype}"
                checked += 1
    return checked


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_operation_is_right_to_the_bit(world: int) -> None:
    seed = random.randrange(2**31)
    with RankPool(world) as pool:
        for slot in (256, 1 << 19):  # of many rounds, and of few
            counts = pool.run(world, drawn_operations, seed, slot)
            assert counts[0] > 25 and len(set(counts)) == 1, f"seed {seed}: {counts}"


def kinds(ranks: Ranks, parallel: dict[str, int], apart: bool) -> tuple[dict[str, str], str]:
    """Which class each axis is, and that gloo's still work; what a run says of it."""
    if apart:  # two hosts of half the ranks each
        ranks = replace(ranks, node=ranks.rank * 2 // ranks.world)
    with connected(config(**parallel), ranks) as (grid, device):
        for axis in (grid.world, grid.data, grid.tensor):
            whole = torch.ones(3, dtype=torch.bfloat16)
            axis.all_reduce(whole).wait()
            assert (whole == axis.size).all()
            small = torch.ones(2, dtype=torch.uint8)  # a type that gloo sums
            axis.all_reduce(small).wait()
            assert (small == axis.size).all()
        found = {name: type(axis).__name__ for name, axis in grid.axes().items() if axis.size > 1}
        return found, shared.report(grid, device)


def test_only_ranks_of_one_host_share_memory() -> None:
    with RankPool(4) as pool:
        together, said = pool.run(4, kinds, {"data": 2, "tensor": 2}, False)[3]
        assert said == "messages: gloo over host; shared memory over world, data, replicas, tensor"
        apart, said = pool.run(4, kinds, {"data": 2, "tensor": 2}, True)[3]
        assert said == "messages: gloo over world, host, data, replicas; shared memory over tensor"
    assert together.pop("host") == apart.pop("host") == "Axis"
    assert set(together.values()) == {"SharedAxis"}
    assert apart["tensor"] == "SharedAxis" and apart["data"] == apart["world"] == apart["replicas"] == "Axis"


def lacking(ranks: Ranks, what: str) -> str:
    if ranks.rank == 1 and what == "library":
        shared.library = lambda: None  # type: ignore[assignment, misc]
    elif ranks.rank == 1:
        os.memfd_create = refused
    with connected(config(data=ranks.world), ranks) as (grid, _):
        x = torch.ones(3)
        grid.data.all_reduce(x).wait()
        assert (x == ranks.world).all()
        return type(grid.data).__name__


def refused(*args: object) -> int:
    raise PermissionError("memfd_create")


@pytest.mark.parametrize("what", ["library", "memfd"])
def test_a_rank_that_cannot_share_takes_all_to_gloo(what: str) -> None:
    with RankPool(3) as pool:
        assert pool.run(3, lacking, what) == ["Axis"] * 3


def wrong_shapes(ranks: Ranks) -> list[str]:
    said = []
    with connected(config(data=ranks.world), ranks) as (grid, _):
        for post in (
            lambda: grid.data.all_gather(torch.empty(5), torch.empty(2)),
            lambda: grid.data.reduce_scatter(torch.empty(2), torch.empty(4, dtype=torch.bfloat16)),
            lambda: grid.data.all_reduce(torch.empty(4, 4).t()),
            lambda: grid.data.all_to_all(torch.empty(4), torch.empty(4), [2, 2], [3, 2]),
        ):
            with pytest.raises(ValueError) as problem:
                post()
            said.append(str(problem.value))
    return said


def test_what_does_not_fit_is_refused_before_anything_moves() -> None:
    with RankPool(2) as pool:
        said = pool.run(2, wrong_shapes)[1]
    assert "a shard of 2 x torch.float32 and a whole of 5 x torch.float32" in said[0]
    assert "torch.bfloat16" in said[1] and "not contiguous" in said[2]
    assert "parts of [3, 2] rows do not make up a tensor of 4" in said[3]


def unlike(ranks: Ranks) -> str:
    with connected(config(data=ranks.world), ranks) as (grid, _):
        sent = [1, 1] if ranks.rank == 0 else [2, 0]  # rank 0 expects 1 row of rank 1
        received = [1, 1] if ranks.rank == 0 else [1, 0]
        work = grid.data.all_to_all(torch.empty(sum(received)), torch.empty(2), received, sent)
        if ranks.rank == 0:
            with pytest.raises(RuntimeError) as problem:
                work.wait()
            return str(problem.value)
        return ""


def test_parts_of_unlike_length_are_told_apart() -> None:
    with RankPool(2) as pool:
        said = pool.run(2, unlike)[0]
    assert said == (
        "rank 1 of axis data sends another number of bytes than this rank expects: its all_to_all cannot be completed."
    )


PEER = """
import sys, torch
from megapre.parallel.shared import Channel, Memory, library
memory = Memory(library(), 1)
print(memory.card("here"), flush=True)
other = memory.open(sys.stdin.readline())
channel = Channel(library(), "data", 1, memory, [other, (memory.address, memory.file)], 30.0, 0)
x = torch.ones(5)
channel.post("all_reduce", 1, "sum", x, x, 5).wait()
print(x.tolist(), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(("how", "said"), [("SIGKILL", "has ended"), ("SIGSTOP", "did not take part in time")])
def test_a_peer_that_is_gone_or_silent_is_named(how: str, said: str) -> None:
    found = library()
    assert found is not None
    memory = Memory(found, 1)
    with subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]
    ) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        try:
            other = memory.open(peer.stdout.readline())
            assert other is not None
            peer.stdin.write(memory.card("here") + "\n")
            peer.stdin.flush()
            patience = 1.0 if how == "SIGSTOP" else 60.0
            channel = Channel(found, "data", 0, memory, [(memory.address, memory.file), other], patience, 0)
            x = torch.ones(5)
            channel.post("all_reduce", 1, "sum", x, x, 5).wait()
            assert x.tolist() == [2.0] * 5 and peer.stdout.readline() == f"{[2.0] * 5}\n"
            os.kill(peer.pid, getattr(signal, how))
            began = time.monotonic()
            for _ in range(2):  # and whatever is posted later fails at once
                work = channel.post("all_reduce", 1, "sum", x, x, 5)
                with pytest.raises(RuntimeError, match=f"rank 1 of axis data {said}: its all_reduce"):
                    work.wait()
            assert time.monotonic() - began < 10
        finally:
            peer.kill()


def test_a_file_of_somebody_else_is_not_taken_for_a_peers() -> None:
    found = library()
    assert found is not None
    memory, other = Memory(found, 1), Memory(found, 1)
    host, pid, file, token = other.card("here").split()
    assert other.open(f"{host} {pid} {file} {token}") is not None
    assert memory.open(f"{host} {pid} {memory.file} {token}") is None
    assert memory.open(f"{host} {pid} 999999 {token}") is None


def test_no_rank_reads_what_another_writes(tmp_path: Path) -> None:
    """The protocol under ThreadSanitizer, with ranks as threads, small slots and helpers that race for operations."""
    if build.compiler() is None or runtime("tsan") is None:
        pytest.skip("there is no g++ with ThreadSanitizer")
    program = tmp_path / "shared_threads"
    flags = ["-O1", "-g1", "-Wall", "-Werror", "-std=c++17", "-pthread", "-fsanitize=thread"]
    source = str(HERE / "shared_threads.cpp")
    subprocess.run([str(build.compiler()), *flags, source, "-o", str(program)], check=True)
    seed = random.randrange(2**31)
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []  # TSan's shadow of older releases needs it
    for ranks in ("2", "3", "4"):
        done = subprocess.run(
            [*prefix, str(program), ranks, str(seed), "60"], capture_output=True, text=True, timeout=100,
            env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
        )  # fmt: skip
        assert done.returncode == 0, f"{ranks} ranks, seed {seed}: {done.stdout}{done.stderr[-3000:]}"
