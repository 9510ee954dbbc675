"""What a comparison found, as Markdown: medians, ratios with quartiles, and how far the losses are apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from turns import Arm

BOUNDS = {"bf16": 0.05, "fp32": 0.01}
"""Most that two losses of one step may differ, in nats: from equal weights and batches only rounding differs."""
SPEED, MFU, MEMORY = {"bf16": 1.5, "fp32": 1.0}, 0.5, 0.5
"""Goals: least ratio to the best peer, least MFU, most of the best peer's memory."""
HEAD = (
    "| stack | tokens/s | s a step | CPU-s a step | MFU | peak RSS, GiB | x CPU-s | x wall | loss apart | steps |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


@dataclass
class Cell:
    """One job in one number format on one number of threads and ranks."""

    job: str
    dtype: str
    threads: int
    ranks: int
    tokens: int
    """Of an optimizer step."""
    flops: float
    """Model FLOPs of an optimizer step."""
    peak: float = 0.0
    """FLOP/s of a data sheet; 0: what the ceiling's arm reaches in the same run."""
    absent: dict[str, str] = field(default_factory=dict)
    """Who could not take part, and why."""

    @property
    def name(self) -> str:
        places = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.job} {self.dtype}, " + (f"{self.ranks} ranks of {places}" if self.ranks > 1 else places)


def median(values: list[float]) -> float:
    """The middle value, or the mean of the middle two."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def ratios(arm: Arm, ours: Arm, key: str) -> list[float]:
    """Of each round, how many times ours the arm's figure is, rising."""
    return sorted(theirs / mine for theirs, mine in zip(arm.counted(key), ours.counted(key)))


def spread(found: list[float]) -> str:
    """Median and quartiles."""
    return f"{median(found):.2f} ({found[len(found) // 4]:.2f}-{found[3 * len(found) // 4]:.2f})"


def apart(arm: Arm, ours: Arm) -> float:
    """Largest difference of the losses of one step, warm-up included."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(arm.turns, ours.turns))


def judge(cell: Cell, ours: Arm, peers: list[Arm]) -> tuple[list[Arm], list[str]]:
    """The peers whose losses track, and a line for what does not; without anyone to compare with there is no speed."""
    bound, lines = BOUNDS[cell.dtype], []
    tracking = [peer for peer in peers if apart(peer, ours) <= bound]
    for peer in peers:
        if peer not in tracking:
            lines.append(f"{peer.name}: losses are {apart(peer, ours):.3g} apart, more than {bound}: no speed.")
    fall = ours.turns[0]["loss"] - ours.turns[-1]["loss"]
    if not fall > bound:
        lines.append(f"the loss fell by {fall:.3g}, no more than {bound}: equal losses would show nothing, no speed.")
        tracking = []
    if not peers:
        lines.append("no peer took part: no losses to compare, no speed.")
    return tracking, lines


def rows(cell: Cell, ours: Arm, peers: list[Arm], ceiling: Arm | None) -> list[str]:
    """The table's lines."""
    rate, clock = (cell.peak, "wall") if ceiling is None else (median(ceiling.counted("rate_cpu")), "cpu")
    made = list(HEAD)
    for arm in [ours, *peers]:
        wall = median(arm.counted("wall"))
        cells = [arm.name, f"{cell.tokens / wall:,.0f}", f"{wall:.3f}", f"{median(arm.counted('cpu')):.3f}"]
        cells.append(f"{cell.flops / median(arm.counted(clock)) / rate:.0%}" if rate else "-")
        cells.append(f"{max(arm.counted('peak')) / 2**30:.2f}")
        cells += ["1", "1", "-"] if arm is ours else [
            spread(ratios(arm, ours, "cpu")), spread(ratios(arm, ours, "wall")), f"{apart(arm, ours):.1g}",
        ]  # fmt: skip
        made.append(f"| {' | '.join([*cells, str(len(arm.counted('wall')))])} |")
    if ceiling is not None:
        cpu, wall, best = (median(ceiling.counted(key)) / 1e9 for key in ("rate_cpu", "rate_wall", "fastest"))
        told = f"Ceiling, the blocks' products together: {cpu:.0f} GFLOP a CPU-s ({wall:.0f} GFLOP/s)"
        made += ["", f"{told}; the fastest of them {best:.0f}."]
    if peers:
        made += ["", goals(cell, ours, peers, rate, clock)]
    return made


def goals(cell: Cell, ours: Arm, peers: list[Arm], rate: float, clock: str) -> str:
    """The goals against the best peer, as they came out."""

    def verdict(met: bool) -> str:
        return "reached" if met else "missed"

    best = min(peers, key=lambda arm: median(arm.counted(clock)))
    fastest, goal = median(ratios(best, ours, clock)), SPEED[cell.dtype]
    memory = max(ours.counted("peak")) / max(best.counted("peak"))
    told = [f"{fastest:.2f} x {best.name}, the best peer (goal {goal}: {verdict(fastest >= goal)})"]
    if rate and cell.dtype == "bf16":
        mfu = cell.flops / median(ours.counted(clock)) / rate
        told.append(f"MFU {mfu:.0%} (goal {MFU:.0%}: {verdict(mfu >= MFU)})")
    told.append(f"{memory:.2f} of its memory (goal {MEMORY}: {verdict(memory <= MEMORY)})")
    return "; ".join(told) + "."
