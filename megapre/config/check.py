"""What a job must satisfy before torch is loaded or a rank is started.

``limits.py`` says what each field may be; the rules here and in ``rules_*.py`` span fields. A broken one raises
`ConfigError`: one sentence with the numbers and the key to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from megapre.config.limits import fields_fit
from megapre.config.ramp import clock
from megapre.config.rules_architecture import ARCHITECTURE_RULES
from megapre.config.rules_experts import EXPERT_RULES
from megapre.config.rules_layout import LAYOUT_RULES
from megapre.config.rules_model import HEAD_RULES, MODEL_RULES
from megapre.config.rules_objectives import OBJECTIVE_RULES, PAIRS
from megapre.config.rules_ramp import RAMP_RULES
from megapre.config.schema import Config


class ConfigError(ValueError):
    """A job that cannot run, in one sentence for the person who wrote it."""


class RunError(Exception):
    """What ended a run that is no defect of the program, in one sentence; the exit code is that of a failure."""


def check(config: Config, world_size: int | None = None) -> Config:
    """Return ``config`` with ``parallel.data`` resolved, or raise `ConfigError`.

    ``world_size`` is the number of launched ranks; None when started alone, where ``parallel.data = 0``
    becomes 1. Reads no file and needs no device.
    """
    _hold(config, (fields_fit,))
    config = _resolve_data(config, world_size)
    _hold(config, RULES)
    return config


def world_size(config: Config) -> int:
    """Ranks of a checked job: tensor x pipeline x context x data."""
    grid = config.parallel
    return grid.tensor * grid.pipeline * grid.context * grid.data


def _hold(config: Config, rules: Sequence[Callable[[Config], str | None]]) -> None:
    for rule in rules:
        problem = rule(config)
        if problem:
            raise ConfigError(problem)


def _resolve_data(config: Config, world: int | None) -> Config:
    """Fill in ``parallel.data`` and hold the grid against the launched ranks."""
    grid = config.parallel
    names = "parallel.tensor x parallel.pipeline"
    sizes = f"{grid.tensor} x {grid.pipeline}"
    if grid.context > 1:
        names, sizes = f"{names} x parallel.context", f"{sizes} x {grid.context}"
    model_ranks = grid.tensor * grid.pipeline * grid.context
    if world is None:
        data = grid.data or 1
    elif grid.data == 0 and world % model_ranks:
        raise ConfigError(
            f"{world} launched ranks are not a multiple of {names} = {sizes} = {model_ranks}: change the launch or one "
            f"of them"
        )
    else:
        data = grid.data or world // model_ranks
    if world is not None and world != model_ranks * data:
        raise ConfigError(
            f"{names} x parallel.data = {sizes} x {data} = {model_ranks * data} ranks but {world} were launched: "
            f"change the launch or parallel.data"
        )
    return replace(config, parallel=replace(grid, data=data))


def split_sums_to_one(config: Config) -> str | None:
    """Training, validation and test shares."""
    split = config.data.split
    shown = "[" + ", ".join(f"{share:g}" for share in split) + "]"
    if len(split) != 3:
        return f"data.split must be three shares (training, validation, test), not {shown}"
    if min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        return f"data.split must be three shares of at least 0 that sum to 1 but {shown} sums to {sum(split):g}"
    if split[0] == 0:
        return f"data.split {shown} leaves nothing for training: make its first share positive"
    return None


def fraction_is_of_documents(config: Config) -> str | None:
    """A plan of rows holds the whole of its split."""
    data = config.data
    if data.fraction == 0:
        return "data.fraction 0 leaves nothing for training: make it positive"
    if data.fraction < 1 and (data.packing == "best-fit" or data.objective in PAIRS):
        why = "data.packing = 'best-fit'" if data.packing == "best-fit" else f"data.objective = '{data.objective}'"
        return (
            f"data.fraction ({data.fraction:g}) cuts a stored order, and {why} reads a plan of all training documents: "
            f"set it to 1 and make the first share of data.split smaller"
        )
    return None


def validation_has_samples(config: Config) -> str | None:
    """What more is asked of a validation needs one."""
    for key in ("eval_first", "eval_by_path"):
        if getattr(config.train, key) and not config.train.eval_samples:
            return f"train.{key} needs train.eval_samples of at least 1, not 0"
    return None


def weights_match_paths(config: Config) -> str | None:
    """One positive weight per path and stage, or none at all; with stages a path may rest in some."""
    weights, paths, stages = config.data.weights, config.data.paths, config.data.stages
    if (weights or stages) and len(weights) != len(paths) * (len(stages) + 1):
        each = f" in each of {len(stages) + 1} stages" if stages else ""
        return f"data.weights has {len(weights)} entries for {len(paths)} data.paths{each}"
    if stages and (min(stages) < 1 or stages != sorted(set(stages))):
        return f"data.stages must be numbers of samples that rise from above 0, not {stages}"
    if weights and (min(weights) < 0 or (min(weights) == 0 and not stages)):
        return f"data.weights holds {min(weights):g} but every weight must be greater than 0: drop the path instead"
    if "" in paths:
        return f"data.paths holds an empty path at position {paths.index('')}"
    return None


def warmup_ends_before_decay(config: Config) -> str | None:
    """The decay needs steps after the warm-up."""
    schedule = config.schedule
    end = schedule.decay or clock(config, config.train.steps)
    if schedule.kind in ("cosine", "linear") and schedule.warmup >= end:
        source = "schedule.decay" if schedule.decay else "train.steps"
        return f"schedule.warmup ({schedule.warmup}) must be below {source} ({end}), where the decay ends"
    return None


def schedule_is_described(config: Config) -> str | None:
    """Each schedule has what it needs, and nothing that only another one reads."""
    schedule = config.schedule
    kind, end = schedule.kind, schedule.decay or clock(config, config.train.steps)
    if kind != "wsd" and schedule.cooldown:
        return f"schedule.cooldown ({schedule.cooldown}) belongs to schedule.kind = 'wsd' but this one is '{kind}'"
    if kind == "plateau" and not (config.train.eval_interval and config.train.eval_samples):
        return (
            f"schedule.kind = 'plateau' follows the validation loss: set train.eval_interval and train.eval_samples "
            f"to at least 1, not {config.train.eval_interval} and {config.train.eval_samples}"
        )
    if kind != "piecewise" and (schedule.milestones or schedule.factors):
        return f"schedule.milestones and schedule.factors belong to schedule.kind = 'piecewise', not to '{kind}'"
    if kind == "wsd" and not 0 < schedule.cooldown <= end - schedule.warmup:
        return (
            f"schedule.kind = 'wsd' needs schedule.cooldown between 1 and {end - schedule.warmup}, the steps from "
            f"schedule.warmup ({schedule.warmup}) to the end of the decay ({end}), not {schedule.cooldown}"
        )
    if kind == "inverse-sqrt" and not schedule.warmup:
        return "schedule.kind = 'inverse-sqrt' needs schedule.warmup of at least 1, from which the rate falls, not 0"
    if kind != "piecewise":
        return None
    milestones, factors = schedule.milestones, schedule.factors
    if not milestones or len(milestones) != len(factors):
        return (
            f"schedule.kind = 'piecewise' needs one of schedule.factors for each of schedule.milestones, not "
            f"{len(factors)} for {len(milestones)}"
        )
    if sorted(set(milestones)) != milestones or milestones[0] < schedule.warmup:
        return (
            f"schedule.milestones must rise from schedule.warmup ({schedule.warmup}) or later, not "
            f"{', '.join(map(str, milestones))}"
        )
    return f"schedule.factors must be at least 0, not {min(factors):g}" if min(factors) < 0 else None


def loss_scale_is_exact(config: Config) -> str | None:
    """Scaling by a power of two changes no gradient bit (arXiv 1710.03740)."""
    scale = config.precision.initial_loss_scale
    if config.precision.dtype == "fp16" and (scale < 1 or math.frexp(scale)[0] != 0.5):
        return f"precision.initial_loss_scale must be a power of two of at least 1 under fp16, not {scale:g}"
    return None


def run_dir_is_named(config: Config) -> str | None:
    """A run writes somewhere."""
    if not config.train.run_dir.strip() or "\0" in config.train.run_dir:
        return f"train.run_dir must name a folder, not {config.train.run_dir!r}"
    return None


def allowed_changes_are_keys(config: Config) -> str | None:
    """A misspelt key would allow nothing, and be found out at the next resume."""
    for name in config.checkpoint.allow_changes:
        table, _, key = name.partition(".")
        if not hasattr(getattr(config, table, None), key):
            return f"checkpoint.allow_changes names {name!r}, which is no key: write it as train.global_batch"
    return None


def skipped_batches_exist(config: Config) -> str | None:
    """Batches are counted from 0, each once."""
    skipped = config.data.skip_batches
    if skipped and (min(skipped) < 0 or len(set(skipped)) < len(skipped)):
        return f"data.skip_batches must name batches from 0 on, each once, not {skipped}"
    return None


RULES = (
    *MODEL_RULES,
    *ARCHITECTURE_RULES,
    *LAYOUT_RULES,
    *EXPERT_RULES,
    *RAMP_RULES,
    split_sums_to_one,
    fraction_is_of_documents,
    validation_has_samples,
    weights_match_paths,
    *OBJECTIVE_RULES,
    *HEAD_RULES,
    warmup_ends_before_decay,
    schedule_is_described,
    loss_scale_is_exact,
    run_dir_is_named,
    allowed_changes_are_keys,
    skipped_batches_exist,
)
