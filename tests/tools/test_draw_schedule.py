"""The picture holds every action, and a shape that no schedule has is refused."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools.draw_schedule import main


@pytest.mark.parametrize(("schedule", "boxes"), [("1f1b", 2 * 3 * 6), ("interleaved", 2 * 6 * 6), ("zb-v", 3 * 6 * 6)])
def test_every_action_is_a_box(schedule: str, boxes: int, tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    assert main(["--schedule", schedule, "--pipeline", "3", "--microbatches", "6", "--output", str(path)]) == 0
    rows = ElementTree.parse(path).getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(rows) == boxes + 1  # and the background


def test_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--schedule", "interleaved", "--microbatches", "6", "--output", str(tmp_path / "x.svg")])
    assert code == 2 and "multiple of the ranks" in capsys.readouterr().err
