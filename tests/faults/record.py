"""Keep what a series found in docs/operations.md: ``python -m tests.faults.record LOG...``, LOG being what it printed.

Of each row that held the largest count stays; a row that failed is for whoever ran it to look into, and is not kept.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs" / "operations.md"
PRINTED = re.compile(r"^\| (\w+) +\| .* \| +(\d+)/(\d+) \| +\d+ \| (.*) \|$", re.MULTILINE)
KEPT = re.compile(r"^\| (\w+) \| ([\d,]+) of ([\d,]+) \| (.*) \|$", re.MULTILINE)


def record(text: str, logs: list[str]) -> str:
    """``text`` with the rows of ``logs`` in the table of what was done."""
    best = {name: (int(done.replace(",", "")), note) for name, done, _, note in KEPT.findall(text)}
    for log in logs:
        for name, done, _, note in PRINTED.findall(log):
            if name in best and int(done) >= best[name][0]:
                best[name] = (int(done), note)
    return KEPT.sub(lambda row: f"| {row[1]} | {best[row[1]][0]:,} of {row[3]} | {best[row[1]][1]} |", text)


if __name__ == "__main__":
    TABLE.write_text(record(TABLE.read_text(), [Path(name).read_text() for name in sys.argv[1:]]))
