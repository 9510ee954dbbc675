"""Crashes at every operation of a save, and damage of every kind to what was saved."""

import builtins
import copy
import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from megapre.checkpoint import format as disk
from megapre.checkpoint import store
from megapre.checkpoint.reshard import CheckpointError
from megapre.checkpoint.store import (
    SingleProcess,
    check,
    list_checkpoints,
    load,
    newest_valid,
    prune,
    read_state,
    save,
)


class Killed(BaseException):
    """The process ends here; not an Exception, so no handler runs."""


class Disk:
    """Counts operations that reach the operating system and dies, or fails, at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, error: BaseException | None = None) -> None:
        self.count, self.at, self.error = 0, at, error or Killed()
        self.events: list[tuple[str, str]] = []
        for name in ("fsync", "rename", "mkdir", "open", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))
        monkeypatch.setattr(disk, "open", self._open, raising=False)

    def tick(self, name: str, target: object) -> None:
        self.count += 1
        where = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        self.events.append((name, where))
        if self.count == self.at:
            raise self.error

    def _counted(self, name, real):
        def call(target, *rest, **named):
            self.tick(name, target)
            return real(target, *rest, **named)

        return call

    def _open(self, path, mode):
        self.tick("create", path)
        file = builtins.open(path, mode, buffering=0)
        real, machine = file, self

        class Torn:
            """A write that dies leaves half its bytes."""

            def write(self, data):
                machine.count += 1
                machine.events.append(("write", str(path)))
                if machine.count == machine.at:
                    real.write(data[: len(data) // 2])
                    raise machine.error
                real.write(data)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                real.close()

            def flush(self):
                real.flush()

            def fileno(self):
                return real.fileno()

        return Torn()


def save_alone(root: Path, step: int, pieces: list) -> Path:
    return save(root, step, pieces, {"at": step}, rank=0, world=1, sync=SingleProcess())


@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step again"])
@pytest.mark.parametrize("death", ["kill", "error"])
def test_a_save_that_ends_anywhere_leaves_the_old_or_the_new(tmp_path, kit, monkeypatch, step, death):
    every_end(tmp_path, kit, monkeypatch, step, death)


def every_end(tmp_path, kit, monkeypatch, step, death) -> int:
    """End a synchronous save at each of its operations; how many there are."""
    old = kit.blank(kit.whole())
    new = kit.pieces(kit.whole())
    save_alone(tmp_path / "pristine", 1, old)
    monkeypatch.setattr(disk, "CHUNK", 256)
    outcomes = {"old": 0, "new": 0}
    at = 0
    while True:
        at += 1
        root = tmp_path / f"run{at}"
        shutil.copytree(tmp_path / "pristine", root)
        with monkeypatch.context() as patch:
            machine = Disk(patch, at, OSError(errno.ENOSPC, "No space left on device") if death == "error" else None)
            try:
                save_alone(root, step, new)
                failed = False
            except (Killed, CheckpointError) as error:
                failed = True
                assert death == "kill" or str(error).count("No space left on device") == 1
        log: list[str] = []
        found = newest_valid(root, log=log.append)
        assert found is not None, (at, machine.events)
        targets = kit.blank(kit.whole())
        load(found, targets)
        expected = [data for _, data in (old if _is_old(targets, old) else new)]
        assert all(torch.equal(t.view(torch.uint8), e.view(torch.uint8)) for (_, t), e in zip(targets, expected)), at
        outcomes["old" if expected[0] is old[0][1] else "new"] += 1
        if failed and death == "error" and machine.events[at - 1][0] == "rename":
            assert [p.name for p in root.iterdir()] == ["step_0000001"], "a failed rename is undone"
        if not failed:
            assert expected[0] is new[0][1], at
        if machine.count < at:
            break
        # The run goes on: the same step is saved again, and nothing is left behind.
        path = save_alone(root, step, new)
        prune(root, 1, 0, saved=path)
        assert [p.name for p in root.iterdir()] == [path.name], at
        assert check(path) == []
        shutil.rmtree(root)
    assert at > 15 and outcomes["old"] > 10 and outcomes["new"] >= 1, (at, outcomes)
    return at


def _is_old(targets, old) -> bool:
    return torch.equal(targets[0][1].view(torch.uint8), old[0][1].view(torch.uint8))


def test_everything_is_durable_before_the_rename(tmp_path, kit, monkeypatch):
    with monkeypatch.context() as patch:
        machine = Disk(patch, None)
        path = save_alone(tmp_path, 1, kit.pieces(kit.whole()))
    events = machine.events
    rename = next(n for n, (name, _) in enumerate(events) if name == "rename")
    last = {event: n for n, event in enumerate(events[:rename])}
    partial = events[rename][1]
    files = [file for name, file in last if name == "create"]
    assert sorted(Path(file).name for file in files) == sorted(p.name for p in path.iterdir())
    for file in files:
        assert last["write", file] < last["fsync", file] < last["fsync", partial], file
    root = str(Path(partial) / "checkpoint.json")
    assert all(last["fsync", file] < last["create", root] for file in files if file != root)
    listed = [n for n, event in enumerate(events) if event == ("fsync", partial)]
    assert listed[0] < last["create", root], "each rank makes its own names durable"
    assert ("fsync", str(tmp_path)) in events[rename:]


@pytest.fixture
def two(tmp_path, kit, monkeypatch):
    """Checkpoints at steps 10 and 20, each by three ranks and of many chunks."""
    monkeypatch.setattr(disk, "CHUNK", 128)
    monkeypatch.setattr(store, "_SLICE", 96)
    first = kit.save(tmp_path, 10, "flat")
    return first, kit.save(tmp_path, 20, "flat")


def test_every_flip_and_truncation_is_noticed(two, kit, seed):
    damage(two, kit, random.Random(seed), 250)


def damage(two, kit, rng: random.Random, trials: int) -> None:
    """Flip a bit in, or cut, a file of the newer of two checkpoints: named, and the older one is used."""
    first, second = two
    files = sorted(second.iterdir())
    for trial in range(trials):
        file = rng.choice(files)
        whole = file.read_bytes()
        text, place = bytearray(whole), rng.randrange(len(whole))
        if trial % 3:
            text[place] ^= 1 << rng.randrange(8)
        else:
            del text[place:]
        file.write_bytes(text)
        problems = check(second)
        assert problems and str(file) in problems[0], (file, place, problems)
        log: list[str] = []
        assert newest_valid(second.parent, log=log.append) == first
        assert len(log) == 1 and str(file) in log[0] and "\n" not in log[0]
        targets = kit.blank(kit.whole())
        try:
            load(second, targets)
        except CheckpointError as error:
            assert str(file) in str(error)
        else:
            assert file.suffix == ".safetensors" and trial % 3, "only a header's flip may go unread"
            kit.assert_equal(targets)
        file.write_bytes(whole)
    assert check(second) == []


def test_a_quick_look_sees_sizes(two):
    _, second = two
    file = second / "rank_00001.safetensors"
    whole = file.read_bytes()
    for text in (whole + b"x", whole[:-1], b""):
        file.write_bytes(text)
        told = f"{file} has {len(text)} bytes and its manifest says {len(whole)}"
        assert list_checkpoints(second.parent)[-1].problem == told
        assert told in check(second)


def test_the_damaged_tensor_is_named(two):
    _, second = two
    root = store.read_root(second)
    for piece in store.read_manifest(second, 1, root).pieces:
        if piece.end > piece.begin:
            file = second / "rank_00001.safetensors"
            whole = bytearray(file.read_bytes())
            whole[piece.begin] ^= 4
            file.write_bytes(whole)
            assert piece.address.name in check(second)[0]
            whole[piece.begin] ^= 4
            file.write_bytes(whole)


def test_swapped_and_stale_files_are_refused(two, kit):
    exchange(two, kit)


def exchange(two, kit) -> None:
    """Swap, replace by another save's and remove files of the newer of two checkpoints."""
    first, second = two
    names = [f"rank_{rank:05d}.safetensors" for rank in range(3)]

    def refused(*culprits: str) -> list[str]:
        problems = check(second)
        assert problems and all(any(name in problem for problem in problems) for name in culprits), problems
        assert newest_valid(second.parent, log=lambda line: None) == first
        with pytest.raises(CheckpointError):
            load(second, kit.blank(kit.whole()))
        return problems

    shutil.copytree(second, second.parent / "backup")

    def restore() -> None:
        shutil.rmtree(second)
        shutil.copytree(second.parent / "backup", second)
        assert check(second) == []

    os.rename(second / names[0], second / "tmp")
    os.rename(second / names[1], second / names[0])
    os.rename(second / "tmp", second / names[1])
    refused(names[0], names[1])
    restore()
    kit.full = {name: kit.bits(tuple(full.shape), full.dtype) for name, full in kit.full.items()}
    stale = kit.save(second.parent / "other", 20, "replicas")
    shutil.copy(stale / names[2], second / names[2])
    refused(names[2])
    restore()
    kit.full = {name: kit.bits(tuple(full.shape), full.dtype) for name, full in kit.full.items()}
    for name in (names[2], "rank_00002.json"):
        shutil.copy(stale / name, second / name)
    assert "it was written by save" in refused("rank_00002.json")[0]
    restore()
    shutil.copy(first / "checkpoint.json", second / "checkpoint.json")
    refused("rank_00000.json")
    restore()
    for name in (names[1], "rank_00001.json", "checkpoint.json"):
        (second / name).unlink()
        refused(name)
        restore()


def test_a_manifest_of_another_save_is_refused_even_when_the_root_agrees(two):
    _, second = two
    resign(second, 1, json.dumps({**manifest(second, 1), "uuid": "0" * 32}).encode())
    assert "has uuid" in check(second)[0]
    resign(second, 1, json.dumps({**manifest(second, 1), "step": 10}).encode())
    assert check(second)


def test_all_bad_is_none_and_says_so(two):
    for path in two:
        (path / "checkpoint.json").write_text("{}")
    (two[0].parent / "step_0000030.partial-x").mkdir()
    log: list[str] = []
    assert newest_valid(two[0].parent, log=log.append) is None
    assert len(log) == 3 and "never finished" in log[0]
    assert [(e.step, e.problem is None) for e in list_checkpoints(two[0].parent)] == [
        (10, False),
        (20, False),
        (30, False),
    ]


# ------------------------------------------------------------------------------ crafted manifests


def manifest(path: Path, rank: int) -> dict:
    return json.loads((path / f"rank_{rank:05d}.json").read_bytes())


def resign(path: Path, rank: int, text: bytes) -> None:
    """Write a manifest and make the root agree with it."""
    (path / f"rank_{rank:05d}.json").write_bytes(text)
    body = json.loads((path / "checkpoint.json").read_bytes())["body"]
    body["manifests"][rank] = hashlib.sha256(text).hexdigest()
    (path / "checkpoint.json").write_bytes(disk.seal(body))


NASTY = [
    -1, 0, 1, 2**31, 2**62, 2**63, 10**30, 10**400, 1.5, 1e308, float("nan"), True, None, "", "F32", "C64", "../../etc",
    [], [1], [-1], [2**62], [2**40, 2**40], [1] * 40, ["a"], {}, {"a": 1}, [[]], "\ud800",
]  # fmt: skip


def mutate(rng: random.Random, tree: object) -> object:
    """A copy with one random node replaced, removed or repeated."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        child = node[key]
        if not (isinstance(child, dict | list) and child) or rng.random() < 0.2:
            break
        node = child
    action = rng.random()
    if action < 0.15:
        del node[key]
    elif action < 0.25 and isinstance(node, list):
        node.append(child)
    elif action < 0.45 and type(child) is int:
        node[key] = child + rng.choice((-8, -1, 1, 8, 1000))
    else:
        node[key] = rng.choice(NASTY)
    return tree


def unharmed(path: Path, kit) -> None:
    """Whatever the files say, only one sentence comes out."""
    problems = check(path)
    assert all("\n" not in problem and len(problem) < 600 for problem in problems), problems
    for entry in list_checkpoints(path.parent):
        assert entry.problem is None or "\n" not in entry.problem
    for action in (lambda: load(path, kit.blank(kit.whole())), lambda: store.names(path), lambda: read_state(path)):
        try:
            action()
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


def test_crafted_manifests_give_one_sentence(two, kit, seed):
    craft_manifests(two, kit, random.Random(seed), 200)


def craft_manifests(two, kit, rng: random.Random, trials: int) -> None:
    """Spoil fields of a manifest whose digests agree: only sentences come out, and most are refused."""
    _, second = two
    good = manifest(second, 1)
    refused = 0
    for _ in range(trials):
        bad = mutate(rng, good)
        if rng.random() < 0.3:
            bad = mutate(rng, bad)
        resign(second, 1, json.dumps(bad).encode())
        unharmed(second, kit)
        refused += bool(check(second))
    assert refused > 0.6 * trials
    for text in (b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'{"format": 1}'):
        resign(second, 1, text)
        assert check(second)
        unharmed(second, kit)


@pytest.mark.parametrize(
    "change,told",
    [
        ({"begin": 2**62}, "ends at byte"),
        ({"start": -1}, "'start' is -1, outside"),
        ({"start": True}, "'start' is true, not of type int"),
        ({"end": 2**62}, "flat range"),
        ({"shape": [2**62]}, "equal lengths"),
        ({"offset": [0, -1]}, "not integers in"),
        ({"size": [2**40, 2**40]}, "leaves the tensor"),
        ({"dtype": "C64"}, "dtype"),
        ({"name": 3}, "'name' is 3"),
    ],
)
def test_each_field_is_held_to_its_range(two, kit, change, told):
    _, second = two
    good = manifest(second, 1)
    number = next(n for n, piece in enumerate(good["pieces"]) if piece["name"] == "exp_avg/w")
    good["pieces"][number].update(change)
    resign(second, 1, json.dumps(good).encode())
    problems = check(second)
    assert len(problems) == 1 and told in problems[0] and f"rank_00001.json: piece {number}" in problems[0], problems
    unharmed(second, kit)


def test_crafted_roots_give_one_sentence(two, kit, seed):
    craft_roots(two, kit, random.Random(seed), 150)


def craft_roots(two, kit, rng: random.Random, trials: int) -> None:
    """Spoil fields of a root and seal it again: only sentences come out."""
    _, second = two
    file = second / "checkpoint.json"
    good = json.loads(file.read_bytes())["body"]
    for _ in range(trials):
        file.write_bytes(disk.seal(mutate(rng, good)))
        unharmed(second, kit)
    for text in (b"", b"{}", b"[" * 100_000, disk.seal([]), disk.seal({"format": 2})):  # type: ignore[arg-type]
        file.write_bytes(text)
        assert check(second)
        unharmed(second, kit)
