"""``megapre plan``: what it prints, writes and refuses; search, scaling laws and the page."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megapre import cli
from megapre.config.check import ConfigError, check
from megapre.config.load import load
from megapre.planner import hardware, scaling
from megapre.planner.constants import load as load_constants
from megapre.planner.memory import fullest
from megapre.planner.search import search

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA_8B, LLAMA_70B = str(EXAMPLES / "llama_8b.toml"), str(EXAMPLES / "llama_70b.toml")


def plan(*arguments: str) -> int:
    return cli.main(["plan", *arguments])


def test_planner_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['megapre']; from megapre import cli; "
        f"code = cli.main(['plan', {LLAMA_8B!r}, '--json']); assert code == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_json_holds_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(LLAMA_8B, "--gpus", "64", "--tokens", "1e12", "--price", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == 64 and 8.0e9 < found["parameters"] < 8.1e9
    assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"])
    assert 0.2 < found["mfu"] < 0.7
    assert {"attention kernel", "price"} <= {entry["name"] for entry in found["assumed"]}
    assert found["dollars"] == pytest.approx(found["days"] * 24 * 64 * 2)
    for kinds in found["memory"].values():
        assert sum(size for kind, size in kinds.items() if kind != "sum") == pytest.approx(kinds["sum"])


def test_the_tables_name_every_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(LLAMA_8B, "--scaling") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("memory, GiB", "tokens per day", "The step is bound by", "assumed", "price", "Kaplan", "Chinchilla"):
        assert words in shown, words


REFUSED = (
    (["--gpu", "h1000"], "h100"),
    (["--gpus", "63"], "63"),
    (["--gpus", "8", "--search", "model.layers=400"], "no layout on 8 x H100"),
    (["parallel.tensor=1", "parallel.data=64", "train.microbatch=8"], "this does not fit"),
    (["model.vocab_size=0"], "model.vocab_size"),
    (["model.share_layers=true"], "it does not know model.share_layers"),
    (["model.embedding_size=256"], "it does not know model.embedding_size"),
    (["--gpu", "cpu", "--search"], "not of"),
    (["--runs", "nowhere"], "nowhere"),
    (["--tokens", "-1"], "--tokens"),
    (["--gpu", "missing.toml"], "missing.toml"),
)


@pytest.mark.parametrize(("arguments", "part"), REFUSED)
def test_bad_input_is_one_sentence_and_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(LLAMA_8B, *arguments) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1, error


def test_what_does_not_fit_is_refused_with_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(LLAMA_70B, "--gpus", "8", "parallel.tensor=8", "parallel.pipeline=1", "parallel.data=1",
                "parallel.chunks=1", "parallel.schedule=1f1b", "train.global_batch=8") == 2  # fmt: skip
    error = capsys.readouterr().err
    terms, total = re.search(r"needs (.*) = ([\d.]+) GiB", error).groups()  # type: ignore[union-attr]
    assert sum(float(term.split()[0]) for term in terms.split(" + ")) == pytest.approx(float(total), abs=0.4)


def test_search_returns_jobs_that_fit_and_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, device = load(LLAMA_8B), hardware.load("h100")
    found = search(config, device, 16, 128256, load_constants())
    steps = [entry.time.step for entry in found.best]
    assert steps == sorted(steps) and len(steps) > 3 and found.fitting >= len(steps)
    for entry in found.best:
        assert check(entry.config, 16) == entry.config
        assert fullest(entry.job).total <= device.memory
    best = tmp_path / "best.toml"
    assert plan(LLAMA_8B, "--gpus", "16", "--search", "--write", str(best)) == 0
    assert load(best).parallel == found.best[0].config.parallel
    assert plan(str(best), "--gpus", "16", "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.rindex('{"gpus"') :])["step_seconds"] == pytest.approx(steps[0])


def test_profiles_have_a_source_for_every_figure(tmp_path: Path) -> None:
    for name in hardware.names():
        device = hardware.load(name)
        assert device.sources and all(device.best[dtype] <= device.peak[dtype] for dtype in device.best), name
    text = (hardware.FOLDER / "h100.toml").read_text()
    for broken, part in (
        (text.replace("\nnic = \"", "\nnik = \""), "no entry for nic"),
        (text.replace("watts = 700.0", ""), "watts is missing"),
        (text.replace("[memory]", "[memory"), "not valid TOML"),
    ):  # fmt: skip
        path = tmp_path / "mine.toml"
        path.write_text(broken)
        with pytest.raises(ConfigError, match=part):
            hardware.load(str(path))
    path.write_text(text)
    assert hardware.load(str(path)).nic == 50e9


def test_chinchilla_is_the_papers() -> None:
    """Approach 3 for 5.76e23 FLOPs gives about 40 billion parameters (arXiv 2203.15556, section 3.4)."""
    found = scaling.CHINCHILLA.optimum(5.76e23)
    assert 30e9 < found.parameters < 45e9 and found.parameters * found.tokens * 6 == pytest.approx(5.76e23)
    for factor in (0.8, 1.25):
        other = found.parameters * factor
        assert scaling.CHINCHILLA.loss(other, 5.76e23 / 6 / other) > found.loss
    assert scaling.chinchilla_20(5.76e23).parameters == pytest.approx(69e9, rel=0.02)
    assert scaling.kaplan(scaling.PETAFLOP_DAY).parameters == pytest.approx(1.3e9)


def test_a_law_is_found_again(tmp_path: Path) -> None:
    law = scaling.Law("true", 1.7, 400.0, 600.0, 0.34, 0.30, "")
    sizes = [(n, d) for n in (1e7, 3e7, 1e8, 3e8) for d in (2e8, 1e9, 5e9)]
    points = [scaling.Point(n, d, law.loss(n, d)) for n, d in sizes]
    found = scaling.fit(points)
    for n, d in ((1e9, 2e10), (3e9, 1e11)):
        assert found.loss(n, d) == pytest.approx(law.loss(n, d), rel=0.01)
    with pytest.raises(ConfigError, match="only 4 runs"):
        scaling.fit(points[:4])
    with pytest.raises(ConfigError, match="2 model sizes"):
        scaling.fit([points[0]] * 6)
    (tmp_path / "job.toml").write_text("[train]\nglobal_batch = 4\n[model]\nsequence = 128\n")
    records = [{"step": n, "split": "train", "loss": 5.0 - n / 100} for n in range(1, 101)]
    records += [{"step": 100, "split": "validation", "loss": 9.0}, {"event": "start", "step": 0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    point = scaling.read_run(tmp_path, lambda path: 1e6)
    assert point.tokens == 100 * 4 * 128
    assert point.loss == pytest.approx(np.mean([5.0 - n / 100 for n in range(96, 101)]))


class Tags(HTMLParser):
    """Tags that load something."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.charts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loaded += [str(values[key]) for key in ("src", "href") if values.get(key)]
        self.charts += "plotly-graph-div" in str(values.get("class"))


def test_without_plotly_the_page_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plan(LLAMA_8B, "--html", str(tmp_path / "plan.html")) == 2
    assert "pip install megapre[plan]" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="plotly is the extra 'plan'")
def test_the_page_holds_all_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    assert plan(LLAMA_8B, "--gpus", "16", "--search", "--html", str(path)) == 0
    page, tags = path.read_text(), Tags()
    tags.feed(page)
    assert tags.charts >= 3
    assert [target for target in tags.loaded if not target.startswith("data:")] == []
