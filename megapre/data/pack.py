"""Rows of L tokens that are planned offline into ``PREFIX.packL`` or ``PREFIX.sentencesL`` and the sidecar.

Whole documents by best-fit decreasing (arXiv 2404.10830): documents, those above L tokens first cut into parts of L, go
by falling length into the row with the least room that still takes them. Sentences, for objectives that pair texts
(arXiv 1810.04805): consecutive ones of a document, at least two and as many as fit beside [CLS] and two [SEP].
Rows stay inside one split, whose shares the plan is made for.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megapre.data.indexed import IndexedDataset
from megapre.data.order import split_documents
from megapre.data.sidecar import file_digest
from megapre.objectives.pair import ADDED


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


def sentence_rows(dataset: IndexedDataset, low: int, high: int, capacity: int) -> tuple[np.ndarray, ...]:
    """First token, length and row of the sentences of documents [low, high) that stand in rows.

    A sentence above half of ``capacity`` is cut into parts of that length, so that any two fit. A last one that would
    be alone in its row takes one from the row before; a document of one sentence has no row.
    """
    bounds, half = dataset.document_bounds[low : high + 1].tolist(), capacity // 2
    starts, lengths, rows, count = [], [], [], 0
    for first, last in pairwise(bounds):
        sizes = dataset.sequence_lengths[first:last].tolist()
        begins = [dataset.sequence_start(sequence) for sequence in range(first, last)]
        parts = [
            (begin + at, min(half, size - at)) for begin, size in zip(begins, sizes) for at in range(0, size, half)
        ]
        for row in _consecutive([size for _, size in parts], capacity):
            starts += [parts[i][0] for i in row]
            lengths += [parts[i][1] for i in row]
            rows += [count] * len(row)
            count += 1
    return np.array(starts, np.int64), np.array(lengths, np.int64), np.array(rows, np.int64)


def _consecutive(sizes: list[int], capacity: int) -> list[range]:
    """Runs of at least two sizes, each as long as ``capacity`` allows."""
    runs, begin, held = [], 0, 0
    for i, size in enumerate(sizes):
        if held + size > capacity:
            runs.append(range(begin, i))
            begin, held = i, 0
        held += size
    runs.append(range(begin, len(sizes)))
    if len(runs) > 1 and len(runs[-1]) == 1 and len(runs[-2]) > 2:
        runs[-2:] = [runs[-2][:-1], range(runs[-1].start - 1, runs[-1].stop)]
    return [run for run in runs if len(run) > 1]


def plan(prefix: str, capacity: int, shares: Sequence[float], *, sentences: bool = False) -> dict[str, object]:
    """Plan rows of ``capacity`` tokens of a pair, write ``PREFIX.packL`` (``.sentencesL``), and record it."""
    dataset = IndexedDataset(prefix)
    if dataset.sidecar is None:
        raise ValueError(f"{prefix}.json is missing: inspect_data.py --validate writes one.")
    if sentences and dataset.sequences <= len(dataset):
        raise ValueError(f"{prefix} holds one sequence a document: preprocess_data.py --split-sentences cuts them.")
    documents = split_documents(len(dataset), [*shares, 0.0, 0.0][:3])
    sizes, starts, lengths, rows = [np.zeros(1, np.int64)], [], [], []
    room = capacity - ADDED if sentences else capacity
    for low, high in documents:
        if sentences:
            start, length, row = sentence_rows(dataset, low, high, room)
        else:
            start, length = items(dataset, low, high, room)
            row = best_fit(length, room)
        order = np.lexsort((start, row))
        found = np.bincount(row) if len(row) else np.empty(0, np.int64)
        sizes.append(found.astype(np.int64))
        starts.append(start[order])
        lengths.append(length[order])
        rows.append(len(found))
    path, key = _place(prefix, capacity, sentences)
    temporary = f"{path}.tmp-{os.getpid()}"
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
        "fill": tokens / max(1, sum(rows) * room),
        "sha256": file_digest(path),
        "idx_digest": dataset.sidecar.idx_digest,
    }
    packs = {**(dataset.sidecar.packs or {}), key: record}
    replace(dataset.sidecar, packs=packs).write(prefix + ".json")
    return record


def _place(prefix: str, capacity: int, sentences: bool) -> tuple[str, str]:
    """File of a plan, and its key in the sidecar."""
    kind = "sentences" if sentences else "pack"
    return f"{prefix}.{kind}{capacity}", f"sentences{capacity}" if sentences else str(capacity)


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


def open_packs(
    dataset: IndexedDataset, capacity: int, shares: Sequence[float], split: int, *, sentences: bool = False
) -> Packs:
    """The plan of ``capacity`` beside a pair; ValueError when there is none, or it is of another pair or split."""
    path, key = _place(dataset.prefix, capacity, sentences)
    record = (dataset.sidecar.packs or {}).get(key) if dataset.sidecar else None
    option = " --sentences" if sentences else ""
    hint = f"run tools/pack_data.py {dataset.prefix} --sequence {capacity}{option} with --split as in data.split"
    if record is None or not os.path.exists(path):
        asker = "data.objective" if sentences else "data.packing = 'best-fit'"
        raise ValueError(f"{asker} finds no plan for model.sequence = {capacity} in {path}: {hint}.")
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
