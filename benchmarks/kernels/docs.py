"""Tables of docs/kernels.md, each between a comment that names its script and the comment that ends it."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
END = "<!-- end of the table -->"


def write(script: str, table: str) -> None:
    """Put ``table`` where the page has the table of ``script``."""
    begin = f"<!-- {script} -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}")
