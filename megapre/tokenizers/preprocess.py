"""Text files to ``.bin``/``.idx`` pairs: cut the input into pieces, tokenize them in workers, merge their shards.

The cut depends on the input alone and every piece is finished by itself, so the output is the same for any number of
workers and machines, and after any interruption. Shards wait in ``PREFIX.parts/`` until the pairs have their names.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megapre.data.indexed import token_dtype
from megapre.data.merge import Part, Target, each
from megapre.data.sidecar import TokenizerRecord, write_json
from megapre.tokenizers import workers
from megapre.tokenizers.backends import Encode, choose
from megapre.tokenizers.documents import LARGEST_DOCUMENT, BadLine, batches, lines_before
from megapre.tokenizers.inputs import Piece, Span, cut, share_out
from megapre.tokenizers.load import load
from megapre.tokenizers.pieces import Record, Setting, SpanRecord, tokenize
from megapre.tokenizers.team import Team
from megapre.tokenizers.vocabulary import record

REPORTED_LINES = 20
FIRST_DOCUMENTS, FIRST_CHARACTERS = 200, 1 << 17
"""Documents of the input that back ends are compared on."""
INLINE = 32 << 20
"""Bytes of input that one worker tokenizes in this process."""
Make = Callable[[Setting], Callable[[Piece, Callable[[Any], None]], Record]]


@dataclass(frozen=True)
class Job:
    """What to tokenize, and how. ``prefix`` is completed to ``{prefix}_{key}_document`` (or ``_sentence``)."""

    inputs: Sequence[str]
    prefix: str
    keys: Sequence[str]
    tokenizer_type: str
    tokenizer_model: str = ""
    vocab_size: int = 0
    append_eod: bool = False
    split_sentences: bool = False
    backend: str = "auto"
    workers: int = 1
    skip_bad_lines: bool = True
    log_interval: int = 10_000
    largest_document: int = LARGEST_DOCUMENT
    shard_tokens: int = 0
    """Tokens above which a further pair is begun; 0: one pair."""
    piece_bytes: int = 0
    """Bytes of input a piece; 0: by the size of the input."""

    @property
    def tokenizer(self) -> tuple[str, str, int]:
        """Arguments of ``tokenizers.load``."""
        return self.tokenizer_type, self.tokenizer_model, self.vocab_size

    @property
    def outputs(self) -> list[str]:
        """Prefixes of the pairs, one per key."""
        level = "sentence" if self.split_sentences else "document"
        return [f"{self.prefix}_{key}_{level}" for key in self.keys]


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
    resumed: int = 0
    """Pieces that an earlier run had finished."""


def preprocess(job: Job, log: Callable[[str], None] | None = None, team: Team | None = None) -> Report:
    """Write one pair (or numbered pairs) and a record per key, or nothing; ``log`` gets progress and bad lines.

    Every process of ``team`` calls this with the same job. Raises ValueError on a bad argument, on a bad line unless
    ``skip_bad_lines``, and when no document is left; OSError when the disk is full, after which the same command goes
    on where it stopped.
    """
    team, log = team or Team(), log or _print
    parts, lock = Path(f"{job.prefix}.parts"), None
    try:
        if team.rank == 0:
            os.makedirs(os.path.dirname(job.prefix) or ".", exist_ok=True)
            lock = _lock(f"{job.prefix}.lock")
        report = _run(job, parts, log, team)
    except BaseException as error:
        if lock is not None and isinstance(error, ValueError):  # nothing that the same command could go on with
            shutil.rmtree(parts, ignore_errors=True)
        _unlock(job.prefix, lock)
        team.fail(str(error) or type(error).__name__)  # under MPI this does not come back
        raise
    _unlock(job.prefix, lock)
    return report


def _run(job: Job, parts: Path, log: Callable[[str], None], team: Team) -> Report:
    plan, encode = _plan(job, parts, log) if team.rank == 0 else ({}, None)
    plan = team.broadcast("plan", plan)
    pieces = [Piece(p["number"], tuple(Span(**span) for span in p["spans"]), p["size"]) for p in plan["pieces"]]
    tokenizer = TokenizerRecord(**plan["record"])
    setting = Setting(
        str(parts), tuple(job.keys), job.tokenizer, tokenizer.type, tokenizer.vocab_size, plan["options"][-1],
        tokenizer.eod if job.append_eod else None, job.split_sentences, job.largest_document,
    )  # fmt: skip
    low, high = share_out(pieces, team.size)[team.rank]
    make = tokenize if team.start_method != "fork" else partial(tokenize, encode=encode)
    done = _tokenize(job, pieces[low:high], setting, make, log if team.rank == 0 else _silent, team.start_method)
    report = _report(job, done, log, team)
    counts = {number: found.counts for number, (found, _) in done.items()}
    report.prefixes = _merge(job, parts, tokenizer, counts, range(low, high), team)
    if team.rank == 0:
        shutil.rmtree(parts)
    team.close()
    return report


def _lock(path: str) -> int:
    """Hold the output for this process; the lock ends with it, however it ends."""
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise ValueError(f"another run is writing this --output-prefix (it holds {path}).") from None
    return file


def _unlock(prefix: str, lock: int | None) -> None:
    if lock is not None:
        os.remove(f"{prefix}.lock")
        os.close(lock)


def _plan(job: Job, parts: Path, log: Callable[[str], None]) -> tuple[dict[str, Any], Encode]:
    """Pieces and back end; ``parts`` keeps those of an earlier run only when that run was of the same job."""
    tokenizer = load(*job.tokenizer)
    pieces = cut(job.inputs, job.piece_bytes)
    backend, encode = choose(job.backend, tokenizer, job.tokenizer_model, _first_texts(job, pieces), log)
    log(f"tokenizer {tokenizer.type}, {tokenizer.vocab_size} ids, end-of-document {tokenizer.eod}, back end {backend}; "
        f"{sum(piece.size for piece in pieces) / 1e6:.1f} MB in {len(pieces)} pieces")  # fmt: skip
    plan = {
        "inputs": [[path, (found := os.stat(path)).st_size, found.st_mtime_ns] for path in job.inputs],
        "pieces": [asdict(piece) for piece in pieces],
        "record": asdict(record(tokenizer, job.append_eod)),
        "options": [list(job.keys), job.split_sentences, job.largest_document, backend],
    }
    plan = json.loads(json.dumps(plan))
    if parts.exists() and _read_plan(parts) != plan:
        log(f"{parts} is of other input or options, or was never begun: its shards are dropped")
        shutil.rmtree(parts)
    if not parts.exists():
        parts.mkdir()
        write_json(parts / "plan.json", plan)
    for stale in parts.glob("*.tmp-*"):
        stale.unlink(missing_ok=True)
    return plan, encode


def _read_plan(parts: Path) -> Any:
    try:
        return json.loads((parts / "plan.json").read_text())
    except (OSError, ValueError):
        return None


def _first_texts(job: Job, pieces: list[Piece]) -> Iterator[str]:
    documents = characters = 0
    for piece in pieces[:4]:
        for span in piece.spans[:FIRST_DOCUMENTS]:
            for batch in batches(span, job.keys, job.largest_document):
                for texts in batch.texts:
                    yield from (text[: FIRST_CHARACTERS - characters] for text in texts)
                    documents, characters = documents + 1, characters + sum(map(len, texts))
                    if documents >= FIRST_DOCUMENTS or characters >= FIRST_CHARACTERS:
                        return
                if documents == 0 and batch.read > FIRST_CHARACTERS:
                    return


def _tokenize(
    job: Job, pieces: list[Piece], setting: Setting, make: Make, log: Callable[[str], None], method: str
) -> dict[int, tuple[Record, bool]]:
    """Records of ``pieces`` by number, and whether an earlier run left it."""
    parts = Path(setting.parts)
    done = {piece.number: (record, True) for piece in pieces if (record := Record.read(parts, piece.number))}
    left = [piece for piece in pieces if piece.number not in done]
    if done:
        log(f"{len(done)} of {len(pieces)} pieces were finished by an earlier run")
    size = sum(piece.size for piece in left)
    crew = 0 if job.workers == 1 and size <= INLINE else job.workers
    meter = _Meter(job.log_interval, size, log)
    for piece, record in workers.run(make, setting, left, crew, meter.documents, method):
        done[piece.number] = (record, False)
        meter.bytes(piece.size)
        bad = [span for span in record.spans if span.bad_count]
        if bad and not job.skip_bad_lines:
            raise ValueError(f"{_bad_lines(bad[0])[0]} (--on-bad-line skip leaves such lines out).")
    return done


def _bad_lines(span: SpanRecord) -> list[BadLine]:
    """Bad lines of a span by their number in the file."""
    before = lines_before(span.path, span.start) if span.start else 0
    return [BadLine(span.path, line + before if line else 0, reason) for line, reason in span.bad]


class _Meter:
    """Progress: documents, tokens and share of bytes, with the rate and the time left."""

    def __init__(self, interval: int, size: int, log: Callable[[str], None]) -> None:
        self.interval, self.size, self.log = interval, size, log
        self.started = time.monotonic()
        self.done = self.read = self.tokens = self.logged = 0

    def documents(self, found: tuple[int, int]) -> None:
        """Count documents and tokens; a line every ``interval`` documents."""
        self.read, self.tokens = self.read + found[0], self.tokens + found[1]
        if self.read - self.logged >= self.interval:
            self.logged = self.read
            seconds = max(time.monotonic() - self.started, 1e-9)
            left = f", {self._clock(seconds * (self.size - self.done) / self.done)} left" if self.done else ""
            self.log(
                f"{self.read} documents, {self.tokens} tokens, {self.tokens / seconds / 1e6:.2f} M tokens/s, "
                f"{self.done / seconds / 1e6:.1f} MB/s, {self.done / max(1, self.size):.0%} of the input{left}"
            )

    def bytes(self, count: int) -> None:
        """Count a finished piece."""
        self.done += count

    @staticmethod
    def _clock(seconds: float) -> str:
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _report(job: Job, records: dict[int, tuple[Record, bool]], log: Callable[[str], None], team: Team) -> Report:
    """Sums over all ranks, and bad lines by their number in the file, on rank 0; others get their own."""
    mine = [(number, asdict(record), old) for number, (record, old) in sorted(records.items())]
    report = Report()
    for found in team.gather("records", mine) or [mine]:
        for _, content, old in found:
            report.documents += content["documents"]
            report.empty += content["empty"]
            report.tokens += sum(tokens for tokens, _, _ in content["counts"])
            report.resumed += old
            for span in content["spans"]:
                report.bad_count += span["bad_count"]
                if span["bad_count"] and len(report.bad) < REPORTED_LINES:
                    report.bad += _bad_lines(SpanRecord(**span))[: REPORTED_LINES - len(report.bad)]
    if team.rank == 0:
        for line in report.bad:
            log(f"skipped {line}")
        if report.bad_count > len(report.bad):
            log(f"skipped {report.bad_count - len(report.bad)} more")
    return report


def _merge(
    job: Job, parts: Path, record: TokenizerRecord, counts: dict[int, list[list[int]]], mine: range, team: Team
) -> list[str]:
    """Put the shards of every key into pairs. Each rank writes its own pieces' bytes and hashes its share of blocks."""
    found = [{int(n): value for n, value in rank.items()} for rank in team.gather("counts", counts)]
    sums = team.broadcast("all counts", {n: value for rank in found for n, value in rank.items()})
    whole = {int(n): value for n, value in sums.items()}
    written = []
    for key, prefix in enumerate(job.outputs):
        shards = [Part(f"{parts}/{n:06d}.{key}", *whole[n][key]) for n in sorted(whole)]
        if sum(shard.tokens for shard in shards) == 0:
            raise ValueError(f"no document has a token under --json-keys {job.keys[key]}, so nothing was written.")
        groups = _groups(shards, job.shard_tokens)
        names = [f"{prefix}_{n:05d}" for n in range(len(groups))] if job.shard_tokens else [prefix]
        for number, (name, group) in enumerate(zip(names, groups)):
            numbers = range(*(min(max(bound - group[0], 0), group[1] - group[0]) for bound in (mine.start, mine.stop)))
            target = Target(name, token_dtype(record.vocab_size), shards[slice(*group)])
            _write_pair(target, numbers, f"{key}.{number}", record, team, job.workers)
        written += names
        if job.shard_tokens and team.rank == 0:
            write_json(f"{prefix}.manifest.json", {"pairs": [os.path.basename(name) for name in names]})
    return written


def _write_pair(target: Target, numbers: range, name: str, record: TokenizerRecord, team: Team, threads: int) -> None:
    try:
        if team.rank == 0:
            target.begin()
        team.broadcast(f"begun {name}", True)
        each(target.write, numbers, threads)
        team.gather(f"written {name}", True)
        team.broadcast(f"hash {name}", True)
        found = team.gather(f"digests {name}", target.digests(team.rank, team.size, threads))
        if team.rank == 0:
            blocks = {suffix: {int(n): d for rank in found for n, d in rank[suffix].items()} for suffix in found[0]}
            target.finish(blocks, record)
        team.broadcast(f"finished {name}", True)
    except BaseException:
        if team.rank == 0:
            target.abandon()
        raise


def _groups(shards: list[Part], limit: int) -> list[tuple[int, int]]:
    """Ranges of shards of at most ``limit`` tokens, or one shard that has more."""
    if not limit:
        return [(0, len(shards))]
    bounds, held = [0], 0
    for number, shard in enumerate(shards):
        if held and held + shard.tokens > limit:
            bounds.append(number)
            held = 0
        held += shard.tokens
    return list(zip(bounds, [*bounds[1:], len(shards)]))


def _print(message: str) -> None:
    print(message, file=sys.stderr)


def _silent(message: str) -> None:
    pass
