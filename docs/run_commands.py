"""Run every ``sh`` block of README.md and docs/*.md, in order: python docs/run_commands.py [DOCUMENT.md ...].

All blocks share one empty working folder with links to the repository's own entries, and this Python's commands
come first on PATH, so a later document may use what an earlier one made. A block ends at its first failing line
and ends the run. Blocks fenced otherwise show output, files, or commands that need a cluster, and are not run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = {"build", "data", "demo_run", "runs"}
"""What runs leave in a checkout, and the documents' commands make themselves."""
LANGUAGES = {"sh", "console", "text", "toml", "json"}
LIMIT = 600
"""Seconds that one block may take."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    where: str
    """document:line of its fence."""
    language: str
    body: str


def documents(root: Path = ROOT) -> list[Path]:
    """README.md, then docs/*.md by name."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def blocks(path: Path) -> Iterator[Block]:
    """Fenced blocks of a document; ValueError on a fence that is not closed or has no known language."""
    opened, language, body = 0, "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            body.append(line)
            continue
        if opened:
            yield Block(f"{path.name}:{opened}", language, "\n".join(body))
            opened = 0
            continue
        opened, language, body = number, line[3:].strip(), []
        if language not in LANGUAGES:
            raise ValueError(f"{path.name}:{number} opens a block of {language!r}, none of {sorted(LANGUAGES)}")
    if opened:
        raise ValueError(f"{path.name}:{opened} opens a block that is never closed")


def link(folder: Path) -> None:
    """Make ``folder`` look like a fresh checkout."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in MADE:
            (folder / entry.name).symlink_to(entry)


def run(block: Block, folder: Path) -> int:
    """Run one block in ``folder`` and return bash's exit code."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    print(f"\n--- {block.where}\n{block.body}\n---", flush=True)
    started = time.monotonic()
    code = subprocess.run(["bash", "-euo", "pipefail", "-c", block.body], cwd=folder, env=env, timeout=LIMIT).returncode
    print(f"--- {block.where}: exit code {code} in {time.monotonic() - started:.1f} s", flush=True)
    return code


def main(names: list[str]) -> int:
    """Exit code 0 when every command succeeded."""
    chosen = [Path(name).resolve() for name in names] or documents()
    wanted = [block for path in chosen for block in blocks(path) if block.language == "sh"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megapre-docs-") as folder:
        link(Path(folder))
        for block in wanted:
            if run(block, Path(folder)):
                print(f"docs: {block.where} failed", file=sys.stderr)
                return 1
    print(f"docs: {len(wanted)} blocks of {len(chosen)} documents ran in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
