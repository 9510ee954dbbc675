"""What a run computes with on one rank. Train, verify and generate all build it here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megapre.config.schema import Config
from megapre.kernels.registry import Kernels, choose
from megapre.models.build import DTYPES, Model
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
    """An engine with initial weights, or with zeros for who only wants shapes."""
    kernels = choose(config.kernels, device, DTYPES[config.precision.dtype])
    model = Model(config, grid, kernels, vocab_size, device)
    if initialise:
        model.initialise(config.train.seed)
    step = TrainStep(config, model, kernels)
    return Engine(grid, kernels, model, step)
