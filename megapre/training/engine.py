"""What a run computes with on one rank. Train, verify and generate all build it here."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from megapre.config.schema import Config
from megapre.kernels.registry import Kernels, choose
from megapre.models.build import DTYPES, Model
from megapre.models.spec import tensors
from megapre.parallel.grid import Grid
from megapre.training.step import TrainStep


@dataclass
class Engine:
    """Grid, kernels, model and step of one rank."""

    grid: Grid
    kernels: Kernels
    model: Model
    step: TrainStep


def build(config: Config, grid: Grid, device: torch.device, vocab_size: int, *, initialise: bool = True) -> Engine:
    """An engine with initial weights, or with zeros for who only wants shapes.

    Raises ValueError for a pattern of ``optimizer.freeze`` that fits no tensor, and where all are frozen.
    """
    _refuse_useless_freeze(config, vocab_size)
    kernels = choose(config.kernels, device, DTYPES[config.precision.dtype])
    model = Model(config, grid, kernels, vocab_size, device)
    if initialise:
        model.initialise(config.train.seed)
    step = TrainStep(config, model, kernels)
    return Engine(grid, kernels, model, step)


def _refuse_useless_freeze(config: Config, vocab_size: int) -> None:
    names, patterns = [spec.name for spec in tensors(config.model, vocab_size)], config.optimizer.freeze
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"optimizer.freeze = {pattern!r} fits none of the model's {len(names)} tensors, such as {names[0]}."
            )
    if patterns and all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names):
        raise ValueError(f"optimizer.freeze = {patterns} freezes all {len(names)} tensors: leave one to train.")
