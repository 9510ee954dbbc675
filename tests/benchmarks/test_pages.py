"""What the benchmarks of training write: places on the pages, the pipeline's bound, the picture of a step."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
TRAIN = Path(__file__).parents[2] / "benchmarks" / "train"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's scripts import one another by name."""
    monkeypatch.syspath_prepend(str(TRAIN))


@pytest.mark.parametrize("page", ["performance.md", "gpu_results.md"])
def test_every_table_has_one_place_and_an_end(page: str) -> None:
    text = (DOCS / page).read_text()
    names = re.findall(r"<!-- (benchmarks/.*?) -->", text)
    assert len(names) == len(set(names)) == text.count("<!-- end of the table -->") > 2
    for name in names:
        assert (TRAIN.parents[1] / name.split()[0]).exists()


def test_a_section_is_written_in_its_place(tmp_path: Path) -> None:
    from benchmarks.kernels import docs

    page = tmp_path / "page.md"
    page.write_text(f"a\n<!-- x 1 -->\nold\n{docs.END}\nb\n<!-- x 2 -->\nother\n{docs.END}\nc\n")
    docs.write("x 1", "new", page)
    assert page.read_text() == f"a\n<!-- x 1 -->\nnew\n{docs.END}\nb\n<!-- x 2 -->\nother\n{docs.END}\nc\n"


def profile_of(rank: int, forward: float, backward: float, head: float = 0.0) -> dict:
    phases = {"blocks forward": forward, "backward": backward, "head and loss": head, "optimizer": 0.5}
    return {
        "rank": rank, "turns": [0.0, 10.0], "spans": [["backward", 0.0, 8.0], ["blocks forward", 1.0, 3.0]],
        "messages": [["data reduce_scatter", 1 << 20, 4.0, 6.0], ["host all_reduce", 24, 0.0, 1.0]],
        "phases": {name: {"cpu": seconds} for name, seconds in phases.items()},
        "collectives": {"data reduce_scatter": {"bytes": 1 << 20, "under_way": 2.0, "waited": 0.5}},
    }  # fmt: skip


def test_the_bound_of_a_pipeline_is_the_simulators() -> None:
    """Two equal stages, four microbatches, 1F1B: (4 + 1) x (F + B), and the optimizer."""
    import scaling

    from megapre.config.schema import Config, ParallelConfig, TrainConfig

    config = Config(parallel=ParallelConfig(pipeline=2, data=1), train=TrainConfig(global_batch=8, microbatch=2))
    seen = [profile_of(0, 4.0, 8.0), profile_of(1, 4.0, 6.0, head=2.0)]
    assert scaling.bound(config, seen) == pytest.approx(5 * 3.0 + 0.5)
    assert scaling.hidden(seen[0], "data reduce_scatter") == 0.75
    assert scaling.hidden(seen[0], "data all_gather") == 0.0


def test_the_picture_of_a_step_is_a_picture() -> None:
    import picture

    drawn = ET.fromstring(picture.draw(profile_of(0, 1.0, 1.0)))
    told = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert told == ["backward: 8000.00 ms", "blocks forward: 2000.00 ms", "data reduce_scatter, 1.00 MiB: 2000.00 ms"]


def test_overhead_is_the_tiny_runs_time_over_the_jobs() -> None:
    import components

    seen = {"cpu": 2.0, "phases": {"backward": {"cpu": 2.0}}, "ops": [{"name": "aten::mm", "calls": 3, "seconds": 1.0}]}
    text = components.section("J1", "bf16", seen, {"cpu": 0.03})
    assert "at most 30.0 ms, 1.5% of the step (goal below 3%: reached)" in text
    assert "(goal below 3%: missed)" in components.section("J1", "bf16", seen, {"cpu": 0.07})


@pytest.mark.nightly
@pytest.mark.parametrize("script", ["scaling.py", "components.py"])
def test_a_script_runs_in_small(script: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, TRAIN / script, "--quick", "--jobs", "J2", "--work", tmp_path]
    command += ["--steps", "3"] if script == "scaling.py" else []
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    if script == "scaling.py":
        rows = re.findall(r"\| \S.* \| (\S+ \S+) \| ([\d.]+) \| ([\d.]+) \| \d+% \|", done.stdout)
        assert len(rows) == 7
        for operation, size, closed in rows:
            padded = 1.05 if operation.startswith("data") else 1.0
            assert float(closed) <= float(size) * 1.01 and float(size) <= float(closed) * padded + 0.002, operation
        assert "the simulator's bound is" in done.stdout
    else:
        assert "Outside kernels: at most" in done.stdout


def test_memory_by_kind_adds_up_to_what_is_resident() -> None:
    import memory

    living = {"weights": 2 << 30, "gradients": 4 << 30, "optimizer": 12 << 30, "activations": 1 << 29, "logits": 0}
    text = memory.table("J1", "bf16", 2, living, 1 << 30, 1 << 28, 20 << 30)
    sizes = [float(line.split("|")[2]) for line in text.splitlines() if line[:2] == "| " and "GiB" not in line]
    assert sizes == [0.25, 2.0, 4.0, 12.0, 0.5, 1.25, 20.0] and "its copies: 12.00 GiB more" in text
