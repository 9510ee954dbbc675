"""One self-contained HTML page of a plan: memory by rank and kind, the pipeline's timeline, the step's time, layouts.

Charts are plotly's (``pip install megapre[plan]``), with its script inside the page: nothing is loaded from elsewhere.
"""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapre.config.check import ConfigError
from megapre.planner.constants import Constants
from megapre.planner.explain import Assumption, bound
from megapre.planner.job import Job
from megapre.planner.memory import GIB, KINDS, memory
from megapre.planner.pipeline import Costs, run
from megapre.planner.search import Candidate
from megapre.planner.timing import Time, predict

COLOURS = {
    "weights": "#4269d0", "gradients": "#efb118", "optimizer": "#ff725c", "activations": "#6cc5b0",
    "logits": "#3ca951", "buffers": "#ff8ab7", "allocator": "#9c6b4e",
}  # fmt: skip
ACTIONS = {"F": ("forward", "#6cc5b0"), "B": ("backward", "#4269d0"), "W": ("weight gradients", "#efb118")}
SHOWN = 16
"""Pipeline ranks and microbatches that a chart shows at most."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; color: #1b1e23; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; white-space: normal; }
.chart { width: 100%; height: 380px; }
"""


def write(
    path: Path, title: str, job: Job, time: Time, constants: Constants, rows: Sequence[tuple[str, str]],
    assumed: Sequence[Assumption], candidates: Sequence[Candidate],
) -> None:  # fmt: skip
    """Write the page. ``rows``: the table of results. Raises `ConfigError` without plotly."""
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError("--html needs plotly, which is not installed: pip install megapre[plan]")
    from plotly.offline import get_plotlyjs

    charts = [
        ("Memory of each pipeline rank", memory_chart(job)),
        ("Time of a step", time_chart(time)),
        ("Timeline of the pipeline", timeline_chart(job, constants)),
        ("Layouts: time against memory", layout_chart(candidates)),
    ]
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>The step is {html.escape(bound(time))}.</p>", _table(rows)]
    for name, figure in charts:
        if figure is not None:
            body += [f"<h2>{name}</h2>", _chart(figure)]
    if assumed:
        shown = [(f"{a.name}: {a.value}", f"{a.answers} ({a.span})") for a in assumed]
        body += ["<h2>Assumed, with the steps that the alternatives give</h2>", _table(shown)]
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n'
        f"<body>\n{''.join(body)}\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f'<div class="scroll"><table>{cells}</table></div>\n'


def _chart(figure: Any) -> str:
    settings = {"responsive": True, "displaylogo": False}
    drawn: str = figure.to_html(full_html=False, include_plotlyjs=False, default_height="380px", config=settings)
    return drawn + "\n"


def _figure(title: str, **layout: Any) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="plotly_white", margin={"l": 48, "r": 12, "t": 12, "b": 48}, yaxis_title=title,
        legend={"orientation": "h", "y": -0.25}, **layout,
    )  # fmt: skip
    return figure


def memory_chart(job: Job) -> Any:
    """Stacked bars, one per pipeline rank."""
    ranks = list(range(min(job.layout.pipeline, SHOWN)))
    found = [memory(job, rank).kinds() for rank in ranks]
    figure = _figure("GiB", barmode="stack", xaxis_title="pipeline rank")
    for kind in KINDS:
        sizes = [kinds[kind] / GIB for kinds in found]
        if max(sizes) > 0:
            figure.add_bar(name=kind, x=[str(rank) for rank in ranks], y=sizes, marker_color=COLOURS[kind])
    if job.device.kind == "gpu":
        figure.add_hline(y=job.device.memory / GIB, line_dash="dash", annotation_text=job.device.name)
    return figure


def time_chart(time: Time) -> Any:
    """One bar per cause."""
    parts = {name: size for name, size in time.parts().items() if size > 0}
    figure = _figure("", xaxis_title="seconds", showlegend=False)
    figure.add_bar(x=list(parts.values()), y=list(parts), orientation="h", marker_color="#4269d0")
    figure.update_yaxes(autorange="reversed")
    return figure


def timeline_chart(job: Job, constants: Constants) -> Any:
    """Every rank's actions; None without a pipeline."""
    if job.layout.pipeline == 1:
        return None
    seen: list[Costs] = []

    def catch(job: Job, costs: Costs) -> float:
        seen.append(costs)
        return 1.0

    predict(job, constants, catch)
    layout = job.layout
    rounds = layout.pipeline if layout.schedule == "interleaved" else 1
    count = min(layout.microbatches, max(rounds, SHOWN // rounds * rounds))
    made = run(layout, seen[0], count)
    figure = _figure("pipeline rank", barmode="overlay", xaxis_title=f"seconds, first {count} microbatches")
    for kind, (name, colour) in ACTIONS.items():
        spans = [
            (rank, start, end, action)
            for rank, row in enumerate(made.spans[:SHOWN])
            for start, end, action in row
            if action.kind == kind
        ]
        if spans:
            figure.add_bar(
                name=name, orientation="h", y=[rank for rank, *_ in spans], base=[start for _, start, *_ in spans],
                x=[end - start for _, start, end, _ in spans], marker_color=colour, marker_line_width=0.5,
                marker_line_color="white", hovertext=[f"stage {a.stage}, microbatch {a.microbatch}" for *_, a in spans],
            )  # fmt: skip
    figure.update_yaxes(autorange="reversed", dtick=1)
    return figure


def layout_chart(candidates: Sequence[Candidate]) -> Any:
    """Step time against memory of the best layouts; None without a search."""
    if not candidates:
        return None
    figure = _figure("seconds a step", xaxis_title="GiB of the fullest rank", showlegend=False)
    figure.add_scatter(
        mode="markers", x=[c.memory.total / GIB for c in candidates], y=[c.time.step for c in candidates],
        text=[
            f"tensor {c.job.layout.tensor}, pipeline {c.job.layout.pipeline} {c.job.layout.schedule}, data "
            f"{c.job.layout.data}, microbatch {c.job.layout.microbatch}, recompute {c.job.layout.recompute}"
            for c in candidates
        ], marker={"size": 10, "color": "#4269d0"},
    )  # fmt: skip
    return figure
