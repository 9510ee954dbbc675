"""Gather real text that this machine holds already into one JSON-lines file: python corpus.py OUT.jsonl --mb 200.

Sources: the Python standard library, the packages of this environment, and the texts of installed Debian packages
(/usr/share/doc and the like), in sorted order, repeated documents once. Nothing of it is shipped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson

SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".cuh", ".txt", ".md", ".rst", ".c", ".cpp", ".html", ".pl", ".pm", ".js"}
FOLDERS = ("/usr/share/doc", "/usr/share/perl", "/usr/share/common-licenses", "/usr/include", "/usr/lib/python3")
LARGEST = 4 << 20


def files() -> Iterator[Path]:
    """Text files of this machine, in sorted order."""
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([paths["stdlib"], paths["purelib"], paths["platlib"], *FOLDERS]):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in SUFFIXES or path.name.endswith((".txt.gz", "changelog.gz", "copyright")):
                yield path


def documents() -> Iterator[str]:
    """Decodable, distinct texts of 200 bytes to 4 MiB."""
    seen: set[bytes] = set()
    for path in files():
        try:
            if not path.is_file() or path.stat().st_size > LARGEST:
                continue
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode()
        except (OSError, UnicodeDecodeError, EOFError):
            continue
        digest = hashlib.sha1(raw).digest()
        if 200 <= len(raw) <= LARGEST and digest not in seen:
            seen.add(digest)
            yield text


def gather(output: Path, megabytes: float) -> float:
    """Write documents until ``megabytes`` (1e6 bytes) of text are reached; repeats the set when it is too small."""
    wanted, held, rounds = megabytes * 1e6, 0.0, 0
    with output.open("wb") as file:
        while held < wanted:
            before = held
            for text in documents():
                # A repeated round must not be the same text: prefix every document with the round.
                text = f"[{rounds}] {text}" if rounds else text
                file.write(orjson.dumps({"text": text}) + b"\n")
                held += len(text.encode())
                if held >= wanted:
                    break
            rounds += 1
            if held == before:
                raise SystemExit("corpus: this machine holds no text files")
    print(f"{output}: {held / 1e6:.0f} MB of text, {rounds} round(s) over this machine's files", file=sys.stderr)
    return held / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mb", type=float, default=200)
    arguments = parser.parse_args()
    gather(arguments.output, arguments.mb)
