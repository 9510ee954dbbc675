"""Best-fit packing: rows of whole documents, planned offline into ``PREFIX.packL`` and the sidecar.

Best-fit decreasing (arXiv 2404.10830): documents, those above L tokens first cut into parts of L, go by falling length
into the row with the least room that still takes them. Rows stay inside one split, whose shares the plan is made for.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megapre.data.indexed import IndexedDataset
from megapre.data.order import split_documents
from megapre.data.sidecar import file_digest


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each item, int64; rows are numbered as they are opened. Lengths are 1 to ``capacity``."""
    rows = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # amounts of room that some open row has, ascending
    by_room: dict[int, list[int]] = {}
    opened = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            row, room, opened = opened, capacity, opened + 1
        rows[item] = row
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
    return rows


def items(dataset: IndexedDataset, low: int, high: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and length of the parts, at most ``capacity`` tokens each, of documents [low, high)."""
    bounds = dataset.documents[low : high + 1]
    sizes = np.diff(bounds)
    counts = -(-sizes // capacity)
    of = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = bounds[:-1][of] + within * capacity
    return starts, np.minimum(capacity, bounds[1:][of] - starts)


def plan(prefix: str, capacity: int, shares: Sequence[float]) -> dict[str, object]:
    """Pack a pair for rows of ``capacity`` tokens, write ``PREFIX.packL``, and record it in the sidecar."""
    dataset = IndexedDataset(prefix)
    if dataset.sidecar is None:
        raise ValueError(f"{prefix}.json is missing: inspect_data.py --validate writes one.")
    documents = split_documents(len(dataset), [*shares, 0.0, 0.0][:3])
    sizes, starts, lengths, rows = [np.zeros(1, np.int64)], [], [], []
    for low, high in documents:
        start, length = items(dataset, low, high, capacity)
        row = best_fit(length, capacity)
        order = np.lexsort((start, row))
        found = np.bincount(row) if len(row) else np.empty(0, np.int64)
        sizes.append(found.astype(np.int64))
        starts.append(start[order])
        lengths.append(length[order])
        rows.append(len(found))
    path, temporary = f"{prefix}.pack{capacity}", f"{prefix}.pack{capacity}.tmp-{os.getpid()}"
    with open(temporary, "wb") as file:
        for array in (np.cumsum(np.concatenate(sizes)), np.concatenate(starts), np.concatenate(lengths)):
            file.write(array.astype("<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    tokens = int(sum(length.sum() for length in lengths))
    record: dict[str, object] = {
        "documents": [list(pair) for pair in documents],
        "rows": rows,
        "items": int(sum(map(len, starts))),
        "fill": tokens / max(1, sum(rows) * capacity),
        "sha256": file_digest(path),
        "idx_digest": dataset.sidecar.idx_digest,
    }
    packs = {**(dataset.sidecar.packs or {}), str(capacity): record}
    replace(dataset.sidecar, packs=packs).write(prefix + ".json")
    return record


@dataclass(frozen=True)
class Packs:
    """The rows of one split of a plan."""

    first: int
    count: int
    offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def row(self, number: int) -> list[tuple[int, int]]:
        """Token ranges of the documents in row ``number`` of the split."""
        low, high = int(self.offsets[self.first + number]), int(self.offsets[self.first + number + 1])
        starts, lengths = self.starts[low:high].tolist(), self.lengths[low:high].tolist()
        return [(start, start + length) for start, length in zip(starts, lengths)]


def open_packs(dataset: IndexedDataset, capacity: int, shares: Sequence[float], split: int) -> Packs:
    """The plan of ``capacity`` beside a pair; ValueError when there is none, or it is of another pair or split."""
    path = f"{dataset.prefix}.pack{capacity}"
    record = (dataset.sidecar.packs or {}).get(str(capacity)) if dataset.sidecar else None
    hint = f"run tools/pack_data.py {dataset.prefix} --sequence {capacity} with --split as in data.split"
    if record is None or not os.path.exists(path):
        raise ValueError(f"data.packing = 'best-fit' finds no plan for model.sequence = {capacity} in {path}: {hint}.")
    wanted = [list(pair) for pair in split_documents(len(dataset), [*shares, 0.0, 0.0][:3])]
    if record["documents"] != wanted or (dataset.sidecar and record["idx_digest"] != dataset.sidecar.idx_digest):
        raise ValueError(f"{path} was planned for another data.split or another pair: {hint}.")
    rows, count = sum(record["rows"]), record["items"]
    if os.path.getsize(path) != 8 * (rows + 1 + 2 * count):
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes, which is not what its record says: {hint}.")
    body = np.memmap(path, "<i8", "r").view(np.ndarray)
    return Packs(
        sum(record["rows"][:split]), record["rows"][split], body[: rows + 1], body[rows + 1 : rows + 1 + count],
        body[rows + 1 + count :],
    )  # fmt: skip
