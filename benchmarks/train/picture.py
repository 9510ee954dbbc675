"""One step of a rank as a picture: its phases in one lane, every collective under way in lanes below them (SVG)."""

from __future__ import annotations

import html
from typing import Any

COLOURS = {
    "embedding": "#9c6b4e", "blocks forward": "#6cc5b0", "head and loss": "#ff8ab7", "backward": "#4269d0",
    "norm and clip": "#efb118", "optimizer": "#ff725c", "data": "#97bbf5", "wait": "#d0d0d0",
}  # fmt: skip
WIDTH, LEFT, LANE, TOP = 1000, 170, 26, 44


def draw(seen: dict[str, Any]) -> str:
    """The timed step of median length of a profile (``phases_N.json``)."""
    turns = seen["turns"]
    step = sorted(range(len(turns) - 1), key=lambda n: turns[n + 1] - turns[n])[(len(turns) - 1) // 2]
    begin, end = turns[step], turns[step + 1]
    scale = (WIDTH - LEFT - 10) / (end - begin)
    names = list(dict.fromkeys(m[0] for m in seen["messages"] if m[3] > begin and m[2] < end and m[1] > 4096))
    height = TOP + LANE * (1 + len(names)) + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="18">One step of rank {seen["rank"]}: {1e3 * (end - begin):.0f} ms</text>',
    ]

    def bar(lane: int, since: float, until: float, colour: str, told: str, inset: int = 0) -> None:
        a, b = max(since, begin), min(until, end)
        if b > a:
            parts.append(
                f'<rect x="{LEFT + (a - begin) * scale:.2f}" y="{TOP + lane * LANE + inset}" '
                f'width="{max(0.4, (b - a) * scale):.2f}" height="{LANE - 6 - 2 * inset}" fill="{colour}">'
                f"<title>{html.escape(told)}: {1e3 * (until - since):.2f} ms</title></rect>"
            )

    for lane, label in enumerate(["this rank", *names]):
        parts.append(f'<text x="8" y="{TOP + lane * LANE + 15}">{html.escape(label)}</text>')
    for name, since, until in seen["spans"]:  # in the order in which they began: inner ones lie on outer ones
        colour = COLOURS.get("wait" if name.startswith("wait") else name)
        if colour:
            bar(0, since, until, colour, name)
    for name, nbytes, since, until in seen["messages"]:
        if name in names:
            bar(1 + names.index(name), since, until, "#3ca951", f"{name}, {nbytes / 2**20:.2f} MiB", 2)
    at = LEFT
    for name, colour in COLOURS.items():
        parts.append(f'<rect x="{at}" y="{height - 26}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{at + 16}" y="{height - 16}">{name}</text>')
        at += 30 + 7 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"
