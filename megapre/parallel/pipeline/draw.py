"""A picture of a schedule: one row per rank, one box per action, as SVG text."""

from __future__ import annotations

from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, WEIGHT
from megapre.parallel.pipeline.simulate import Prediction

COLOURS = {FORWARD: ("#3b6fb6", "#9cc0ee"), BACKWARD: ("#2f8f5b", "#9bdcb8"), WEIGHT: ("#c98a1b", "#f0d08c")}
"""Of a rank's first stage and of its later ones."""
ROW, UNIT, LEFT = 26, 22, 64


def timeline(prediction: Prediction, title: str) -> str:
    """SVG of ``prediction``; boxes carry microbatch numbers, time runs to the right in the unit of its costs."""
    ranks = len(prediction.spans)
    width = LEFT + round(prediction.time * UNIT) + 10
    height = 34 + ranks * ROW + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13">{title}: {prediction.time:g} units, '
        f"bubble {prediction.bubble:.1%}</text>",
    ]
    for rank, spans in enumerate(prediction.spans):
        y = 34 + rank * ROW
        first = min((action.stage for _, _, action in spans), default=0)
        held = prediction.in_flight[rank]
        parts.append(f'<text x="6" y="{y + 16}">rank {rank} ({held})</text>')
        for start, end, action in spans:
            dark, light = COLOURS[action.kind]
            fill, ink = (dark, "white") if action.stage == first else (light, "black")
            x, w = LEFT + start * UNIT, (end - start) * UNIT
            parts.append(
                f'<rect x="{x:g}" y="{y}" width="{w:g}" height="{ROW - 4}" fill="{fill}" stroke="white"/>'
                f'<text x="{x + w / 2:g}" y="{y + 15}" text-anchor="middle" fill="{ink}">{action.microbatch}</text>'
            )
    legend = "blue F, green B, amber W; light: a rank's later stages; in brackets: most microbatch-stages held"
    parts.append(f'<text x="6" y="{height - 8}" fill="#555">{legend}</text></svg>')
    return "\n".join(parts)
