"""Saving by many ranks, loading into any layout, and keeping checkpoints."""

import ast
import errno
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import megapre.checkpoint
from megapre.checkpoint import format as disk
from megapre.checkpoint import store
from megapre.checkpoint.reshard import CheckpointError
from megapre.checkpoint.store import (
    SingleProcess,
    check,
    list_checkpoints,
    load,
    names,
    newest_valid,
    prune,
    read_state,
    save,
)
from megapre.parallel.placement import Address

KINDS = ("row", "column", "flat", "replicas", "zero_in_column")


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks and slices per piece, with edges that fall inside elements' rows."""
    monkeypatch.setattr(disk, "CHUNK", 104)
    monkeypatch.setattr(store, "_SLICE", 72)


def silent(line: str) -> None:
    raise AssertionError(line)


def alone(root: Path, step: int, pieces: list, state: dict | None = None) -> Path:
    return save(root, step, pieces, state or {}, rank=0, world=1, sync=SingleProcess())


def plain(name: str, data: torch.Tensor) -> tuple[Address, torch.Tensor]:
    shape = (len(data),)
    return Address(name, shape, (0,), shape, 0, len(data)), data


@pytest.mark.parametrize("have,want", list(itertools.product(KINDS, KINDS)))
def test_any_layout_loads_any_other(tmp_path, kit, small_chunks, have, want):
    path = kit.save(tmp_path, 120, have, world=4)
    assert path == tmp_path / "step_0000120"
    assert check(path) == []
    for rank in kit.layout(want, 3):
        targets = kit.blank(rank)
        load(path, targets)
        kit.assert_equal(targets)


def test_one_call_fills_many_targets_of_one_tensor(tmp_path, kit, small_chunks):
    path = kit.save(tmp_path, 1, "column", world=4)
    targets = [piece for kind in ("row", "flat") for rank in kit.layout(kind, 5) for piece in kit.blank(rank)]
    load(path, targets)
    kit.assert_equal(targets)


@pytest.mark.parametrize("world", [11, 13])
def test_more_than_ten_writers(tmp_path, kit, world):
    path = kit.save(tmp_path, 7, "flat", world)
    targets = kit.blank(kit.whole())
    load(path, targets)
    kit.assert_equal(targets)
    assert len(list(path.iterdir())) == 2 * world + 1
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_state_and_names_come_back(tmp_path, kit):
    state = {"consumed": 2**60, "lr": 0.1 + 0.2, "skipped": [1, 2], "nested": {"a": None, "b": True, "c": "né"}}
    path = kit.save(tmp_path, 3, state=state)
    assert read_state(path) == state
    assert names(path) == {
        name: (tuple(full.shape), full.dtype) for name, full in kit.full.items()
    }


def test_other_tools_open_the_shards(tmp_path, kit):
    path = kit.save(tmp_path, 3, "flat", world=2)
    for rank in range(2):
        manifest = store.read_manifest(path, rank, store.read_root(path)).pieces
        with safe_open(path / f"rank_{rank:05d}.safetensors", "pt") as file:
            assert set(file.keys()) == {piece.key for piece in manifest}
            assert all(piece.begin % piece.dtype.itemsize == 0 for piece in manifest), "aligned for readers that map"
            kit.assert_equal([(piece.address, file.get_tensor(piece.key)) for piece in manifest])


def test_views_of_one_buffer_and_repeated_names(tmp_path):
    buffer = torch.arange(12.0)
    pieces = [(Address("x", (12,), (0,), (12,), i, i + 3), buffer[i : i + 3]) for i in range(0, 12, 3)]
    pieces.append(plain("x#1", torch.ones(2)))
    target = torch.zeros(12)
    load(alone(tmp_path, 1, pieces), [(Address("x", (12,), (0,), (12,), 0, 12), target)])
    assert torch.equal(target, buffer)


def test_each_save_holds_its_own_moment(tmp_path):
    weight = torch.zeros(5)
    paths = []
    for step in (1, 2, 3):
        weight += 1
        paths.append(alone(tmp_path, step, [plain("w", weight)]))
        weight += 100
    for number, path in enumerate(paths):
        target = torch.empty(5)
        load(path, [plain("w", target)])
        assert target.tolist() == [101 * number + 1] * 5


def test_strict_loading(tmp_path, kit):
    path = alone(tmp_path, 1, [plain("w", torch.arange(6.0))])
    with pytest.raises(CheckpointError, match=r"holds no 'v'"):
        load(path, [plain("v", torch.zeros(6))])
    with pytest.raises(CheckpointError, match=r"'w' is torch.float32 .* and torch.bfloat16"):
        load(path, [plain("w", torch.zeros(6, dtype=torch.bfloat16))])
    with pytest.raises(CheckpointError, match=r"shape \(6,\) .*shape \(7,\)"):
        load(path, [plain("w", torch.zeros(7))])
    with pytest.raises(CheckpointError, match="leaves the tensor"):
        load(path, [(Address("w", (6,), (3,), (4,), 0, 4), torch.zeros(4))])
    with pytest.raises(CheckpointError, match=r"step_0000009/checkpoint.json cannot be read: No such file"):
        load(tmp_path / "step_0000009", [])


def test_a_parameter_that_requires_grad_is_filled(tmp_path):
    path = alone(tmp_path, 1, [plain("w", torch.arange(6.0, requires_grad=True))])
    target = torch.zeros(6, requires_grad=True)
    load(path, [plain("w", target)])
    assert target.tolist() == list(range(6))


def test_holes_and_overlaps_are_refused_at_save_and_at_load(tmp_path, monkeypatch):
    def part(start: int, end: int) -> tuple[Address, torch.Tensor]:
        return Address("w", (6,), (0,), (6,), start, end), torch.ones(end - start)

    with pytest.raises(CheckpointError, match=r"'w' .*element \[4\] is held by no piece"):
        alone(tmp_path, 1, [part(0, 4)])
    with pytest.raises(CheckpointError, match=r"'w' .*element \[3\] is held by 2 pieces"):
        alone(tmp_path, 1, [part(0, 4), part(3, 6)])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(store, "_refuse_holes", lambda *_: None)
    path = alone(tmp_path, 1, [part(0, 4)])
    with pytest.raises(CheckpointError, match=r"'w' .*element \[4\] is held by no piece"):
        load(path, [part(0, 2)])
    assert "'w'" in check(path)[0]


def test_ranks_that_disagree_on_a_tensor_are_refused(tmp_path, by_threads):
    half = Address("w", (4,), (0,), (4,), 0, 2), Address("w", (4,), (0,), (4,), 2, 4)
    outcomes = by_threads(tmp_path, 1, [[(half[0], torch.ones(2))], [(half[1], torch.ones(2).double())]], {})
    assert all("'w' is torch.float64" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(
    "state,told",
    [({"a": (1, 2)}, "state.a is a tuple"), ({"a": {3: 4}}, "state.a has the key 3"), ({"t": torch.ones(1)}, "Tensor")],
)
def test_state_that_json_would_change_is_refused(tmp_path, state, told):
    with pytest.raises(CheckpointError, match=told):
        alone(tmp_path, 1, [plain("w", torch.ones(1))], state)


def test_pieces_that_do_not_fit_are_refused(tmp_path):
    address, _ = plain("w", torch.ones(3))
    with pytest.raises(CheckpointError, match=r"addresses 3 elements and its tensor has shape \(4,\)"):
        alone(tmp_path, 1, [(address, torch.ones(4))])
    with pytest.raises(CheckpointError, match=r"torch.complex64"):
        alone(tmp_path, 1, [plain("w", torch.ones(3, dtype=torch.complex64))])


def test_directories_that_cannot_be_synced_are_no_error(tmp_path, monkeypatch):
    def fsync(code: int):
        def refuse(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, os.strerror(code))

        return refuse

    monkeypatch.setattr(os, "fsync", fsync(errno.EINVAL))
    assert check(alone(tmp_path, 1, [plain("w", torch.ones(1))])) == []
    monkeypatch.setattr(os, "fsync", fsync(errno.EIO))
    with pytest.raises(CheckpointError, match="Input/output error"):
        alone(tmp_path, 2, [plain("w", torch.ones(1))])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("culprit", [0, 2])
def test_one_rank_that_cannot_write_stops_all(tmp_path, kit, by_threads, monkeypatch, code, culprit):
    old = kit.save(tmp_path, 1)
    real, mine = os.fsync, f"rank_{culprit:05d}"

    def fsync(descriptor: int) -> None:
        if mine in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    outcomes = by_threads(tmp_path, 2, [kit.pieces(a) for a in kit.layout("row", 4)], {})
    told = {str(outcome) for outcome in outcomes}
    assert told == {f"the checkpoint was not saved because rank {culprit} failed: {os.strerror(code)}"}
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == [old]
    assert newest_valid(tmp_path, log=silent) == old


def test_a_read_only_run_directory_is_one_sentence(tmp_path, kit, by_threads, monkeypatch):
    def mkdir(path: str, mode: int = 0o777) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    outcomes = by_threads(tmp_path, 2, [kit.pieces(a) for a in kit.layout("row", 2)], {})
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "rank 0 (and 1 more ranks) failed: Read-only file system" in str(outcomes[0])


def test_ranks_at_different_steps_are_refused(tmp_path):
    class RankOne(SingleProcess):
        def broadcast_text(self, text):
            return "abc 4 2"

        def gather_text(self, text):
            return ['["", ""]', text]

    with pytest.raises(CheckpointError, match="rank 1 failed: step 5 of 2 ranks is not step 4 of 2 ranks"):
        save(tmp_path, 5, [], {}, rank=1, world=2, sync=RankOne())


def test_a_step_that_exists_is_replaced(tmp_path, kit):
    kit.save(tmp_path, 5, state={"try": 1})
    kit.full["seen"] += 1
    path = kit.save(tmp_path, 5, world=2, state={"try": 2})
    assert list(tmp_path.iterdir()) == [path]
    targets = kit.blank(kit.whole())
    load(path, targets)
    kit.assert_equal(targets)
    assert read_state(path) == {"try": 2} and check(path) == []


def test_steps_are_ordered_as_integers(tmp_path):
    steps = [9, 10, 100, 9_999_999, 10_000_000, 20_000_000]
    for step in reversed(steps):
        alone(tmp_path, step, [plain("w", torch.ones(1))])
    os.rename(tmp_path / "step_0000009", tmp_path / "step_9")
    assert [entry.step for entry in list_checkpoints(tmp_path)] == steps
    assert newest_valid(tmp_path, log=silent) == tmp_path / "step_20000000"


def test_no_checkpoints_yet(tmp_path):
    assert list_checkpoints(tmp_path / "none") == [] and newest_valid(tmp_path / "none", log=silent) is None


def test_a_renamed_step_is_refused(tmp_path):
    path = alone(tmp_path, 5, [plain("w", torch.ones(1))])
    moved = path.rename(tmp_path / "step_0000006")
    assert check(moved) == [f"{moved} holds step 5"]
    kept = moved.rename(tmp_path / "best")
    target = torch.zeros(1)
    load(kept, [plain("w", target)])
    assert target.item() == 1


def steps_left(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_prune_keeps_the_last_and_the_multiples(tmp_path):
    for step in (10, 20, 30, 40, 50, 60):
        alone(tmp_path, step, [plain("w", torch.ones(1))])
    (tmp_path / "step_0000070.partial-dead").mkdir()
    (tmp_path / "notes").mkdir()
    removed = prune(tmp_path, 2, 30)
    assert steps_left(tmp_path) == ["notes", "step_0000030", "step_0000050", "step_0000060"]
    assert len(removed) == 4
    assert prune(tmp_path, 2, 30) == []
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last is 0"):
        prune(tmp_path, 0, 0)


def test_prune_never_removes_the_newest_valid_one(tmp_path):
    paths = {step: alone(tmp_path, step, [plain("w", torch.ones(9))]) for step in (10, 20, 30)}

    def flip(step: int) -> None:
        file = paths[step] / "rank_00000.safetensors"
        text = bytearray(file.read_bytes())
        text[-1] ^= 1
        file.write_bytes(text)

    flip(30)
    assert prune(tmp_path, 1, 0) == [], "the only one kept is damaged inside"
    assert prune(tmp_path, 2, 0) == [paths[10]]
    (paths[30] / "checkpoint.json").unlink()
    assert prune(tmp_path, 1, 0) == [], "a checkpoint that looks damaged does not count as the last"
    assert newest_valid(tmp_path, log=lambda line: None) == paths[20]
    new = alone(tmp_path, 40, [plain("w", torch.ones(9))])
    assert prune(tmp_path, 1, 0, saved=new) == [paths[20], paths[30]]


def test_nothing_is_unpickled(tmp_path, kit):
    seen: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, _: seen.append(event) if watching[0] and event.startswith("pickle") else None)
    path = kit.save(tmp_path, 1)
    load(path, kit.blank(kit.whole()))
    check(path)
    watching[0] = False
    assert seen == []
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for file in Path(megapre.checkpoint.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not roots & banned, file
            assert not (
                isinstance(node, ast.Attribute)
                and node.attr in ("load", "save")
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ), file
