"""A small job over a small corpus, a rank function that runs it, and what to read from its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapre.checkpoint import store
from megapre.config.check import check
from megapre.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from megapre.data.indexed import IndexedWriter, token_dtype
from megapre.data.sidecar import TokenizerRecord
from megapre.parallel.placement import Address
from megapre.resilience.ranks import Ranks
from megapre.resilience.signals import StopRequest
from megapre.train import run as train
from megapre.verify.cells import Cell

VOCAB = 67


def corpus(prefix: Path) -> str:
    """A pair of 60 documents in which the next token often is the last one plus one."""
    generator = np.random.default_rng(5)
    with IndexedWriter(str(prefix), token_dtype(VOCAB), TokenizerRecord("NullTokenizer", "0" * 64, VOCAB, 0)) as writer:
        for length in generator.integers(20, 80, 60):
            steps = np.where(generator.random(length) < 0.7, 1, generator.integers(0, VOCAB, length))
            ids = 1 + np.cumsum(steps) % (VOCAB - 1)
            ids[-1] = 0
            writer.add_document(ids)
    return str(prefix)


def job(prefix: str, run_dir: Path, cell: Cell, *, steps: int = 12, interval: int = 1, dtype: str = "fp32") -> Config:
    """A 12-step run that saves every step and keeps all."""
    config = Config(
        model=ModelConfig(layers=4, hidden=32, heads=4, sequence=16, vocab_size=VOCAB, dropout=0.1),
        data=DataConfig(paths=[prefix], split=[0.9, 0.1, 0.0], tokenizer_type="NullTokenizer"),
        optimizer=OptimizerConfig(lr=1e-2),
        train=TrainConfig(
            run_dir=str(run_dir), steps=steps, global_batch=8, microbatch=2, threads=1, eval_interval=5, eval_samples=7
        ),
        checkpoint=CheckpointConfig(interval=interval, keep_last=100),
    )
    config = replace(config, parallel=replace(config.parallel, bucket_elements=5000))
    precision = replace(config.precision, dtype=dtype, initial_loss_scale=2.0**24, growth_interval=3)
    config = replace(config, precision=precision)
    return check(cell.apply(config), cell.world)


def run(ranks: Ranks, config: Config) -> int:
    """Train as one rank."""
    return train(config, ranks, StopRequest())


def logical(path: Path) -> dict[str, torch.Tensor]:
    """Every logical tensor of a checkpoint."""
    found = {}
    for name, (shape, dtype) in store.names(path).items():
        flat = torch.full((int(torch.tensor(shape).prod()),), float("nan"), dtype=dtype)
        store.load(path, [(Address(name, shape, (0,) * len(shape), shape, 0, flat.numel()), flat)])
        found[name] = flat
    return found


def same(a: Path, b: Path) -> None:
    """Assert that two checkpoints hold the same bits and the same state."""
    left, right = logical(a), logical(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value.view(torch.uint8), right[name].view(torch.uint8)), name
    state_a, state_b = store.read_state(a), store.read_state(b)
    for state in (state_a, state_b):
        del state["job"], state["environment"]  # they know their run's folder
    assert state_a == state_b


def events(run_dir: Path) -> list[dict[str, Any]]:
    """What the event log of a run holds."""
    return [json.loads(line) for line in (run_dir / "log" / "events.jsonl").read_text().splitlines()]


def losses(run_dir: Path, split: str = "train", name: str = "loss") -> dict[int, str]:
    """Loss of this name by step as hexadecimal floats."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: float(row[name]).hex() for row in rows if row.get("split") == split}
