"""Raw documents of any input file, in bounded memory; what is no document is reported by file and line."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import orjson

from megapre.tokenizers.inputs import DAMAGED, Span, format_of, is_array, open_packed, open_parquet, unpacked_name

BLOCK = 1 << 17
"""Bytes read at a time: what is done to a block stays in a core's cache."""
LONG = 8 << 20
"""Bytes read at a time inside a long line, at most."""
LARGEST_DOCUMENT = 64 << 20
"""Bytes of a line, JSON value or text file above which it is reported instead of read into memory."""
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadLine:
    """A line, JSON value, row or text file that is no document."""

    path: str
    line: int
    """From 1 in the file; 0 for the file as a whole."""
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


@dataclass
class Batch:
    """About a block of documents."""

    lines: list[int] = field(default_factory=list)
    """Line of each document, from 1 at the start of the span; 0 in a text file."""
    texts: list[list[str]] = field(default_factory=list)
    """Per document, a text for each key."""
    bad: list[tuple[int, str]] = field(default_factory=list)
    """Line and reason of what is no document."""
    read: int = 0
    """Lines (values, rows) passed so far, blank ones included."""


def batches(
    span: Span, keys: Sequence[str], limit: int = LARGEST_DOCUMENT, scratch: str | None = None
) -> Iterator[Batch]:
    """Documents of a span, in order, with a text for each of ``keys``; ``scratch`` holds Parquet that is packed."""
    kind = format_of(span.path)
    if kind == ".txt":
        yield _text_file(span.path, len(keys), limit)
    elif kind == ".parquet":
        yield from _rows(span, keys, scratch, limit)
    else:
        array = kind == ".json" and is_array(span.path)
        for first, found, problem in _units(span, limit, array):
            batch = parse(found, first, keys, limit)
            if problem:
                batch.bad.append((batch.read, problem))
            yield batch


def documents(paths: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[list[list[str]], list[BadLine]]]:
    """Texts and bad lines of whole files, block by block."""
    for path in paths:
        for batch in batches(Span(path, 0, os.path.getsize(path), True), keys):
            yield batch.texts, [BadLine(path, line, reason) for line, reason in batch.bad]


def parse(lines: Sequence[bytes | None], first: int, keys: Sequence[str], limit: int = LARGEST_DOCUMENT) -> Batch:
    """Documents of JSON values, the first of which has number ``first``; None stands for one that is too long."""
    batch = Batch(read=first + len(lines) - 1)
    for number, content in enumerate(lines, first):
        if content is None:
            batch.bad.append((number, f"longer than {limit} bytes (--max-document-mb)"))
        elif content and not content.isspace():
            try:
                texts = _texts(content, keys)
            except ValueError as error:
                batch.bad.append((number, str(error)))
                continue
            batch.lines.append(number)
            batch.texts.append(texts)
    return batch


def line_blocks(file: BinaryIO, start: int, stop: int | None, limit: int) -> Iterator[list[bytes | None]]:
    """Lines whose first byte is in bytes [start, stop) (None: to the end), without their ends; None for one too long.

    Ranges that touch share no line and lose none. When reading fails, the lines before the failure have been yielded.
    """
    at, carry, skipping = _first_line(file, start, stop), b"", False
    while skipping or stop is None or at < stop:
        block = file.read(min(max(BLOCK, len(carry)), LONG))  # a long line is not copied anew for every block
        data = carry + block
        if not block:
            if data or skipping:
                yield [None if skipping or len(data) > limit else data]
            return
        cut = data.rfind(b"\n") + 1
        if stop is not None and at + cut > stop:  # the last line is the one that holds byte stop - 1
            cut = data.find(b"\n", max(0, stop - 1 - at)) + 1
        if cut:
            lines: list[bytes | None] = list(data[: cut - 1].split(b"\n"))
            if skipping or len(lines[0] or b"") > limit:  # others fit into a block
                lines[0] = None
            skipping = False
            yield lines
        at, carry = at + cut, data[cut:]
        if skipping or len(carry) > limit:
            at, carry, skipping = at + len(carry), b"", True


def _first_line(file: BinaryIO, start: int, stop: int | None) -> int:
    """Place ``file`` where the first line at or behind ``start`` begins."""
    if start == 0:
        return 0
    at = start - 1
    file.seek(at)
    while stop is None or at < stop:
        block = file.read(BLOCK)
        newline = block.find(b"\n")
        if newline >= 0:
            at += newline + 1
            break
        at += len(block)
        if not block:
            break
    file.seek(at)
    return at


def lines_before(path: str, start: int) -> int:
    """Lines that begin before byte ``start`` of a plain file, or rows before group ``start`` of Parquet."""
    if format_of(path) == ".parquet":
        table = open_parquet(path).metadata
        return sum(table.row_group(group).num_rows for group in range(start))
    lines, left = 1, start - 1
    with open(path, "rb", buffering=0) as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def array_values(file: BinaryIO, limit: int) -> Iterator[list[bytes | None]]:
    """The values of the one JSON array that a file holds, as JSON.

    Raises ValueError where the array is malformed, too deep or cut, or holds a value above ``limit`` characters:
    behind that place nothing can be told apart.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    decode = json.JSONDecoder().raw_decode
    buffer, at, ended, first = text.read(BLOCK).lstrip()[1:], 0, False, True
    while True:
        values: list[bytes | None] = []
        while True:
            begin = _skip_space(buffer, at)
            if first and buffer[begin : begin + 1] == "]":
                end = begin
            else:
                try:
                    end = decode(buffer, begin)[1]
                except RecursionError:
                    if values:
                        yield values
                    raise ValueError("JSON nested too deeply") from None
                except ValueError as error:
                    far = not str(error).startswith("Unterminated") and getattr(error, "pos", 0) + 16 < len(buffer)
                    if ended or far:
                        if values:
                            yield values
                        raise ValueError(f"malformed JSON array ({error})") from None
                    break
                stop = _skip_space(buffer, end)
                if stop >= len(buffer) and not ended:
                    break  # the value may go on, as a number does
                values.append(buffer[begin:end].encode())
                end = stop
            first = False
            if buffer[end : end + 1] == "]":
                if values:
                    yield values
                if buffer[end + 1 :].strip() or text.read(BLOCK).strip():
                    raise ValueError("something follows the JSON array")
                return
            if buffer[end : end + 1] != ",":
                if values:
                    yield values
                raise ValueError("malformed JSON array (no comma after a value)" if end < len(buffer) else CUT)
            at = end + 1
        if values:
            yield values
        buffer, at = buffer[at:], 0
        if len(buffer) > limit:
            raise ValueError(f"a value longer than {limit} characters (--max-document-mb)")
        more = text.read(max(BLOCK, len(buffer)))
        ended = not more
        buffer += more


CUT = "the JSON array does not end"


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _units(span: Span, limit: int, array: bool) -> Iterator[tuple[int, Sequence[bytes | None], str]]:
    """Number of the first value, values, and why reading ended behind them when it ended early."""
    passed = 0
    with open_packed(span.path) as file:
        stop = None if span.whole else span.stop
        found = array_values(file, limit) if array else line_blocks(file, span.start, stop, limit)
        try:
            for values in found:
                if passed == 0 and span.start == 0 and values[0]:
                    values[0] = values[0].removeprefix(BOM)
                yield passed + 1, values, ""
                passed += len(values)
        except DAMAGED as error:
            yield passed + 1, [b""], f"damaged, the rest of the file is lost ({str(error) or type(error).__name__})"
        except UnicodeDecodeError as error:
            yield passed + 1, [b""], f"invalid UTF-8, the rest of the file is lost ({error.reason})"
        except ValueError as error:
            yield passed + 1, [b""], f"{error}; the rest of the file is lost"


def _text_file(path: str, keys: int, limit: int) -> Batch:
    batch = Batch()
    try:
        with open_packed(path) as file:
            content = bytearray()
            while len(content) <= limit and (block := file.read(BLOCK)):
                content += block
        if len(content) > limit:
            raise ValueError(f"longer than {limit} bytes (--max-document-mb)")
        text = content.removeprefix(BOM).decode()
    except (*DAMAGED, ValueError) as error:
        batch.bad.append((0, str(error) or "the file ends early"))
        return batch
    batch.lines.append(0)
    batch.texts.append([text] * keys)
    return batch


def _rows(span: Span, keys: Sequence[str], scratch: str | None, limit: int) -> Iterator[Batch]:
    """Rows of Parquet; a packed file is unpacked to ``scratch``, since its index is at the end."""
    passed = 0
    with ExitStack() as stack:
        source: Any = span.path
        if unpacked_name(span.path) != span.path:
            source = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
        try:
            if source is not span.path:
                with open_packed(span.path) as packed:
                    shutil.copyfileobj(packed, source, BLOCK)
            table = open_parquet(source)
            missing = [key for key in keys if key not in table.schema_arrow.names]
            if missing:
                raise ValueError(f"no column {missing[0]!r}")
            groups = range(table.metadata.num_row_groups)[slice(None) if span.whole else slice(span.start, span.stop)]
            for found in table.iter_batches(batch_size=1024, columns=list(keys), row_groups=list(groups)):
                columns = [_strings(found.column(key)) for key in keys]
                batch = Batch(read=passed + found.num_rows)
                for row, texts in enumerate(zip(*columns), passed + 1):
                    wrong = next((t for t in texts if not isinstance(t, str) or len(t) > limit), None)
                    if all(isinstance(t, str) and len(t) <= limit for t in texts):
                        batch.lines.append(row)
                        batch.texts.append(list(texts))
                    else:
                        batch.bad.append((row, "too long" if isinstance(wrong, str) else f"{wrong!r:.80} is no string"))
                passed += found.num_rows
                yield batch
        except (*DAMAGED, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the file
            lost = f"the rest of the file is lost ({str(error).splitlines()[0] if str(error) else 'damaged'})"
            yield Batch(bad=[(passed + 1 if passed else 0, lost)], read=passed + 1 if passed else 0)


def _strings(column: Any) -> list[Any]:
    """Values of an Arrow column; those that are no UTF-8 become bytes, which are no text."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        found: list[Any] = []
        for raw in column.cast("binary").to_pylist():
            try:
                found.append(None if raw is None else raw.decode())
            except UnicodeDecodeError:
                found.append(raw)
        return found


def _texts(line: bytes, keys: Sequence[str]) -> list[str]:
    document = orjson.loads(line)
    if not isinstance(document, dict):
        raise ValueError(f"a JSON {type(document).__name__} where an object is needed")
    texts = []
    for key in keys:
        text = document.get(key)
        if not isinstance(text, str):
            raise ValueError(f"no key {key!r}" if key not in document else f"{key!r} is no string")
        # JSON with a key twice has no agreed meaning; the quick count only says where to look.
        if line.count(b'"%b"' % key.encode()) > 1 and _repeats(line, key):
            raise ValueError(f"the key {key!r} is there twice")
        texts.append(text)
    return texts


def _repeats(line: bytes, key: str) -> bool:
    seen: list[list[str]] = []
    json.loads(line, object_pairs_hook=lambda pairs: seen.append([name for name, _ in pairs]))
    return seen[-1].count(key) > 1  # the outermost object is closed last
