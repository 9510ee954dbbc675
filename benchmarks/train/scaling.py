"""What a second rank brings: megapre on two ranks of one thread, against one rank of one thread and of two.

    python benchmarks/train/scaling.py [--jobs J2] [--dtype bf16] [--steps 10] [--write]

The layouts take turns step by step (``turns.py``), so wall time counts and the machine must be otherwise idle: a ratio
is the median of the rounds' ratios. Beside the pipeline stands the simulator's bound: its schedule with what forward
and backward cost each rank in CPU seconds in a run of its own with ``--profile``, and no time for messages; the step
beside it is that run's too. Bytes are those of that run, beside the closed form. ``--write`` puts the table into
docs/performance.md and draws docs/overlap.svg: gradient reduction and parameter gather of data parallelism with ZeRO-1
beside the computation that hides them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

import job  # noqa: E402
import picture  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
from profiles import JOBS, parser, profile, small  # noqa: E402
from turns import Absent, Arm  # noqa: E402

from benchmarks.kernels import docs  # noqa: E402
from megapre.config.schema import Config  # noqa: E402
from megapre.parallel.pipeline.schedules import plans  # noqa: E402
from megapre.parallel.pipeline.simulate import simulate  # noqa: E402
from megapre.resilience.environment import prepare  # noqa: E402

WARMUP = 2
MICROBATCHES = 8
"""Of the pipeline."""
PROFILED = ("data 2", "data 2, ZeRO-1", "tensor 2 + sequence", "pipeline 2")


@dataclass(frozen=True)
class Layout:
    """A way to run the job; ``base`` is the layout of one rank that does the same work in the same pieces."""

    name: str
    overrides: tuple[str, ...]
    ranks: int = 1
    threads: int = 1
    base: str = "1 rank"
    goal: float = 0.0


def layouts(config: Config) -> list[Layout]:
    train = config.train
    half, eighth = train.global_batch // 2, max(1, train.global_batch // MICROBATCHES)
    micro = f"train.microbatch={min(train.microbatch, half)}"
    stages = {"J1": [5, 1], "J2": [6, 2]}.get(Path(train.run_dir).name.upper(), [])
    split = [config.model.layers - 1, 1] if sum(stages) != config.model.layers else stages
    pipeline = (
        "parallel.pipeline=2", f"parallel.layers_per_stage={split}".replace(" ", ""), f"train.microbatch={eighth}"
    )  # fmt: skip
    return [
        Layout("1 rank", ()),
        Layout("1 rank of 2 threads", (), threads=2),
        Layout("data 2", ("parallel.data=2", micro), 2, goal=1.85),
        Layout("data 2, ZeRO-1", ("parallel.data=2", "parallel.zero=1", micro), 2, goal=1.85),
        Layout("tensor 2 + sequence", ("parallel.tensor=2", "parallel.sequence=true"), 2, goal=1.7),
        Layout("1 rank, small microbatches", (f"train.microbatch={eighth}",)),
        Layout("pipeline 2", pipeline, 2, base="1 rank, small microbatches"),
    ]


def time_layouts(
    path: Path, config: Config, overrides: list[str], chosen: list[Layout], work: Path, steps: int
) -> tuple[dict[str, Arm], list[str]]:
    """Every layout's turns, and a line for what failed."""
    logs = work / f"scaling-{path.stem}"
    logs.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Arm] = {}
    absent = []
    try:
        for layout in chosen:
            env = dict(os.environ)
            prepare(env, layout.threads, single_host=True)
            mine = [*overrides, *layout.overrides, f"train.threads={layout.threads}"]
            mine += [f'data.paths=["{config.data.paths[0]}"]', f"train.run_dir={logs / layout.name.replace(' ', '-')}"]
            command = [sys.executable, str(HERE / "ours.py"), str(path), *mine]
            try:
                arms[layout.name] = Arm(
                    layout.name, command, env, logs / f"{layout.name}.log", layout.ranks, run.port()
                )
            except Absent as why:
                absent.append(f"{layout.name}: {why}")
        for index in range(WARMUP + steps):
            names = list(arms)
            for name in names[index % len(names) :] + names[: index % len(names)]:
                arms[name].turn(reset=index == WARMUP, counted=index >= WARMUP)
    finally:
        for arm in arms.values():
            arm.close()
    return arms, absent


def bound(config: Config, seen: list[dict[str, Any]]) -> float:
    """Seconds of the fastest step that the schedule allows, from each rank's own CPU seconds."""
    count = config.train.global_batch // config.train.microbatch
    forward, backward, rest = [], [], []
    for rank in seen:
        phases = {name: phase["cpu"] for name, phase in rank["phases"].items()}
        forward.append((phases.get("embedding", 0.0) + phases.get("blocks forward", 0.0)) / count)
        backward.append((phases.get("head and loss", 0.0) + phases["backward"]) / count)
        rest.append(phases.get("norm and clip", 0.0) + phases.get("optimizer", 0.0))
    made = simulate(plans(config.parallel.schedule, len(seen), 1, count), forward, backward)
    return made.time + max(rest)


def wire(config: Config, seen: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(operation, bytes of a step on rank 0, bytes of the closed form)."""
    model, train, parallel = config.model, config.train, config.parallel
    found = {name: kind["bytes"] for name, kind in seen[0]["collectives"].items()}
    width = 2 if config.precision.dtype == "bf16" else 4
    activation = model.sequence * train.microbatch * model.hidden * width
    count = train.global_batch // (train.microbatch * parallel.data)
    parameters = job.parameters(config)
    expected: dict[str, float] = {}
    if parallel.data > 1 and parallel.zero == 0:
        expected = {"data all_reduce": 4.0 * parameters}
    elif parallel.data > 1:
        expected = {"data reduce_scatter": 4.0 * parameters, "data all_gather": float(width * parameters)}
    elif parallel.tensor > 1:
        expected = {
            "tensor reduce_scatter": count * (4.0 * model.layers + 2) * activation,
            "tensor all_gather": count * (6.0 * model.layers + 2) * activation,
        }
    elif parallel.pipeline > 1:
        expected = {"pipeline send": float(count * activation), "backward recv": float(count * activation)}
    return [(name, found.get(name, 0.0), size) for name, size in expected.items()]


def hidden(seen: dict[str, Any], kind: str) -> float:
    """Share of a collective's time under way in which its rank did not wait for it."""
    found = seen["collectives"].get(kind)
    return 1 - min(1.0, found["waited"] / found["under_way"]) if found and found["under_way"] else 0.0


def report(
    config: Config, name: str, dtype: str, chosen: list[Layout], arms: dict[str, Arm],
    seen: dict[str, tuple[Config, list[dict[str, Any]]]],
) -> list[str]:  # fmt: skip
    """The section of the page."""
    tokens = config.train.global_batch * config.model.sequence
    lines = [f"**{name} {dtype}**", "", "| layout | tokens/s | s a step | x 1 rank | x 1 rank of 2 threads | goal |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for layout in chosen:
        if layout.name not in arms:
            continue
        arm, wall = arms[layout.name], table.median(arms[layout.name].counted("wall"))
        pairs = [table.ratios(arms[x], arm, "wall") for x in (layout.base, "1 rank of 2 threads") if x in arms]
        goal = "-"
        if layout.goal and pairs:
            goal = f"{layout.goal} {'reached' if table.median(pairs[0]) >= layout.goal else 'missed'}"
        shown = " | ".join(map(table.spread, pairs))
        lines.append(f"| {layout.name} | {tokens / wall:,.0f} | {wall:.3f} | {shown} | {goal} |")
    if "pipeline 2" in seen and "pipeline 2" in arms:
        least, wall = bound(*seen["pipeline 2"]), max(rank["wall"] for rank in seen["pipeline 2"][1])
        split = seen["pipeline 2"][0].parallel.layers_per_stage
        verdict = "reached" if least / wall >= 0.95 else "missed"
        lines += ["", f"Pipeline of {split} blocks, 1F1B, {MICROBATCHES} microbatches: the simulator's bound is "
                  f"{least:.3f} s, the same run's step {wall:.3f} s: {least / wall:.0%} of it (goal 95%: "
                  f"{verdict})."]  # fmt: skip
    lines += ["", "| layout | operation | MiB a step | closed form | hidden |", "|---|---|---|---|---|"]
    for label, (used, ranks) in seen.items():
        for operation, size, expected in wire(used, ranks):
            share = f"{hidden(ranks[0], operation):.0%}"
            lines.append(f"| {label} | {operation} | {size / 2**20:.3f} | {expected / 2**20:.3f} | {share} |")
    return lines


def apart(arms: dict[str, Arm]) -> float:
    """Largest difference of two layouts' losses of one step: all read the same samples from the same weights."""
    steps = zip(*([turn["loss"] for turn in arm.turns] for arm in arms.values()))
    return max(max(losses) - min(losses) for losses in steps)


def main() -> int:
    options = parser(__doc__, ("J2",))
    options.add_argument("--steps", type=int, default=10, help="counted steps (default 10)")
    args = options.parse_args()
    for name in args.jobs:
        overrides = [*(small(name) if args.quick else []), f"precision.dtype={args.dtype}"]
        config = job.read(HERE / JOBS[name], args.work, overrides)
        chosen = layouts(config)
        arms, absent = time_layouts(HERE / JOBS[name], config, overrides, chosen, args.work, args.steps)
        limit = table.BOUNDS[args.dtype]
        if (found := apart(arms)) > limit:
            print(f"{name}: losses of the layouts are {found:.3g} apart, more than {limit}: no speed.")
            return 1
        seen = {}
        for layout in chosen:
            if layout.name in PROFILED:
                mine = [*overrides, *layout.overrides, "train.threads=1"]
                try:
                    seen[layout.name] = profile(name, mine, args.work, f"{name}-{layout.name}".replace(" ", "-"))
                except RuntimeError as error:
                    absent.append(str(error))
        text = "\n".join([*run.heading(), "", *report(config, name, args.dtype, chosen, arms, seen), "", *absent])
        print(text, flush=True)
        drawn = picture.draw(seen["data 2, ZeRO-1"][1][0]) if "data 2, ZeRO-1" in seen else ""
        target = docs.PAGE.with_name("overlap.svg") if args.write else args.work / "overlap.svg"
        target.write_text(drawn)
        if args.write:
            docs.write(f"benchmarks/train/scaling.py {name}", text, docs.PAGE.with_name("performance.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
