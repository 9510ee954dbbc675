"""The page of a plan in headless Chromium (Debian's package ``chromium``): it renders, and says nothing is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megapre import cli

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
JOB = str(Path(__file__).parents[2] / "examples" / "llama_8b.toml")
PROBE = """<script>
const errors = [];
window.addEventListener("error", e => errors.push(String(e.message)));
for (const name of ["error", "warn"]) { console[name] = (...words) => errors.push(words.join(" ")); }
window.addEventListener("load", () => setTimeout(() => {
  const charts = [...document.querySelectorAll(".plotly-graph-div")].map(c => c.getBoundingClientRect());
  const told = {errors, width: innerWidth, scroll: document.documentElement.scrollWidth,
    drawn: document.querySelectorAll(".plotly-graph-div .main-svg").length > 0,
    charts: charts.map(c => [Math.round(c.left), Math.round(c.right), Math.round(c.height)]),
    font: parseFloat(getComputedStyle(document.body).fontSize)};
  const node = document.createElement("pre"); node.id = "told"; node.textContent = JSON.stringify(told);
  document.body.appendChild(node);
}, 1500));
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    grid = ["parallel.tensor=4", "parallel.pipeline=4", "parallel.data=1", "--gpus", "16"]
    assert cli.main(["plan", JOB, *grid, "--html", str(path)]) == 0
    path.write_text(path.read_text().replace("<head>", "<head>" + PROBE, 1))
    return path


@pytest.mark.nightly
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="plotly is the extra 'plan'")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_renders_without_errors(page: Path, width: int, tmp_path: Path) -> None:
    # Headless Chromium has windows of at least 500 pixels, so the page stands in a frame of the wanted width.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:2000px" src="{page.as_uri()}"></iframe>'
        '<pre id="got"></pre>'
        "<script>setInterval(() => { const t = document.getElementById('f').contentDocument.getElementById('told');"
        "if (t) document.getElementById('got').textContent = t.textContent; }, 100)</script>"
    )
    done = subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={max(1320, width)},2200",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=20000",
         "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    found = re.search(r'<pre id="got">(\{.*?\})</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    told = json.loads(found[1])
    assert told["errors"] == [] and told["drawn"] and told["width"] == width
    assert told["scroll"] <= width, "the page is wider than the window"
    assert len(told["charts"]) == 3 and told["font"] >= 14
    for left, right, height in told["charts"]:
        assert 0 <= left < right <= width and height >= 300
