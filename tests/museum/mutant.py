"""What a seeded bug is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """Replace ``old`` by ``new`` once in ``file``; then ``test`` must fail, each of them where there are several.

    A test is a pytest id, or a file of which one test must fail.
    """

    name: str
    file: str
    old: str
    new: str
    test: str | tuple[str, ...]
    note: str

    @property
    def tests(self) -> tuple[str, ...]:
        """All that must fail."""
        return (self.test,) if isinstance(self.test, str) else self.test
