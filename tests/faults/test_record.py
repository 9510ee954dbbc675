"""What a series printed reaches the table of docs/operations.md: the largest count that held, nothing that failed."""

from __future__ import annotations

from tests.faults.record import KEPT, TABLE, record
from tests.faults.series import LINE, ROWS

BEFORE = "| row | done | found |\n|---|---|---|\n| kills | 30 of 200 | alike |\n| damage | 9,000 of 10,000 | none |\n"


def printed(name: str, held: object, count: int, note: str) -> str:
    return LINE.format(name, "some | text", f"{held}/{count}", "7", note)


def test_the_largest_count_that_held_is_kept() -> None:
    logs = [printed("kills", 50, 50, "same"), printed("kills", 10, 10, "x"), printed("damage", "not", 9_999, "FAILED")]
    after = record(BEFORE, logs)
    assert after == BEFORE.replace("30 of 200 | alike", "50 of 200 | same")
    assert record(after, [printed("damage", 9_500, 9_500, "few")]) == after.replace(
        "9,000 of 10,000 | none", "9,500 of 10,000 | few"
    )


def test_the_documents_table_has_every_row_and_its_full_count() -> None:
    kept = {name: full for name, _, full, _ in KEPT.findall(TABLE.read_text())}
    assert kept == {row.name: f"{row.full:,}" for row in ROWS}
