"""Saving, loading and keeping checkpoints.

A save is written into ``step_N.partial-UUID/`` and becomes ``step_N/`` by a rename once every rank has reported
that its files are durable, so a directory called ``step_N`` is whole or was damaged later. A step that exists
already (a resumed run that reaches it again) is replaced: the old directory steps aside as ``step_N.old-UUID``, the
new one takes the name, the old one is removed. A crash between the two renames leaves the old one under its aside
name, where `newest_valid` still finds it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megapre.checkpoint.format import (
    CHUNK,
    Manifest,
    Piece,
    Root,
    check_plain,
    sync_directory,
    write_rank,
    write_root,
)
from megapre.checkpoint.read import Shard, read_manifest, read_root
from megapre.checkpoint.reshard import CheckpointError, boxes, check_data, copy_overlap, overlap, tiling_fault
from megapre.parallel.placement import Address

_NAME = re.compile(r"step_([0-9]{1,18})(?:\.(partial|old)-.+)?")
_SLICE = 4 * CHUNK
"""Bytes of one piece held in memory while loading."""


class Sync(Protocol):
    """What saving needs from the ranks' communication."""

    def barrier(self) -> None:
        """Return when every rank has called."""

    def broadcast_text(self, text: str | None) -> str:
        """Rank 0's text, on every rank."""

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in the order of the ranks, on every rank."""


class SingleProcess:
    """The Sync of a world of one."""

    def barrier(self) -> None:
        """Return at once."""

    def broadcast_text(self, text: str | None) -> str:
        """Give the text back."""
        assert text is not None
        return text

    def gather_text(self, text: str) -> list[str]:
        """Give the text back as the only one."""
        return [text]


# ---------------------------------------------------------------------------------------------- saving


def step_name(step: int) -> str:
    """Directory of a step; names are read back as integers, so more digits are no trouble."""
    return f"step_{step:07d}"


@dataclass(frozen=True)
class Ticket:
    """One save that the ranks have agreed on."""

    uuid: str
    step: int
    rank: int
    world: int
    root: Path
    fault: str
    """Why this rank cannot take part; empty when it can."""

    @property
    def partial(self) -> Path:
        """Where the ranks write."""
        return self.root / f"{step_name(self.step)}.partial-{self.uuid}"

    @property
    def final(self) -> Path:
        """What it becomes."""
        return self.root / step_name(self.step)

    @property
    def place(self) -> dict[str, Any]:
        """What `format.lay_out` wants to know."""
        return {"uuid": self.uuid, "step": self.step, "rank": self.rank, "world": self.world}

    def open(self) -> None:
        """Make the directory; called by every rank. Raises CheckpointError when this rank cannot take part."""
        if self.fault:
            raise CheckpointError(self.fault)
        self.partial.mkdir(parents=True, exist_ok=True)

    def commit(self, digests: Sequence[str], state: dict[str, Any]) -> None:
        """Make the checkpoint valid; called by rank 0 when the files of all ranks are durable."""
        root = Root(self.uuid, self.step, self.world, state, tuple(digests))
        _refuse_holes(self.partial, root)
        write_root(self.partial, root)
        _take_place(self.partial, self.final)

    def withdraw(self) -> None:
        """Rank 0 removes what a failed save left; what cannot be removed stays partial, and `prune` removes it."""
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)


def agree(root: Path, step: int, rank: int, world: int, sync: Sync) -> Ticket:
    """Begin a save, called by all ranks together: one name, and every rank at the same step."""
    label = sync.broadcast_text(f"{uuid.uuid4().hex} {step} {world}" if rank == 0 else None)
    save_id, *first = label.split()
    fault = ""
    if first != [str(step), str(world)]:
        fault = f"step {step} of {world} ranks is not step {first[0]} of {first[1]} ranks of rank 0"
    elif not 0 <= step < 10**18 or not 0 <= rank < world:
        fault = f"step {step}, rank {rank} of {world} is out of range"
    return Ticket(save_id, step, rank, world, Path(root), fault)


def save(
    root: Path,
    step: int,
    pieces: Iterable[tuple[Address, Tensor]],
    state: dict[str, Any],
    *,
    rank: int,
    world: int,
    sync: Sync,
) -> Path:
    """Write a checkpoint, called by all ranks together; returns its directory once it is durable.

    ``pieces`` are this rank's (address, 1-D tensor) pairs; those of all ranks must tile every logical tensor exactly
    once. ``state`` is plain JSON, and rank 0's is the one kept. An existing checkpoint of the same step is replaced.
    Raises the same CheckpointError on every rank when any of them fails; earlier checkpoints are then untouched.
    """
    ticket = agree(root, step, rank, world, sync)

    def write() -> str:
        check_plain(state, "state")
        ticket.open()
        return write_rank(ticket.partial, list(pieces), **ticket.place)

    def commit() -> str:
        if rank == 0:
            ticket.commit(digests, state)
        return ""

    try:
        digests = together(write, sync)
        together(commit, sync)
    except CheckpointError:
        ticket.withdraw()
        raise
    return ticket.final


def together(action: Callable[[], str], sync: Sync) -> list[str]:
    """Run an action on every rank; all get all results, or all raise the error of the lowest rank that failed.

    Nobody waits for a rank that has failed: its sentence arrives in place of its result.
    """
    result, sentence = "", ""
    cause: Exception | None = None
    try:
        result = action()
    except OSError as error:
        cause, sentence = error, f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except Exception as error:
        # Whatever it is, the other ranks wait in gather_text and must hear of it.
        cause, sentence = error, str(error) or type(error).__name__
    replies = [json.loads(text) for text in sync.gather_text(json.dumps([result, sentence]))]
    failed = [number for number, (_, told) in enumerate(replies) if told]
    if failed:
        others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise CheckpointError(
            f"the checkpoint was not saved because rank {failed[0]}{others} failed: {replies[failed[0]][1]}"
        ) from cause
    return [done for done, _ in replies]


def _refuse_holes(directory: Path, root: Root) -> None:
    """Raise CheckpointError unless what the ranks wrote is visible here and tiles every tensor."""
    manifests = [read_manifest(directory, rank, root) for rank in range(root.world)]
    for manifest in manifests:
        Shard(directory, manifest).close()
    index = _index(directory, manifests)
    for name in index:
        fault = _tiling(index, name)
        if fault:
            raise CheckpointError(fault)


def _take_place(partial: Path, final: Path) -> None:
    """Give the finished directory its name; one that already has it is replaced."""
    aside = final.with_name(f"{final.name}.old-{uuid.uuid4().hex}")
    replaced = final.exists()
    if replaced:
        os.rename(final, aside)
    try:
        os.rename(partial, final)
    except OSError:
        if replaced:
            os.rename(aside, final)
        raise
    sync_directory(final.parent)
    if replaced:
        # The save has succeeded; what is left of the old one is for `prune`.
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- loading

Index = dict[str, list[tuple[int, Piece]]]
"""Every logical tensor's pieces, each with the rank whose shard holds it."""


def _index(path: Path, manifests: Iterable[Manifest]) -> Index:
    index: Index = {}
    for manifest in manifests:
        for piece in manifest.pieces:
            index.setdefault(piece.address.name, []).append((manifest.rank, piece))
    for name, held in index.items():
        for rank, piece in held:
            first = held[0][1]
            if (piece.address.shape, piece.dtype) != (first.address.shape, first.dtype):
                raise CheckpointError(
                    f"{path}: {name!r} is {piece.dtype} of shape {piece.address.shape} on rank {rank} "
                    f"and {first.dtype} of shape {first.address.shape} on rank {held[0][0]}"
                )
    return index


def _tiling(index: Index, name: str) -> str | None:
    parts = [box for _, piece in index[name] for box in boxes(piece.address)]
    shape = index[name][0][1].address.shape
    fault = tiling_fault(shape, parts)
    return fault and f"{name!r} of shape {shape} is not held exactly once: {fault}"


def _open(path: Path) -> tuple[list[Manifest], Index]:
    path = Path(path)
    root = read_root(path)
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != root.step:
        raise CheckpointError(f"{path} holds step {root.step}")
    manifests = [read_manifest(path, rank, root) for rank in range(root.world)]
    return manifests, _index(path, manifests)


def read_state(path: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint. Raises CheckpointError when its root is damaged."""
    return read_root(Path(path)).state


def names(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of every logical tensor. Raises CheckpointError when root or manifests are damaged."""
    _, index = _open(path)
    return {name: (held[0][1].address.shape, held[0][1].dtype) for name, held in index.items()}


def load(path: Path, wants: Iterable[tuple[Address, Tensor]]) -> None:
    """Fill every wanted 1-D tensor from a checkpoint of any layout; each rank calls it for itself.

    Reads only the chunks that hold wanted elements, each once and verified before use, 64 MiB of a piece at a time.
    Nothing is cast. Raises CheckpointError on an unknown name, another shape or dtype, an element that is not held
    exactly once, or damage (some wanted tensors may have been filled by then).
    """
    path, wanted = Path(path), list(wants)
    manifests, index = _open(path)
    by_name: dict[str, list[int]] = {}
    for number, (address, data) in enumerate(wanted):
        _refuse_want(path, index, address, data)
        by_name.setdefault(address.name, []).append(number)
    for name in by_name:
        fault = _tiling(index, name)
        if fault:
            raise CheckpointError(f"{path}: {fault}")
    filled = [0] * len(wanted)
    # One buffer for all pieces: its pages are touched only as far as the largest slice reaches.
    scratch = torch.empty(_SLICE, dtype=torch.uint8)
    for manifest in manifests:
        plan = []
        for piece in sorted(manifest.pieces, key=lambda p: p.begin):
            numbers = [n for n in by_name.get(piece.address.name, ()) if overlap(piece.address, wanted[n][0])]
            if numbers:
                plan.append((piece, numbers))
        if plan:
            with Shard(path, manifest) as shard:
                for piece, numbers in plan:
                    _pour(shard, piece, [(n, *wanted[n]) for n in numbers], filled, scratch)
    for (address, _), count in zip(wanted, filled):
        assert count == address.end - address.start, f"{address} was filled with {count} elements"


def whole(path: Path, name: str) -> Tensor:
    """A logical tensor in full, in its own number format. Raises CheckpointError as `load` does."""
    shape, dtype = names(path).get(name, ((), torch.float32))
    flat = torch.empty(prod(shape), dtype=dtype)
    load(path, [(Address(name, shape, (0,) * len(shape), shape, 0, flat.numel()), flat)])
    return flat.view(shape)


def _refuse_want(path: Path, index: Index, address: Address, data: Tensor) -> None:
    if address.name not in index:
        raise CheckpointError(f"{path} holds no {address.name!r}")
    check_data(address, data)
    _, piece = index[address.name][0]
    if (address.shape, data.dtype) != (piece.address.shape, piece.dtype):
        raise CheckpointError(
            f"{path}: {address.name!r} is {piece.dtype} of shape {piece.address.shape} in the checkpoint "
            f"and {data.dtype} of shape {address.shape} in this run"
        )


def _pour(
    shard: Shard, piece: Piece, wants: list[tuple[int, Address, Tensor]], filled: list[int], scratch: Tensor
) -> None:
    """Copy one piece into all that want some of it, a slice at a time: a slice of a piece is a piece."""
    whole, width = piece.address, piece.dtype.itemsize
    stride = _SLICE // width
    for first in range(whole.start, whole.end, stride):
        part = Address(whole.name, whole.shape, whole.offset, whole.size, first, min(first + stride, whole.end))
        touched = wants if part == whole else [want for want in wants if overlap(part, want[1])]
        if not touched:
            continue
        raw = scratch[: (part.end - part.start) * width]
        shard.read_into(piece.begin + (first - whole.start) * width, raw.numpy().data)
        for n, address, data in touched:
            filled[n] += copy_overlap(part, raw.view(piece.dtype), address, data)


# ---------------------------------------------------------------------------------------------- keeping


@dataclass(frozen=True)
class Entry:
    """One checkpoint directory of a run."""

    step: int
    path: Path
    problem: str | None
    """What a quick look (root, manifests, file sizes) finds wrong; None when it looks valid."""
    finished: bool
    """Whether the save reached its end: False for ``.partial-`` directories."""


def list_checkpoints(root: Path) -> list[Entry]:
    """Every checkpoint directory under ``root`` by rising step, unfinished ones first; empty without a directory."""
    root, found = Path(root), []
    for path in root.iterdir() if root.is_dir() else ():
        named = _NAME.fullmatch(path.name)
        if named and path.is_dir():
            # Of one step, the last in order is preferred: the finished one, then the one it was replacing.
            rank = {"partial": 0, "old": 1, None: 2}[named[2]]
            found.append((int(named[1]), rank, path.name, path))
    return [
        Entry(step, path, _look(path) if rank else f"{path} was never finished", rank > 0)
        for step, rank, _, path in sorted(found)
    ]


def _look(path: Path) -> str | None:
    try:
        for manifest in _open(path)[0]:
            Shard(path, manifest).close()
    except CheckpointError as error:
        return str(error)
    return None


def check(path: Path) -> list[str]:
    """Verify everything about a checkpoint; one sentence per problem, naming the file and the tensors it hurts.

    Root and manifest digests, file sizes, the checksum of every chunk, and that the pieces tile every logical tensor.
    """
    path, problems = Path(path), []
    try:
        root = read_root(path)
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != root.step:
            problems.append(f"{path} holds step {root.step}")
    except CheckpointError as error:
        return [str(error)]
    manifests = []
    for rank in range(root.world):
        try:
            manifests.append(read_manifest(path, rank, root))
        except CheckpointError as error:
            problems.append(str(error))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda manifest: _damage(path, manifest), manifests):
            problems += found
    if len(manifests) == root.world:
        try:
            index = _index(path, manifests)
            problems += [f"{path}: {fault}" for fault in (_tiling(index, name) for name in index) if fault]
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _damage(path: Path, manifest: Manifest) -> list[str]:
    """What is wrong with one shard, every chunk of it."""
    problems = []
    try:
        with Shard(path, manifest) as shard:
            for number in range(len(manifest.crc32)):
                try:
                    shard.chunk(number)
                except CheckpointError as error:
                    problems.append(str(error))
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def newest_valid(root: Path, *, log: Callable[[str], None], at_most: int | None = None) -> Path | None:
    """The newest checkpoint that passes `check` in full, None when there is none; one logged line per one passed over.

    With ``at_most``, of those of that step or before.

    Reads every byte of the candidates, so one rank calls it and tells the others.
    """
    for entry in reversed(list_checkpoints(root)):
        if at_most is not None and entry.step > at_most:
            continue
        problems = [entry.problem] if entry.problem else check(entry.path)
        if not problems:
            return entry.path
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        log(f"checkpoint {entry.path.name} passed over: {problems[0]}{more}")
    return None


def prune(root: Path, keep_last: int, keep_every: int, *, saved: Path | None = None) -> list[Path]:
    """Remove old checkpoints and leftovers; returns what was removed.

    Called by one rank after a save, while no save runs, since unfinished directories go too. Keeps the newest
    ``keep_last`` that look valid and those whose step is a multiple of ``keep_every`` (0: none). Before a finished
    one is removed, one of those kept is verified in full, newest first, and when none passes none is removed;
    ``saved``, a checkpoint this job has just written, is taken at its word. Damaged ones newer than the oldest of the
    last ``keep_last`` stay as evidence. Raises ValueError when ``keep_last`` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"checkpoint.keep_last is {keep_last}, and at least 1 checkpoint is kept")
    entries = list_checkpoints(root)
    good = {e.step: e for e in entries if e.problem is None}
    last = sorted(good)[-keep_last:]
    kept = {step for step in good if step in last or (keep_every and step % keep_every == 0)}
    doomed = [e.path for e in entries if not e.finished]
    doomed += [e.path for e in entries if ".old-" in e.path.name and e.step in good and e.path != good[e.step].path]
    if last:
        doomed += [e.path for e in entries if e.finished and e.step not in kept and e.step < last[0]]
    finished = {e.path for e in entries if e.finished}
    trusted = (good[step].path for step in sorted(kept, reverse=True))
    safe = finished.isdisjoint(doomed) or any(path == saved or not check(path) for path in trusted)
    removed = [path for path in doomed if safe or path not in finished]
    for path in removed:
        _remove(path, path in finished)
    return removed


def remove_after(root: Path, step: int) -> None:
    """Remove the finished checkpoints of later steps: a run that goes back to ``step`` must not resume from them."""
    for entry in list_checkpoints(root):
        if entry.finished and entry.step > step:
            _remove(entry.path, True)


def _remove(path: Path, finished: bool) -> None:
    """Remove a directory; a crash on the way leaves one that is called unfinished."""
    if finished:
        step = path.name.split(".")[0]
        gone = path.with_name(f"{step}.partial-{uuid.uuid4().hex}")
        os.rename(path, gone)
        path = gone
    shutil.rmtree(path)
