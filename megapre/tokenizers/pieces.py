"""One piece of input to shards on disk, per key ``N.K.bin`` (ids), ``.len`` and ``.doc`` (int32), and ``N.json``.

The record ``N.json`` gets its name last, so a piece that has one is finished and survives whatever happens next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megapre.data.indexed import token_dtype
from megapre.data.sidecar import write_json
from megapre.tokenizers.backends import Encode, make
from megapre.tokenizers.documents import batches
from megapre.tokenizers.inputs import Piece
from megapre.tokenizers.load import load

REPORTED = 20
"""Bad lines of a span that its record describes; all are counted."""


@dataclass(frozen=True)
class Setting:
    """What a worker needs to know."""

    parts: str
    """Folder of the shards."""
    keys: tuple[str, ...]
    tokenizer: tuple[str, str, int]
    kind: str
    """The tokenizer's type."""
    size: int
    """Its ids."""
    backend: str
    eod: int | None
    """What ends every document; None: nothing."""
    sentences: bool
    limit: int
    """Bytes of the largest document."""


@dataclass
class SpanRecord:
    """What a span held."""

    path: str
    start: int
    """First byte, or row group."""
    lines: int = 0
    bad_count: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    """The first bad lines: number in the span, reason."""


@dataclass
class Record:
    """What a piece held."""

    documents: int = 0
    empty: int = 0
    counts: list[list[int]] = field(default_factory=list)
    """Per key: tokens, sequences, documents."""
    spans: list[SpanRecord] = field(default_factory=list)

    @staticmethod
    def read(parts: Path, number: int) -> Record | None:
        """The record of a finished piece whose files are all there."""
        try:
            content = json.loads((parts / f"{number:06d}.json").read_text())
            content["spans"] = [SpanRecord(**span) for span in content["spans"]]
            record = Record(**content)
            for key, (_, sequences, _) in enumerate(record.counts):
                if os.path.getsize(parts / f"{number:06d}.{key}.len") != 4 * sequences:
                    return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return record


class Shard:
    """Files of one key of a piece, under names of this process until all of them are complete."""

    def __init__(self, stem: str, dtype: np.dtype, vocab_size: int, sentences: bool) -> None:
        self._names = {suffix: f"{stem}{suffix}" for suffix in (".bin", ".len", *([".doc"] if sentences else []))}
        self._files = {suffix: open(f"{name}.tmp-{os.getpid()}", "wb") for suffix, name in self._names.items()}
        self.dtype, self.vocab_size = dtype, vocab_size
        self.tokens = self.sequences = self.documents = 0

    def add(self, ids: list[Any], lengths: list[int], documents: list[int] | None) -> None:
        """Ids in pieces, the tokens of each sequence, and how many belong to each document (one when None)."""
        if not ids:
            return
        flat = np.concatenate(ids)
        low, high = 0 if flat.dtype.kind == "u" else int(flat.min()), int(flat.max())
        if low < 0 or high >= self.vocab_size:
            raise RuntimeError(f"the tokenizer gave id {high if low >= 0 else low}, outside its {self.vocab_size} ids.")
        self._files[".bin"].write(flat.astype(self.dtype).data)
        self._files[".len"].write(np.asarray(lengths, "<i4").data)
        if documents is not None:
            self._files[".doc"].write(np.asarray(documents, "<i4").data)
        self.tokens += len(flat)
        self.sequences += len(lengths)
        self.documents += len(lengths if documents is None else documents)

    def finish(self) -> list[int]:
        """Flush to the disk and give the files their names; tokens, sequences, documents."""
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, self._names[suffix])
        return [self.tokens, self.sequences, self.documents]

    def abandon(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                pass  # a full disk: what was buffered is lost, as intended
            if os.path.exists(file.name):
                os.remove(file.name)


def tokenize(setting: Setting, encode: Encode | None = None) -> Callable[[Piece, Callable[[Any], None]], Record]:
    """The function that turns a piece into shards; reads the tokenizer unless its ``encode`` is given."""
    if encode is None:
        encode = encoder(setting)
    eod = [] if setting.eod is None else [setting.eod]
    dtype = token_dtype(setting.size)

    def work(piece: Piece, progress: Callable[[Any], None]) -> Record:
        stem = f"{setting.parts}/{piece.number:06d}"
        shards: list[Shard] = []
        try:
            for key in range(len(setting.keys)):
                shards.append(Shard(f"{stem}.{key}", dtype, setting.size, setting.sentences))
            record = _fill(piece, shards, setting, encode, eod, progress)
            record.counts = [shard.finish() for shard in shards]
        except BaseException:
            for shard in shards:
                shard.abandon()
            raise
        write_json(f"{stem}.json", asdict(record))
        return record

    return work


def encoder(setting: Setting) -> Encode:
    """The back end, read anew."""
    if setting.backend == "reference":
        return load(*setting.tokenizer).encode_batch  # type: ignore[return-value]
    return make(setting.backend, setting.kind, setting.tokenizer[1])


def _fill(
    piece: Piece, shards: list[Shard], setting: Setting, encode: Encode, eod: list[int], progress: Callable[[Any], None]
) -> Record:
    record = Record()
    for span in piece.spans:
        found = SpanRecord(span.path, span.start)
        record.spans.append(found)
        for batch in batches(span, setting.keys, setting.limit, setting.parts):
            columns = _encode(batch.texts, batch.lines, batch.bad, len(setting.keys), setting.sentences, encode)
            documents = len(columns[0])
            before = sum(shard.tokens for shard in shards)
            for shard, column in zip(shards, columns):
                _add(shard, column, eod, setting.sentences)
                record.empty += sum(not any(len(s) for s in sequences) for sequences in column)
            record.documents += documents
            found.lines = max(found.lines, batch.read)
            found.bad_count += len(batch.bad)
            found.bad += sorted(batch.bad)[: REPORTED - len(found.bad)]
            progress((documents, sum(shard.tokens for shard in shards) - before))
    return record


def _add(shard: Shard, column: list[list[Any]], eod: list[int], sentences: bool) -> None:
    """Sequences that have a token; ``eod`` joins the last of each document."""
    ids: list[Any] = []
    lengths: list[int] = []
    counts: list[int] = []
    end = np.asarray(eod, np.uint32)
    for sequences in column:
        kept = [sequence for sequence in sequences if len(sequence)]
        if kept:
            counts.append(len(kept))
            lengths += map(len, kept)
            ids += kept
            if eod:
                lengths[-1] += 1
                ids.append(end)
    shard.add(ids, lengths, counts if sentences else None)


def _encode(
    texts: list[list[str]], lines: list[int], bad: list[tuple[int, str]], keys: int, sentences: bool, encode: Encode
) -> list[list[list[Any]]]:
    """Per key and document, ids of its sequences. A document that the tokenizer refuses is bad for all keys."""
    columns: list[list[list[Any]]] = []
    try:
        for key in range(keys):
            if not sentences:
                columns.append([[ids] for ids in encode([document[key] for document in texts])])
                continue
            from megapre.tokenizers.sentences import split_sentences  # loads `regex`, which no other path needs

            cut = [split_sentences(document[key]) for document in texts]
            flat = iter(encode([sentence for document in cut for sentence in document]))
            columns.append([[next(flat) for _ in document] for document in cut])
        return columns
    except ValueError as error:
        if len(texts) == 1:
            bad.append((lines[0], str(error)))
            return [[] for _ in range(keys)]
    columns = [[] for _ in range(keys)]
    for document, line in zip(texts, lines):
        for column, found in zip(columns, _encode([document], [line], bad, keys, sentences, encode)):
            column += found
    return columns
