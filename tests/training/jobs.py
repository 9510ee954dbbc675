"""A small job over a small corpus, and rank functions that run it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

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
