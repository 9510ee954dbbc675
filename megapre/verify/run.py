"""Any layout against the oracle, gradient by gradient.

Arm A runs in fp64 with reference kernels: it proves the layout. Arm B runs the job's own number format and
kernels: its error may be at most twice that of the unsharded run in the same format.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megapre.config.check import check
from megapre.config.load import digest
from megapre.config.schema import Config, KernelsConfig, OptimizerConfig, ParallelConfig
from megapre.data.loader import count
from megapre.models.context import Context
from megapre.models.moe import Router
from megapre.models.replaced_token import Replacement
from megapre.models.spec import tensors
from megapre.optim.schedule import learning_rate
from megapre.parallel.grid import Grid
from megapre.parallel.layout import Slot
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.training.engine import Engine, build
from megapre.verify import oracle, threads
from megapre.verify.cells import Cell, batches, share
from megapre.verify.instruments import instrumented
from megapre.verify.pool import RankPool

STEPS = 2
ZERO = 1e-6
"""A gradient below this share of the global norm is zero but for rounding."""
EXACT = 1e-9
"""Largest relative error of arm A."""
ALLOWED = 2.0
"""Largest error of arm B, in multiples of the unsharded run's."""
FEW = 8
"""Numbers below which a tensor's error is no average: two draws of the noise of two numbers are in one of five pairs
more than `ALLOWED` apart."""
CHOICE = 16.0
"""Largest score, of at most 1, by which rounding may turn a router's choice, in units of roundoff."""
RESOLUTION = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Unit roundoff: an arm B error below it is that of storing the result, not of computing it."""


Job = tuple[Config, str, bool]
"""A config, the file of its truth, and whether its routers follow the oracle's choices of experts (arm B)."""


@dataclass(frozen=True)
class Report:
    """Errors of one cell: quantity -> ||x - x0|| / max(||x0||, floor)."""

    errors: dict[str, float]
    kernels: dict[str, str]
    in_flight: list[int]
    """Per rank, the most microbatch-stages whose activations were held at once."""
    digests: list[dict[str, int]]
    """Per rank, a checksum of every local weight after the last step."""

    def worst(self, limits: Callable[[str], float]) -> tuple[str, float, float]:
        """The quantity furthest beyond (or nearest to) its limit: name, error, limit."""
        name = max(self.errors, key=lambda key: _ratio(self.errors[key], limits(key)))
        return name, self.errors[name], limits(name)


def _ratio(error: float, limit: float) -> float:
    return float("inf") if error != error else error / limit


def plain(config: Config) -> Config:
    """``config`` with reference kernels."""
    return replace(config, kernels=KernelsConfig(**{field.name: "reference" for field in fields(KernelsConfig)}))


def arm_a(config: Config) -> Config:
    """``config`` in fp64 with reference kernels."""
    return plain(replace(config, precision=replace(config.precision, dtype="fp64")))


def write_truth(config: Config, vocab_size: int, path: Path) -> None:
    """Run the oracle on ``config``'s made-up batches and store what it says."""
    truth = oracle.train(
        config, vocab_size, batches(config, vocab_size, STEPS), oracle.initial_weights(config, vocab_size)
    )
    tensors = {f"gradient/{name}": value.contiguous() for name, value in truth.gradients.items()}
    tensors |= {f"parameter/{name}": value.contiguous() for name, value in truth.parameters.items()}
    tensors |= {f"bias/{name}": value for name, value in truth.biases.items()}
    for step, ledger in enumerate(truth.ledgers):
        tensors |= {f"choices/{step}/{name}": torch.cat(ids, 1) for name, ids in ledger.choices.items()}
    meta = {"losses": truth.losses, "norms": truth.norms}
    meta |= {"balance": [ledger.balance for ledger in truth.ledgers], "z": [ledger.z for ledger in truth.ledgers]}
    save_file(tensors, path, metadata={name: json.dumps(values) for name, values in meta.items()})


def run_cell(
    ranks: Ranks, jobs: list[Job], vocab_size: int, instrument: str = ""
) -> list[Report] | None:
    """One rank's part of one cell, on axes as ``instrument`` makes them; rank 0 returns a report for each job.

    ``jobs`` are on one layout, which is connected once.
    """
    with connected(jobs[0][0], ranks) as (grid, device):
        reports = compare(grid, device, jobs, vocab_size, instrument)
    return None if ranks.rank else reports


def compare(
    grid: Grid, device: torch.device, jobs: list[Job], vocab_size: int, instrument: str = ""
) -> list[Report]:
    """A report for each of ``jobs``, on this rank's grid."""
    grid = instrumented(grid, instrument, jobs[0][0].data.seed)
    return [_compare(grid, device, config, vocab_size, truth, replay) for config, truth, replay in jobs]


def _compare(
    grid: Grid, device: torch.device, config: Config, vocab_size: int, truth: str, replay: bool
) -> Report:
    """Train ``config`` beside what the oracle said of it; with ``replay`` its routers follow the oracle's choices."""
    with safe_open(truth, framework="pt") as known:
        engine = build(config, grid, device, vocab_size)
        meta = known.metadata()
        losses, norms = json.loads(meta["losses"]), json.loads(meta["norms"])
        sums = _Sums()
        trail: list[dict[str, int]] = []
        if replay:
            for layer, router in engine.step.routing.routers.items():
                router.choose = Replay(router, known, f"blocks.{layer - 1}.mlp", sums)  # type: ignore[method-assign]
            for module in engine.model.layers:
                if isinstance(module, Replacement):
                    module.fill = Rewrite(module, known, sums, config)  # type: ignore[method-assign]
        for step, batch in enumerate(batches(config, vocab_size, STEPS)):
            mine = share(batch, grid.data.rank, grid.data.size, config.train.microbatch)
            loss, rms = engine.step.compute_gradients(mine, count(batch), step)
            if step == 0:
                _compare_gradients(engine, known, norms[0], sums)
            result = engine.step.apply_gradients(loss, rms, learning_rate(config, step))
            trail.append(_digests(engine))
            sums.add(f"loss/{step}", float(result.loss) - losses[step], losses[step])
            sums.add(f"grad_norm/{step}", float(result.grad_norm) - norms[step], norms[step])
            for name, key in (("load_balance", "balance"), ("router_z", "z")):
                if name in result.routing:
                    true = json.loads(meta[key])[step] / config.train.global_batch
                    sums.add(f"loss/{name}/{step}", float(result.routing[name]) - true, true)
        _compare_parameters(engine, known, config.optimizer, norms[0], sums)
        for layer, router in engine.step.routing.routers.items():
            if router.bias is not None:
                true = known.get_tensor(f"bias/blocks.{layer - 1}.mlp")
                sums.add(f"bias/{layer}", router.bias.double().cpu() - true, true, 1e-6)
        found = json.dumps([sums.values, trail, engine.step.executor.peak_in_flight])
        everyone = [json.loads(text) for text in grid.host.gather_text(found)]
    errors = _merge([values for values, _, _ in everyone])
    errors["replicas"] = max(_disagreements(list(step)) for step in zip(*(digests for _, digests, _ in everyone)))
    digests = [trail[-1] for _, trail, _ in everyone]
    return Report(errors, engine.kernels.chosen, [flight for _, _, flight in everyone], digests)


class Replay:
    """In a router's place: the oracle's choices, held against the router's own.

    Rounding to the job's number format turns near ties, and a choice that differs changes gradients as a whole, by
    luck more in one layout than in another; so arm B computes with the same choices everywhere. It is still seen when a
    router chooses wrongly: ``choice`` is the largest score by which a choice of the oracle misses the engine's best k.
    """

    def __init__(self, router: Router, known: Any, name: str, sums: _Sums) -> None:
        self.router, self.known, self.name, self.sums = router, known, name, sums

    def __call__(self, ctx: Context, scores: Tensor) -> Tensor:
        """As ``Router.choose``."""
        given = self.known.get_tensor(f"choices/{ctx.step}/{self.name}")
        given = given[:, ctx.samples.cpu() % given.shape[1]]
        ids = given[self.router.rows(ctx, scores.shape[0]).cpu()].to(scores.device)
        biased = scores if self.router.bias is None else scores + self.router.bias
        least = torch.topk(biased, ids.shape[-1]).values[..., -1]
        missed = float((least - biased.gather(-1, ids).amin(-1)).amax())
        before = self.sums.values.get(f"choice/{self.name}", [0.0])[0] ** 0.5
        self.sums.add(f"choice/{self.name}", max(missed, before), 1.0)
        return ids


class Rewrite:
    """In a generator's place: what the oracle's wrote, held against the engine's own draws.

    For the reason of `Replay`. Ids rise with the uniform numbers, so the oracle's lie between those that the engine
    draws from slightly smaller and slightly larger ones, unless more than rounding sets the probabilities apart.
    """

    def __init__(self, layer: Replacement, known: Any, sums: _Sums, config: Config) -> None:
        self.layer, self.known, self.sums = layer, known, sums
        self.off = CHOICE * RESOLUTION[config.precision.dtype]

    def __call__(self, ctx: Context, x: Tensor) -> Tensor:
        """As ``Replacement.fill``."""
        given = self.known.get_tensor(f"choices/{ctx.step}/written")
        given = given[:, ctx.samples.cpu() % given.shape[1]][ctx.places.cpu()].to(x.device)
        numbers = self.layer.numbers(ctx)
        low, high = (self.layer.draw(x, numbers + off) for off in (-self.off, self.off))
        missed = ((given < low) | (given > high)) & (ctx.weights > 0)
        before = self.sums.values.get("choice/written", [0.0])[0] ** 0.5
        self.sums.add("choice/written", max(float(missed.any()), before), 1.0)
        return given


class _Sums:
    """Squares of differences, of true values, and of floors, by quantity."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, difference: Tensor | float, truth: Tensor | float, floor: float = 0.0) -> None:
        squares = [float(torch.as_tensor(x, dtype=torch.float64).square().sum()) for x in (difference, truth)]
        self.values[name] = [*squares, floor**2]


def _compare_gradients(engine: Engine, known: Any, norm: float, sums: _Sums) -> None:
    """Complete gradients, as far as this rank's optimizer reads them.

    The floor is a millionth of the global norm: some gradients are exactly zero in theory (the bias of keys). What is
    left of these in a coarser format than fp64 is noise without a scale of its own, so that of the norm is taken.
    """
    coarse = engine.model.dtype != torch.float64
    buffers = engine.model.flat
    for bucket, shard in zip(buffers.layout.buckets, buffers.gradients.shards):
        start, end = buffers.shard(bucket)
        for slot in bucket.slots:
            address = slot.address(start, end)
            if address is not None:
                true = _box(known, f"gradient/{slot.spec.name}", slot).flatten()[address.start : address.end]
                first = slot.start + address.start - start
                found = shard[first : first + true.numel()].double().cpu() / float(engine.step.scaler.value)
                share = (true.numel() / prod(slot.spec.shape)) ** 0.5  # pieces' floors add up to the tensor's
                whole = known.get_tensor(f"gradient/{slot.spec.name}")
                floor = norm if coarse and float(whole.norm()) < ZERO * norm else ZERO * norm
                sums.add(f"gradient/{slot.spec.name}", found - true, true, floor * share)
            padding = _padding(slot, start, end)
            if bool(shard[padding.start - start : padding.stop - start].any()):
                sums.add(f"padding/{slot.spec.name}", 1.0, 0.0, 1.0)


def _compare_parameters(engine: Engine, known: Any, optimizer: OptimizerConfig, norm: float, sums: _Sums) -> None:
    """The model's weights, every replica. The floor is the length of one Adam step.

    Where the gradient is zero in theory, Adam turns noise of the size that `_compare_gradients` allows, a roundoff of
    the norm, into steps of lr x noise / eps.
    """
    coarse, lr = engine.model.dtype != torch.float64, optimizer.lr
    for slot, flat in _weights(engine):
        true = _box(known, f"parameter/{slot.spec.name}", slot)
        found = flat.view(slot.shape)[tuple(slice(n) for n in slot.size)].double().cpu()
        floor = lr * true.numel() ** 0.5
        if coarse and float(known.get_tensor(f"gradient/{slot.spec.name}").norm()) < ZERO * norm:
            floor = max(floor, lr * norm / optimizer.eps)
        sums.add(f"parameter/{slot.spec.name}", found - true, true, floor)
        if bool(flat[prod(slot.size) :].any()):
            sums.add(f"padding/{slot.spec.name}", 1.0, 0.0, 1.0)


def _weights(engine: Engine) -> Iterator[tuple[Slot, Tensor]]:
    """Every local tensor, flat and whole; all ranks walk through together."""
    flat = engine.model.flat
    for index, bucket in enumerate(flat.layout.buckets):
        with flat.weights.whole(index) as whole:
            for slot in bucket.slots:
                yield slot, whole[bucket.place(slot)]


def _box(known: Any, name: str, slot: Slot) -> Tensor:
    window = tuple(slice(o, o + n) for o, n in zip(slot.offset, slot.size))
    return known.get_tensor(name)[window]


def _padding(slot: Slot, start: int, end: int) -> slice:
    """Elements of a slot beyond its logical box, inside [start, end)."""
    used = slot.start + prod(slot.size)
    return slice(max(start, used), max(start, used, min(end, slot.end)))


def _digests(engine: Engine) -> dict[str, int]:
    """A checksum of every local weight, by tensor and box."""
    return {  # from copies: memory that numpy has seen cannot be freed any more
        f"{slot.spec.name}{slot.offset}": zlib.crc32(flat.to("cpu", copy=True).view(torch.uint8).numpy().tobytes())
        for slot, flat in _weights(engine)
    }


def _disagreements(digests: list[dict[str, int]]) -> float:
    """How many boxes are not bitwise equal on all ranks that hold them."""
    seen: dict[str, set[int]] = {}
    for rank in digests:
        for box, bits in rank.items():
            seen.setdefault(box, set()).add(bits)
    return float(sum(len(values) > 1 for values in seen.values()))


def _merge(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Relative errors over all ranks' pieces; scalars, which every rank has, by their worst rank."""
    totals: dict[str, list[float]] = {}
    worst: dict[str, float] = {}
    for rank in ranks:
        for name, (difference, true, floor) in rank.items():
            total = totals.setdefault(name, [0.0, 0.0, 0.0])
            total[0], total[1], total[2] = total[0] + difference, total[1] + true, total[2] + floor
            worst[name] = max(worst.get(name, 0.0), difference / max(true, floor, 1e-300))
    scalars = ("loss", "grad_norm", "choice")
    return {
        name: (worst[name] if name.startswith(scalars) else a / max(b, c, 1e-300)) ** 0.5
        for name, (a, b, c) in totals.items()
    }


class Prover:
    """Runs cells of one job; the oracle and the unsharded baseline are computed once and kept in ``folder``.

    Ranks are the processes of ``pool``; without one, threads that exchange tensors (``threads.py``).
    """

    def __init__(self, config: Config, vocab_size: int, pool: RankPool | None, folder: Path) -> None:
        self.config, self.vocab_size, self.pool, self.folder = config, vocab_size, pool, folder

    def layout(
        self, cell: Cell, instrument: str = "", config: Config | None = None
    ) -> tuple[Report, tuple[str, float, float]]:
        """Arm A of ``cell``: its report and its worst quantity with its limit.

        ``config`` may differ from the prover's in what must change no number, such as recompute.
        """
        (report,) = self._run(cell, [(arm_a(config or self.config), False)], instrument)
        return report, report.worst(_exact)

    def numerics(self, cell: Cell, config: Config | None = None) -> tuple[Report, tuple[str, float, float]]:
        """Arm B of ``cell``: its report and its worst quantity with its limit; ``config`` as in `layout`."""
        limit = self._limits()
        (report,) = self._run(cell, [(config or self.config, True)])
        return report, report.worst(limit)

    def both(self, cell: Cell) -> list[tuple[str, Report, tuple[str, float, float]]]:
        """Arms A and B of ``cell`` in one connection: name, report, and worst quantity with its limit."""
        limits = [_exact, self._limits()]
        reports = self._run(cell, [(arm_a(self.config), False), (self.config, True)])
        names = ["A fp64", f"B {self.config.precision.dtype}"]
        return [(name, report, report.worst(limit)) for name, report, limit in zip(names, reports, limits)]

    def _limits(self) -> Callable[[str], float]:
        """Arm B's limits, from the errors of two unsharded runs: the job's kernels and the reference's."""
        path = self.folder / f"baseline-{_digest(self.config)}.json"
        if not path.exists():
            draws = [report.errors for report in self._run(Cell(), [(self.config, True), (plain(self.config), True)])]
            errors = {name: max(draw[name] for draw in draws) for name in draws[0]}
            _publish(path, lambda part: part.write_text(json.dumps(errors)))
        base, resolution = json.loads(path.read_text()), RESOLUTION[self.config.precision.dtype]
        few = {spec.name for spec in tensors(self.config.model, self.vocab_size) if prod(spec.shape) < FEW}
        return lambda name: _limit(name, base, resolution, few)

    def _run(self, cell: Cell, configs: list[tuple[Config, bool]], instrument: str = "") -> list[Report]:
        jobs = [(check(cell.apply(config), cell.world), self._truth(config), replay) for config, replay in configs]
        work = (jobs, self.vocab_size, instrument)
        if self.pool is None:
            every = threads.run(jobs[0][0], cell.world, compare, *work, turns=not instrument)
        else:
            every = self.pool.run(cell.world, run_cell, *work)
        reports: list[Report] = every[0]
        return reports

    def _truth(self, config: Config) -> str:
        """The oracle's file. It depends on the number format, which decides how initial weights are rounded."""
        path = self.folder / f"truth-{_digest(replace(config, kernels=KernelsConfig()))}.safetensors"
        if not path.exists():
            _publish(path, lambda part: write_truth(config, self.vocab_size, part))
        return str(path)


def _digest(config: Config) -> str:
    """Names what does not depend on the layout, so that the workers of one proof share it."""
    return digest(replace(config, parallel=ParallelConfig()))[:16]


def _publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``path`` appear whole: another process may be waiting to read it."""
    part = path.with_suffix(f".{os.getpid()}")
    write(part)
    part.replace(path)


def _exact(name: str) -> float:
    """Arm A's limit."""
    return EXACT


def _limit(name: str, base: dict[str, float], resolution: float, few: Collection[str] = ()) -> float:
    """Arm B's limit for one quantity, from the larger errors of two unsharded runs.

    An error is one draw of rounding noise and may be small by luck, so a tensor is held to the worst of its
    kin (the same tensor of every block; all norms), one without kin to the median of all tensors too, and losses and
    norms to the median error of the gradients, of which they are sums. One of the ``few`` numbers is held to the worst
    of all tensors.
    """
    if name == "replicas" or name.startswith("padding"):
        return 0.5
    if name.startswith("choice"):
        return CHOICE * resolution
    kin = [error for key, error in base.items() if _kin(key) == _kin(name)]
    like = "gradient/" if name.startswith(("loss", "grad_norm")) else name.partition("/")[0] + "/"
    if len(kin) == 1 or like == "gradient/" != name[: len(like)]:
        summary = max if name.partition("/")[2] in few else statistics.median
        kin.append(summary([error for key, error in base.items() if key.startswith(like)]))
    worst = max(kin)
    if not math.isfinite(worst):
        return 0.0  # an unsharded run that overflows measures nothing
    return max(ALLOWED * worst, resolution)


def _kin(name: str) -> str:
    """What ``name`` shares its baseline with: the same tensor of other blocks (cross-attention's with attention's), a
    norm with every other norm."""
    name = name.replace("encoder.", "").replace(".cross.", ".attention.")
    norms = r"(blocks\.\d+\.\w+_norm|head\.norm|head\.transform_norm|embedding\.\w*norm|(?<=/)norm)"
    return re.sub(r"\d+", "*", re.sub(norms, "norm", name))
