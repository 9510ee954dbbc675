"""Asynchronous saves: what they hold, when they become valid, and what a crash or a failure leaves."""

from __future__ import annotations

import builtins
import errno
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from megapre.checkpoint import format as disk
from megapre.checkpoint import store, writer
from megapre.checkpoint.reshard import CheckpointError
from megapre.checkpoint.store import SingleProcess, check, list_checkpoints, load, newest_valid, prune, read_state
from megapre.checkpoint.writer import Saver
from megapre.parallel.placement import Address
from tests.checkpoint.conftest import ThreadSync
from tests.checkpoint.test_damage import Disk, Killed


def alone(root: Path, **options: object) -> Saver:
    saver = Saver(root, rank=0, world=1, sync=SingleProcess(), **options)  # type: ignore[arg-type]
    return saver


def keeping_one(root: Path, **options: object) -> Saver:
    return alone(root, keep=lambda path: prune(root, 1, 0, saved=path), **options)


def tensor(size: int = 1000) -> list[tuple[Address, torch.Tensor]]:
    return [(Address("w", (size,), (0,), (size,), 0, size), torch.randn(size))]


def read(path: Path, size: int = 1000) -> torch.Tensor:
    target = torch.zeros(size)
    load(path, [(Address("w", (size,), (0,), (size,), 0, size), target)])
    return target


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, monkeypatch):
    """Weights and state that change right after `save` returns do not reach a slow writer."""
    monkeypatch.setattr(disk, "CHUNK", 256)
    real = disk.write_staged
    gate = threading.Event()
    monkeypatch.setattr(writer, "write_staged", lambda *a: (gate.wait(20), real(*a))[1])
    pieces = tensor()
    saver = alone(tmp_path)
    assert saver.prepare(pieces, 1.0)
    seen = {}
    for step in (1, 2, 3):
        gate.clear()
        pieces[0][1].fill_(step)
        seen[step] = pieces[0][1].clone()
        began = time.monotonic()
        state = {"step": step, "guard": {"losses": [step]}}
        saver.save(step, pieces, state)
        state["step"] = -1
        state["guard"]["losses"].append(-1)  # type: ignore[index]
        assert time.monotonic() - began < 10 and list_checkpoints(tmp_path)[-1].problem is not None
        pieces[0][1].fill_(float("nan"))
        assert saver.written() == -1, "nothing is written while the writer waits"
        gate.set()
        saver.finish()
    for step, expected in seen.items():
        path = tmp_path / store.step_name(step)
        assert check(path) == [] and torch.equal(read(path), expected)
        assert read_state(path) == {"step": step, "guard": {"losses": [step]}}


def test_the_files_are_those_of_a_synchronous_save(tmp_path, kit, monkeypatch):
    monkeypatch.setattr(disk, "CHUNK", 256)
    monkeypatch.setattr(disk, "GRAIN", 100)
    pieces = kit.pieces(kit.whole())
    saver = alone(tmp_path / "async")
    saver.prepare(pieces, 1.0)
    saver.save(4, pieces, {"a": 1})
    saver.finish()
    path = store.save(tmp_path / "sync", 4, pieces, {"a": 1}, rank=0, world=1, sync=SingleProcess())
    names = sorted(p.name for p in path.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "async" / path.name).iterdir())
    ours = store.read_manifest(path, 0, store.read_root(path))
    other = tmp_path / "async" / path.name
    theirs = store.read_manifest(other, 0, store.read_root(other))
    assert ours.pieces == theirs.pieces and ours.bytes == theirs.bytes
    sizes = [(folder / names[-1]).stat().st_size for folder in (path, other)]
    assert sizes == [ours.bytes] * 2
    targets = kit.blank(kit.whole())
    load(other, targets)
    kit.assert_equal(targets)


def test_memory_that_changes_before_it_is_written_is_noticed(tmp_path, monkeypatch, seed):
    """A bit that flips in the staged copy: the checksums are those of the live tensors."""
    monkeypatch.setattr(disk, "CHUNK", 512)
    pieces, rng = tensor(), random.Random(seed)
    saver = alone(tmp_path)
    saver.prepare(pieces, 1.0)
    saver.save(1, pieces, {})
    saver.finish()
    real = disk.write_staged

    def flipped(directory: Path, staged: disk.Staged) -> str:
        staged.data[rng.randrange(len(staged.data))] ^= 1 << rng.randrange(8)
        return real(directory, staged)

    monkeypatch.setattr(writer, "write_staged", flipped)
    for step in range(2, 22):
        saver.save(step, pieces, {})
        told = ""
        try:
            saver.finish()
        except CheckpointError as error:
            told = str(error)
        assert "the host memory of rank 0 changed" in told and "before it was written" in told, (step, seed)
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001"]


@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step again"])
@pytest.mark.parametrize("death", ["kill", "error"])
def test_a_crash_at_any_operation_of_an_asynchronous_save(tmp_path, kit, monkeypatch, step, death):
    every_end(tmp_path, kit, monkeypatch, step, death)


def every_end(tmp_path, kit, monkeypatch, step, death) -> int:
    """As of a synchronous one: the old checkpoint or the new one loads, whatever the operation that dies."""
    monkeypatch.setattr(disk, "CHUNK", 256)
    old, new = kit.blank(kit.whole()), kit.pieces(kit.whole())
    first = alone(tmp_path / "pristine")
    first.save(1, old, {})
    outcomes = {"old": 0, "new": 0}
    for at in range(1, 200):
        root = tmp_path / f"run{at}"
        shutil.copytree(tmp_path / "pristine", root)
        with monkeypatch.context() as patch:
            saver = keeping_one(root)
            saver.prepare(new, 1.0)
            machine = Disk(patch, at, OSError(errno.ENOSPC, "No space left on device") if death == "error" else None)
            try:
                saver.save(step, new, {"at": step})
                saver.finish()
                failed = False
            except (Killed, CheckpointError) as error:
                failed = True
                assert death == "kill" or str(error).count("No space left on device") == 1
        found = newest_valid(root, log=lambda line: None)
        assert found is not None, (at, machine.events)
        targets = kit.blank(kit.whole())
        load(found, targets)
        is_new = all(torch.equal(t.view(torch.uint8), e.view(torch.uint8)) for (_, t), (_, e) in zip(targets, new))
        is_old = all(torch.equal(t.view(torch.uint8), e.view(torch.uint8)) for (_, t), (_, e) in zip(targets, old))
        assert is_new or is_old, at
        assert is_new or failed, at
        outcomes["new" if is_new else "old"] += 1
        if machine.count < at:
            break
        saver = keeping_one(root)
        saver.prepare(new, 1.0)
        saver.save(step, new, {})
        saver.finish()
        assert [p.name for p in root.iterdir()] == [store.step_name(step)], at
        shutil.rmtree(root)
    assert at > 15 and outcomes["old"] > 10 and outcomes["new"] >= 1, (at, outcomes)
    return at


class Unsynced:
    """Records what a save does to the disk, so that states after a loss of power can be laid out.

    Durable is what a file held at its last fsync, under the name that its directory had at its own last fsync. What
    came later may or may not be there: files are cut at every length class, renames may be lost.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.states: list[tuple[str, str, bytes | str]] = []
        real_fsync, real_rename, real_mkdir = os.fsync, os.rename, os.mkdir

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self.states.append(("sync directory", path, ""))
            else:
                self.states.append(("sync", path, Path(path).read_bytes()))
            real_fsync(descriptor)

        def rename(old: object, new: object) -> None:
            self.states.append(("rename", str(old), str(new)))
            real_rename(old, new)  # type: ignore[arg-type]

        def mkdir(path: object, *rest: object, **named: object) -> None:
            self.states.append(("mkdir", str(path), ""))
            real_mkdir(path, *rest, **named)  # type: ignore[arg-type]

        def opened(path: object, mode: str) -> object:
            self.states.append(("create", str(path), ""))
            return builtins.open(path, mode)  # type: ignore[call-overload]

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(disk, "open", opened, raising=False)

    def after_power_loss(self, root: Path, end: int, rng: random.Random) -> None:
        """Bring ``root``, as it was before, to a state that a loss of power after event ``end`` may leave.

        Contents of files without fsync are missing, cut or garbage; renames since the last sync of their directory
        happened or did not, as a prefix of their order (journals keep it).
        """
        events = self.states[:end]
        synced = max((n for n, e in enumerate(events) if e[0] == "sync directory" and e[1] == str(root)), default=-1)
        names = [n for n, e in enumerate(events) if e[0] == "rename"]
        kept = [n for n in names if n < synced]
        kept += [n for n in names if n > synced][: rng.randint(0, sum(n > synced for n in names))]
        contents = {path: content for kind, path, content in events if kind == "sync"}
        for number, (kind, path, other) in enumerate(events):
            if kind == "mkdir":
                Path(path).mkdir(exist_ok=True)
            elif kind in ("create", "sync"):
                whole = contents.get(path)
                garbage = rng.randbytes(rng.randrange(200))
                data = whole if isinstance(whole, bytes) and kind == "sync" else garbage
                if Path(path).parent.is_dir():
                    Path(path).write_bytes(data)
            elif kind == "rename" and number in kept and Path(path).exists():
                os.rename(path, str(other))


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step again"])
def test_a_loss_of_power_leaves_the_old_or_the_new(tmp_path, kit, monkeypatch, seed, step, mode):
    every_loss(tmp_path, kit, monkeypatch, random.Random(seed), step, mode)


def every_loss(tmp_path, kit, monkeypatch, rng: random.Random, step, mode) -> int:
    """Lose what no fsync made durable after each operation of a save, four ways each; how many states that is."""
    root = tmp_path / "run"
    old, new = kit.blank(kit.whole()), kit.pieces(kit.whole())
    alone(root).save(1, old, {})
    shutil.copytree(root, tmp_path / "pristine")
    with monkeypatch.context() as patch:
        machine = Unsynced(patch)
        saver = alone(root)
        if mode == "async":
            saver.prepare(new, 1.0)
        saver.save(step, new, {})
        saver.finish()
    kinds = [kind for kind, _, _ in machine.states]
    assert kinds.count("create") == 3 and kinds.count("sync") == 3 and "rename" in kinds
    for end in range(len(machine.states) + 1):
        for _ in range(4):
            shutil.rmtree(root)
            shutil.copytree(tmp_path / "pristine", root)
            machine.after_power_loss(root, end, rng)
            found = newest_valid(root, log=lambda line: None)
            assert found is not None, (end, machine.states[:end])
            targets = kit.blank(kit.whole())
            load(found, targets)
            expected = new if torch.equal(targets[0][1].view(torch.uint8), new[0][1].view(torch.uint8)) else old
            for (_, t), (_, e) in zip(targets, expected):
                assert torch.equal(t.view(torch.uint8), e.view(torch.uint8)), end
    assert expected is new, "after the last sync the new one is durable"
    return 4 * (len(machine.states) + 1)


def ranks(root: Path, world: int, body) -> list:
    """Run ``body(saver, rank)`` with one thread per rank; each rank's result or exception."""
    texts, gate = [""] * world, threading.Barrier(world, timeout=20)
    outcomes: list = [None] * world

    def run(rank: int) -> None:
        saver = Saver(root, rank=rank, world=world, sync=ThreadSync(rank, texts, gate), timeout=5.0)
        try:
            outcomes[rank] = body(saver, rank)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("culprit", [0, 2])
def test_one_rank_that_cannot_write_is_every_ranks_error_and_the_next_save_works(tmp_path, kit, monkeypatch, culprit):
    broken = [True]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if broken[0] and f"rank_{culprit:05d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    layout = kit.layout("flat", 3)

    def body(saver: Saver, rank: int) -> str:
        pieces = kit.pieces(layout[rank])
        saver.prepare(pieces, 1.0)
        saver.save(1, pieces, {})
        try:
            saver.finish()
            told = ""
        except CheckpointError as error:
            told = str(error)
        saver.sync.barrier()
        broken[0] = False
        saver.save(2, pieces, {})
        saver.finish()
        return told

    told = set(ranks(tmp_path, 3, body))
    assert told == {f"the checkpoint was not saved because rank {culprit} failed: Input/output error"}
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000002"] and check(tmp_path / "step_0000002") == []


def test_a_writer_that_never_answers_is_an_error_before_the_collectives_time_out(tmp_path, kit, monkeypatch):
    never = threading.Event()
    real = writer.write_staged
    monkeypatch.setattr(
        writer, "write_staged", lambda d, s: (s.manifest["rank"] == 1 and never.wait(60), real(d, s))[1]
    )
    layout = kit.layout("flat", 2)

    def body(saver: Saver, rank: int) -> None:
        saver.timeout = 0.5
        saver.prepare(kit.pieces(layout[rank]), 1.0)
        saver.save(1, kit.pieces(layout[rank]), {})
        saver.finish()

    outcomes = ranks(tmp_path, 2, body)
    assert {str(o) for o in outcomes} == {
        "the checkpoint was not saved because rank 1 failed: its file system has not answered for 0 s"
    }
    never.set()


def test_too_little_host_memory_is_said_and_the_save_is_synchronous(tmp_path, kit):
    said: list[str] = []
    pieces = tensor(3 * 2**20)
    saver = alone(tmp_path, say=said.append)
    assert not saver.prepare(pieces, 0.001)
    assert said == [
        "checkpoints are saved synchronously: rank 0 needs 0.01 GiB of host memory and checkpoint.host_memory is 0.001"
    ]
    saver.save(1, pieces, {})
    assert check(tmp_path / "step_0000001") == []
    assert saver.prepare(pieces, 0)


def test_tensors_that_outgrow_the_buffer_are_saved_all_the_same(tmp_path):
    saver = alone(tmp_path)
    saver.prepare(tensor(10), 1.0)
    pieces = tensor(100_000)
    saver.save(1, pieces, {})
    saver.finish()
    path = tmp_path / "step_0000001"
    assert check(path) == [] and torch.equal(read(path, 100_000), pieces[0][1])


def test_old_checkpoints_that_cannot_be_removed_do_not_fail_the_save(tmp_path):
    said: list[str] = []

    def keep(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    saver = alone(tmp_path, say=said.append, keep=keep)
    saver.prepare(tensor(), 1.0)
    saver.save(1, tensor(), {})
    saver.finish()
    assert "saved" in said[0] and "old checkpoints were not removed" in said[1]
