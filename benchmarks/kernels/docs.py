"""Tables of docs/kernels.md and other pages, each between a comment that names its script and one that ends it."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
END = "<!-- end of the table -->"


def write(script: str, table: str, page: Path = PAGE) -> None:
    """Put ``table`` where ``page`` has the table of ``script``."""
    begin = f"<!-- {script} -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}")
