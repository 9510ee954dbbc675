"""``megapre plan``: what a job needs and how fast it will be, before it is queued."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megapre.config.check import ConfigError, check, world_size
from megapre.config.load import load, to_toml
from megapre.config.schema import Config
from megapre.planner import constants as fitted
from megapre.planner import hardware, page, scaling
from megapre.planner.explain import Assumption, Bill, assumptions, bill, bound, further_assumptions
from megapre.planner.job import Job, from_config, refuse_what_is_not_counted, shape_of
from megapre.planner.memory import GIB, KINDS, Memory, ends, memory
from megapre.planner.search import Candidate, Found, refusal, search
from megapre.planner.timing import Time, predict


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    gpu: str = "h100"
    gpus: int = 0
    """0: as many as the job's layout has ranks."""
    search: bool = False
    write: str = ""
    html: str = ""
    tokens: float = 0.0
    """0: as many as the job's steps read."""
    price: float = 0.0
    """0: the profile's."""
    runs: Sequence[str] = ()
    scaling: bool = False
    json: bool = False


WIDTH = 110
"""Columns below which a table's numbers would be cut."""


def main(job: str, overrides: Sequence[str], request: Request) -> int:
    """Plan, print, and write what was asked for."""
    config, device = load(job, overrides), hardware.load(request.gpu)
    for name, wrong in (("--gpus", request.gpus < 0), ("--tokens", request.tokens < 0), ("--price", request.price < 0)):
        if wrong:
            raise ConfigError(f"{name} must be greater than 0")
    vocab = config.model.vocab_size
    if not vocab:
        raise ConfigError("model.vocab_size is 0, to be taken from the data, which plan does not read: set it")
    if config.model.architecture not in ("decoder", "encoder"):
        raise ConfigError(
            f"plan knows decoders and encoders, not model.architecture = '{config.model.architecture}': megapre "
            f"trace has its memory and traffic"
        )
    refuse_what_is_not_counted(config, vocab)
    console, constants = Console(), fitted.load()
    console.width = max(console.width, WIDTH)
    found: Found | None = None
    if request.search:
        started = clock.monotonic()
        gpus = request.gpus or world_size(check(config))
        if device.kind != "gpu":
            raise ConfigError(f"--search ranks layouts of GPUs, not of {device.name}")
        found = search(config, device, gpus, vocab, constants)
        if not found.best:
            if found.smallest is None:
                raise ConfigError(f"no layout of this job has {gpus} ranks: change --gpus or train.global_batch")
            raise ConfigError(refusal(device, gpus, *found.smallest))
        config = found.best[0].config
        if not request.json:
            _print_search(console, found, clock.monotonic() - started)
    config = check(config, request.gpus or None)
    planned = from_config(config, device, vocab)
    step = predict(planned, constants)
    ranks = {rank: memory(planned, rank) for rank in ends(planned)}
    _refuse_what_does_not_fit(planned, ranks)
    tokens = request.tokens or float(config.train.steps) * planned.tokens
    cost = bill(planned, step, tokens, request.price or device.price)
    fullest = max(ranks.values(), key=lambda need: need.total)
    assumed = [*assumptions(planned, constants), *further_assumptions(planned, fullest, cost)]
    if request.json:
        print(json.dumps(_as_dict(planned, step, ranks, cost, assumed)))
    else:
        _print(console, planned, step, ranks, cost, assumed)
        if request.scaling or request.runs:
            _print_scaling(console, config, vocab, tokens, request.runs)
    if request.write:
        Path(request.write).write_text(to_toml(config), encoding="utf-8")
    if request.html:
        candidates = found.best if found else []
        rows = _rows(planned, step, cost)
        page.write(Path(request.html), _title(planned), planned, step, constants, rows, assumed, candidates)
    return 0


def _refuse_what_does_not_fit(job: Job, ranks: dict[int, Memory]) -> None:
    """Raise `ConfigError` with the arithmetic for the fullest rank."""
    rank, need = max(ranks.items(), key=lambda item: item[1].total)
    if need.total <= job.device.memory:
        return
    parts = " + ".join(f"{size / GIB:.1f} {kind}" for kind, size in need.kinds().items() if size / GIB >= 0.05)
    largest = max(need.kinds().items(), key=lambda item: item[1])[0]
    advice = {
        "activations": "lower train.microbatch, set parallel.recompute, or raise parallel.tensor or parallel.context",
        "logits": "lower train.microbatch or raise parallel.tensor",
        "optimizer": "set parallel.zero to 1 or raise parallel.data, tensor or pipeline",
    }.get(largest, "raise parallel.zero, parallel.tensor or parallel.pipeline")
    raise ConfigError(
        f"this does not fit: pipeline rank {rank} needs {parts} = {need.total / GIB:.1f} GiB but {job.device.name} has "
        f"{job.device.memory / GIB:.0f} GiB: {advice}"
    )


def _title(job: Job) -> str:
    return f"{job.shape.parameters() / 1e9:.2f} billion parameters on {job.layout.ranks} x {job.device.name}"


def _duration(seconds: float) -> str:
    days = seconds / 86400
    if days >= 2:
        return f"{days:,.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds:.0f} s"


def _rows(job: Job, time: Time, cost: Bill) -> list[tuple[str, str]]:
    return [
        ("step", f"{time.step:.3f} s for {job.tokens:,} tokens"),
        ("model FLOPs utilisation (causal attention counted half)", f"{cost.mfu:.1%}"),
        ("tokens per day", f"{cost.tokens_per_day / 1e9:,.2f} billion"),
        ("run", f"{cost.tokens / 1e9:,.2f} billion tokens in {_duration(cost.seconds)}"),
        ("cost", f"${cost.dollars:,.0f}"),
        ("energy, host and cooling included", f"{cost.kilowatt_hours / 1000:,.2f} MWh"),
    ]


def _print(
    console: Console, job: Job, time: Time, ranks: dict[int, Memory], cost: Bill, assumed: Sequence[Assumption]
) -> None:
    table = Table(title=f"memory, GiB of {job.device.memory / GIB:.0f}")
    table.add_column("pipeline rank")
    for kind in (*KINDS, "sum"):
        table.add_column(kind, justify="right")
    for rank, need in ranks.items():
        sizes = [*need.kinds().values(), need.total]
        table.add_row(str(rank), *(f"{size / GIB:.2f}" for size in sizes))
    console.print(_title(job), highlight=False)
    console.print(table)
    table = Table(title="a step")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, size in (*time.parts().items(), ("sum", time.step)):
        table.add_row(name, f"{size:.4f}", f"{size / time.step:.1%}")
    console.print(table)
    for name, value in _rows(job, time, cost):
        console.print(f"{name}: {value}", highlight=False)
    console.print(f"The step is {bound(time)}.", highlight=False)
    table = Table(title="assumed, with the answers that the alternatives give")
    for column in ("what", "assumed", "alternatives", "answers"):
        table.add_column(column)
    for entry in assumed:
        table.add_row(entry.name, entry.value, entry.span, entry.answers)
    console.print(table)


def _print_search(console: Console, found: Found, seconds: float) -> None:
    table = Table(title=f"best of {found.fitting:,} layouts that fit ({found.tried:,} tried in {seconds:.1f} s)")
    for column in ("TP", "PP", "schedule", "CP", "EP", "DP", "ZeRO", "micro", "recompute", "step, s", "GiB", "bubble"):
        table.add_column(column, justify="right")
    for entry in found.best:
        layout = entry.job.layout
        schedule = layout.schedule + (f":{layout.chunks}" if layout.chunks > 1 else "")
        table.add_row(
            str(layout.tensor), str(layout.pipeline), schedule, str(layout.context), str(layout.expert),
            str(layout.data), str(layout.zero), str(layout.microbatch), layout.recompute, f"{entry.time.step:.3f}",
            f"{entry.memory.total / GIB:.1f}", f"{entry.time.bubble / entry.time.step:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(_why(found.best), highlight=False)


def _why(best: Sequence[Candidate]) -> str:
    """Why the best layout is ahead of the next that differs in more than one field."""
    first = best[0]
    if len(best) == 1:
        return "Only one layout fits."
    ahead, behind = first.time.parts(), best[-1].time.parts()
    saved = max(ahead, key=lambda name: behind[name] - ahead[name])
    return (
        f"The best spends {behind[saved] - ahead[saved]:.3f} s less on {saved} than the last of the table, which is "
        f"{best[-1].time.step / first.time.step - 1:.1%} slower in all."
    )


def _print_scaling(console: Console, config: Config, vocab: int, tokens: float, runs: Sequence[str]) -> None:
    shape = shape_of(config, vocab)
    flops = 6.0 * shape.parameters(active=True) * tokens
    table = Table(title=f"compute-optimal sizes for {flops:.3g} FLOPs (6 N D)")
    for column in ("law", "parameters", "tokens", "loss"):
        table.add_column(column, justify="left" if column == "law" else "right")
    found = [law(flops) for law in scaling.LAWS]
    if runs:

        def parameters(job: Path) -> float:
            small = load(job)
            return shape_of(small, small.model.vocab_size or vocab).parameters()

        own = scaling.fit([scaling.read_run(Path(folder), parameters) for folder in runs])
        found.append(own.optimum(flops))
        console.print(
            f"your law from {len(runs)} runs: L = {own.irreducible:.3f} + {own.a:.4g} / N^{own.alpha:.2f} + "
            f"{own.b:.4g} / D^{own.beta:.2f}; this job: {own.loss(shape.parameters(), tokens):.3f}", highlight=False
        )  # fmt: skip
    for best in found:
        loss = "" if best.loss != best.loss else f"{best.loss:.3f}"
        table.add_row(best.law, f"{best.parameters / 1e9:.3f} billion", f"{best.tokens / 1e9:.1f} billion", loss)
    table.add_row("this job", f"{shape.parameters() / 1e9:.3f} billion", f"{tokens / 1e9:.1f} billion", "")
    console.print(table)


def _as_dict(
    job: Job, time: Time, ranks: dict[int, Memory], cost: Bill, assumed: Sequence[Assumption]
) -> dict[str, object]:
    return {
        "gpus": job.layout.ranks,
        "device": job.device.name,
        "parameters": job.shape.parameters(),
        "step_seconds": time.step,
        "parts": time.parts(),
        "memory": {str(rank): replace(need).kinds() | {"sum": need.total} for rank, need in ranks.items()},
        "mfu": cost.mfu,
        "tokens_per_day": cost.tokens_per_day,
        "days": cost.seconds / 86400,
        "dollars": cost.dollars,
        "kilowatt_hours": cost.kilowatt_hours,
        "assumed": [asdict(entry) for entry in assumed],
    }
