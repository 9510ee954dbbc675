"""A prediction in words: what bounds the step, what was assumed, what a run costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megapre.planner.constants import Constants
from megapre.planner.job import Job
from megapre.planner.memory import CONTEXT, FRAGMENTS, GIB, Memory
from megapre.planner.timing import Time, predict

CAUSES = {
    "compute": "computation",
    "recompute": "recomputation of activations",
    "tensor": "tensor-, context- and expert-parallel traffic",
    "launch": "the host, which launches kernels too slowly",
    "bubble": "the pipeline's bubble and messages",
    "data": "data-parallel traffic",
    "optimizer": "the optimizer",
    "other": "fixed work of a step",
}
ADVICE = {
    "compute": "a faster number format or device would help, another layout little",
    "recompute": "more ranks to share the memory would make recomputation unnecessary",
    "tensor": "fewer tensor or context ranks would send less, if the memory allows",
    "launch": "a larger microbatch gives the device more work for each launch",
    "bubble": "more microbatches a step, more chunks or fewer stages would fill it",
    "data": "a larger global batch or fewer data ranks would hide it",
    "optimizer": "a larger global batch makes updates rarer",
    "other": "larger steps would make it matter less",
}


def bound(time: Time) -> str:
    """One sentence: the largest cost, and the largest beside computation."""
    parts = time.parts()
    first = max(parts, key=parts.__getitem__)
    rest = {name: size for name, size in parts.items() if name != "compute"}
    second = max(rest, key=rest.__getitem__)
    share = {name: f"{size / time.step:.0%}" for name, size in parts.items()}
    if first == "compute":
        return (
            f"bound by {CAUSES[first]} ({share[first]} of the step); the largest loss is {CAUSES[second]} "
            f"({share[second]}): {ADVICE[second]}"
        )
    return f"bound by {CAUSES[first]} ({share[first]} of the step): {ADVICE[first]}"


@dataclass(frozen=True)
class Assumption:
    """Something that the job does not say."""

    name: str
    value: str
    """What was assumed."""
    span: str
    """The alternatives looked at."""
    low: float
    """The answer that depends on it, under the alternatives: least and most."""
    high: float
    unit: str = "s a step"

    @property
    def answers(self) -> str:
        """Both, with their unit."""
        digits = 3 if self.high < 10 else 1 if self.high < 1000 else 0
        return f"{self.low:,.{digits}f} to {self.high:,.{digits}f} {self.unit}"


Change = Callable[[Job], Job]


def _stack(**changes: object) -> Change:
    return lambda job: replace(job, stack=replace(job.stack, **changes))  # type: ignore[arg-type]


def assumptions(job: Job, constants: Constants) -> list[Assumption]:
    """Every assumption about the step's time, with the range that it spans."""
    layout, stack = job.layout, job.stack
    kinds = sorted(job.device.attention)
    nic = (job.nic or job.device.nic) / 1e9
    table: list[tuple[str, str, str, list[Change], bool]] = [
        (
            "attention kernel", stack.attention, " to ".join(["unfused", *kinds[-1:]]),
            [_stack(attention=kind) for kind in ("unfused", *kinds)], True,
        ),
        (
            "fusion of byte-bound operations", stack.fusion, "by hand to eager",
            [_stack(fusion="eager"), _stack(fusion="fused")], True,
        ),
        (
            "overlap of traffic and computation", "yes" if stack.overlap else "no", "yes to no",
            [_stack(overlap=True), _stack(overlap=False)], layout.ranks > 1,
        ),
        (
            "network between nodes", f"{nic:.0f} GB/s per device", "half to twice as fast",
            [lambda j: replace(j, nic=nic * 5e8), lambda j: replace(j, nic=nic * 2e9)],
            layout.ranks > job.device.gpus_per_node,
        ),
        (
            "balance of experts", f"products take {constants.moe:.2f} of even ones", "even to twice as long", [],
            job.shape.moe_layers > 0,
        ),
        (
            "nodes that slow each other down", f"{constants.jitter:.1%} for each doubling", "none to 1%", [],
            layout.ranks > job.device.gpus_per_node,
        ),
    ]  # fmt: skip
    found = []
    for name, value, span, changes, applies in table:
        if not applies:
            continue
        times = [predict(change(job), constants).step for change in changes]
        if name.startswith("nodes"):
            times = [predict(job, replace(constants, jitter=jitter)).step for jitter in (0.0, 0.01)]
        if name.startswith("balance"):
            times = [predict(job, replace(constants, moe=uneven)).step for uneven in (1.0, 2.0)]
        found.append(Assumption(name, value, span, min(times), max(times)))
    return found


def further_assumptions(job: Job, need: Memory, cost: Bill) -> list[Assumption]:
    """Those about memory, money and energy. ``need``: of the fullest rank."""
    found = []
    if job.device.kind == "gpu":
        tensors = need.activations + need.logits + need.buffers
        least = need.total - need.allocator
        found.append(
            Assumption(
                "allocator and context", f"{CONTEXT / GIB:.0f} GiB and {FRAGMENTS:.0%} of activations",
                "none to 4 GiB and 10%", least / GIB, (least + 2 * CONTEXT + 0.1 * tensors) / GIB, "GiB",
            )
        )  # fmt: skip
    price = cost.dollars / max(1e-9, cost.seconds / 3600 * job.layout.ranks)
    energy = cost.kilowatt_hours / 1000 / OVERHEAD
    paid, drawn = f"${price:.2f} per GPU hour", f"{OVERHEAD} x the boards'"
    return [
        *found,
        Assumption("price", paid, "half to twice (--price)", cost.dollars / 2, 2 * cost.dollars, "$"),
        Assumption("power of host and cooling", drawn, "1.1 to 1.6", 1.1 * energy, 1.6 * energy, "MWh"),
    ]


@dataclass(frozen=True)
class Bill:
    """A whole run."""

    tokens: float
    seconds: float
    dollars: float
    kilowatt_hours: float
    mfu: float
    tokens_per_day: float


OVERHEAD = 1.3
"""Power of a whole node and its cooling, against that of its devices' boards: assumed."""


def bill(job: Job, time: Time, tokens: float, price: float) -> Bill:
    """Time, money and energy to train on ``tokens`` tokens at ``price`` dollars per device hour."""
    steps = tokens / job.tokens
    seconds = steps * time.step
    hours = seconds / 3600 * job.layout.ranks
    flops = job.shape.model_flops(job.tokens) / job.layout.ranks / time.step
    return Bill(
        tokens=tokens,
        seconds=seconds,
        dollars=hours * price,
        kilowatt_hours=hours * job.device.watts * OVERHEAD / 1000,
        mfu=flops / job.device.peak["bf16" if job.stack.dtype == "fp8" else job.stack.dtype],
        tokens_per_day=job.tokens / time.step * 86400,
    )
