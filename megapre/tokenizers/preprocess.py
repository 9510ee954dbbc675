"""Text files to ``.bin``/``.idx`` pairs: parse and tokenize in worker processes, write in input order.

At most ``2 * workers + 2`` chunks are in flight, whatever the size of the input.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context

import numpy as np

from megapre.data.indexed import IndexedWriter, token_dtype
from megapre.data.sidecar import TokenizerRecord
from megapre.tokenizers.base import Tokenizer
from megapre.tokenizers.documents import BadLine, Chunk, Document, chunks, parse
from megapre.tokenizers.load import load

REPORTED_LINES = 20


@dataclass(frozen=True)
class Job:
    """What to tokenize, and how. Paths are files; ``prefix`` is completed to ``{prefix}_{key}_document``."""

    inputs: Sequence[str]
    prefix: str
    keys: Sequence[str]
    tokenizer_type: str
    tokenizer_model: str = ""
    vocab_size: int = 0
    append_eod: bool = False
    workers: int = 1
    skip_bad_lines: bool = True
    log_interval: int = 10_000

    @property
    def tokenizer(self) -> tuple[str, str, int]:
        """Arguments of ``tokenizers.load``."""
        return self.tokenizer_type, self.tokenizer_model, self.vocab_size


@dataclass
class Report:
    """What a run did."""

    documents: int = 0
    """Documents read, over which keys are aligned."""
    tokens: int = 0
    empty: int = 0
    """Texts without a token, left out."""
    bad: list[BadLine] = field(default_factory=list)
    """The first bad lines."""
    bad_count: int = 0
    prefixes: list[str] = field(default_factory=list)
    """Prefixes of the pairs written."""


@dataclass(frozen=True)
class Tokenized:
    """A chunk's ids: per key, flat ids and the tokens of each document that has any."""

    columns: list[tuple[np.ndarray, np.ndarray]]
    documents: int
    empty: int
    bad: list[BadLine]


def preprocess(job: Job, log: Callable[[str], None] | None = None) -> Report:
    """Write one pair and its record per key, or nothing; ``log`` gets progress and bad lines (default: stderr).

    Raises ValueError on a bad argument, on a bad line unless ``skip_bad_lines``, and when no document is left.
    """
    log = log or _print
    tokenizer = load(*job.tokenizer)
    folder = os.path.dirname(job.prefix)
    if folder:
        os.makedirs(folder, exist_ok=True)
    dtype = token_dtype(tokenizer.vocab_size)
    record = TokenizerRecord(
        tokenizer.type, tokenizer.digest, tokenizer.vocab_size, tokenizer.eod, tokenizer.mask, job.append_eod
    )
    report = Report(prefixes=[f"{job.prefix}_{key}_document" for key in job.keys])
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(prefix, dtype, record)) for prefix in report.prefixes]
        started, logged = time.monotonic(), 0
        for part in _tokenized(job, tokenizer):
            _collect_bad(job, report, part.bad, log)
            for writer, (ids, lengths) in zip(writers, part.columns):
                writer.add_documents(ids, lengths)
                report.tokens += len(ids)
            report.documents += part.documents
            report.empty += part.empty
            if report.documents - logged >= job.log_interval:
                logged = report.documents
                seconds = max(time.monotonic() - started, 1e-9)
                log(f"{logged} documents, {report.tokens} tokens, {report.tokens / seconds / 1e6:.2f} M tokens/s")
        for key, writer in zip(job.keys, writers):
            if writer.tokens == 0:
                raise ValueError(
                    f"no document has a token under --json-keys {key} ({report.documents} documents, "
                    f"{report.bad_count} bad lines), so nothing was written."
                )
    return report


def _print(message: str) -> None:
    print(message, file=sys.stderr)


def tokenize_chunk(chunk: Chunk, keys: Sequence[str], tokenizer: Tokenizer, eod: int | None) -> Tokenized:
    """Parse and tokenize one chunk; ``eod`` is appended to every document when given."""
    documents, bad = parse(chunk, keys)
    dtype = token_dtype(tokenizer.vocab_size)
    try:
        encoded = [tokenizer.encode_batch([document.texts[k] for document in documents]) for k in range(len(keys))]
    except ValueError:
        encoded = _encode_singly(chunk, documents, len(keys), tokenizer, bad)
    columns, empty = [], 0
    for column in encoded:
        filled = [ids for ids in column if ids]
        empty += len(column) - len(filled)
        tail = [] if eod is None else [eod]
        arrays = [np.asarray(ids + tail, dtype) for ids in filled]
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        columns.append((np.concatenate(arrays) if arrays else np.empty(0, dtype), lengths))
    return Tokenized(columns, len(encoded[0]), empty, bad)


def _encode_singly(
    chunk: Chunk, documents: list[Document], keys: int, tokenizer: Tokenizer, bad: list[BadLine]
) -> list[list[list[int]]]:
    """Ids by key and document, when the tokenizer refuses one of a batch: that one joins the bad, for all keys."""
    columns: list[list[list[int]]] = [[] for _ in range(keys)]
    for document in documents:
        try:
            encoded = [tokenizer.encode(text) for text in document.texts]
        except ValueError as error:
            bad.append(BadLine(chunk.path, document.line, str(error)))
            continue
        for column, ids in zip(columns, encoded):
            column.append(ids)
    return columns


def _collect_bad(job: Job, report: Report, bad: list[BadLine], log: Callable[[str], None]) -> None:
    for line in bad:
        if not job.skip_bad_lines:
            raise ValueError(f"{line} (--on-bad-line skip leaves such lines out).")
        report.bad_count += 1
        if len(report.bad) < REPORTED_LINES:
            report.bad.append(line)
            log(f"skipped {line}")


def _tokenized(job: Job, tokenizer: Tokenizer) -> Iterator[Tokenized]:
    """Results in input order."""
    eod = tokenizer.eod if job.append_eod else None
    source = chunks(job.inputs)
    if job.workers <= 1:
        for chunk in source:
            yield tokenize_chunk(chunk, job.keys, tokenizer, eod)
        return
    pool = ProcessPoolExecutor(
        job.workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
    )
    with pool:
        waiting: deque[Future[Tokenized]] = deque()
        try:
            for chunk in source:
                waiting.append(pool.submit(_work, chunk, job.keys, eod, *job.tokenizer))
                if len(waiting) > 2 * job.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _start_worker() -> None:
    # The processes are the parallelism: threads inside each would fight over the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(chunk: Chunk, keys: Sequence[str], eod: int | None, type: str, model: str, vocab_size: int) -> Tokenized:
    return tokenize_chunk(chunk, keys, _load_once(type, model, vocab_size), eod)


# A worker process reads the tokenizer's file once, not once a chunk.
_load_once = lru_cache(maxsize=1)(load)
