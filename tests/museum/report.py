"""The museum as a table: ``python -m tests.museum.report [--write]`` prints it, or puts it into docs/museum.md."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.museum.exhibits import EXHIBITS
from tests.museum.table import ALL, OF_KERNELS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "museum.md"
START, END = "<!-- museum -->\n", "<!-- end of museum -->"


def table() -> str:
    """Counts, exhibits with their mutants, and exhibits without one with the reason."""
    shown = [exhibit for exhibit in EXHIBITS if exhibit.mutants]
    used = {name for exhibit in EXHIBITS for name in exhibit.mutants}
    others = [mutant for mutant in ALL if mutant.name not in used and mutant not in OF_KERNELS]
    lines = [
        f"{len(EXHIBITS)} exhibits, {len(shown)} with a mutant; {len(ALL)} mutants, "
        f"of which {len(OF_KERNELS)} are of kernels and {len(others)} stand for no exhibit.",
        "",
        "| | bug | mutants |",
        "|---|---|---|",
    ]
    for exhibit in shown:
        names = ", ".join(f"`{name}`" for name in exhibit.mutants)
        lines.append(f"| B{exhibit.number:02d} | {exhibit.bug} | {names} |")
    lines += ["", "| | bug | why it has no mutant |", "|---|---|---|"]
    lines += [f"| B{e.number:02d} | {e.bug} | {e.later} |" for e in EXHIBITS if not e.mutants]
    lines += ["", "| other mutants | what they re-create |", "|---|---|"]
    lines += [f"| `{mutant.name}` | {mutant.note} |" for mutant in (*others, *OF_KERNELS)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Print the table, or write it into the docs."""
    if "--write" not in arguments:
        print(table())
        return 0
    text = DOCS.read_text()
    before, rest = text.split(START)
    DOCS.write_text(before + START + table() + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
