"""Small pairs and job configurations for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megapre.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megapre.data.indexed import IndexedWriter, token_dtype
from megapre.data.sidecar import TokenizerRecord

VOCAB = 1000
EOD = 7


def write_pair(prefix: Path, lengths: list[int], *, vocab: int = VOCAB, seed: int = 0, mask: int | None = None) -> str:
    """A pair whose documents hold random ids and end in EOD; the prefix as a string."""
    rng = np.random.default_rng(seed)
    record = TokenizerRecord("NullTokenizer", "0" * 64, vocab, EOD, mask, True)
    with IndexedWriter(str(prefix), token_dtype(vocab), record) as writer:
        for length in lengths:
            ids = rng.integers(EOD + 1, vocab, length)
            ids[-1] = EOD
            writer.add_document(ids)
    return str(prefix)


def ramp(prefix: Path, tokens: int, document: int = 50) -> str:
    """A pair whose token t is t, so that a sample shows where it was read."""
    record = TokenizerRecord("NullTokenizer", "0" * 64, tokens, None)
    with IndexedWriter(str(prefix), "<i4", record) as writer:
        for start in range(0, tokens, document):
            writer.add_document(np.arange(start, min(start + document, tokens)))
    return str(prefix)


def job(paths: list[str], *, sequence: int = 16, batch: int = 8, micro: int = 2, **data: Any) -> Config:
    """A job over ``paths``."""
    return Config(
        model=ModelConfig(sequence=sequence),
        data=DataConfig(paths=paths, **{"split": [1.0, 0.0, 0.0], **data}),
        train=TrainConfig(global_batch=batch, microbatch=micro, eval_samples=0),
    )


def with_train(config: Config, **changes: Any) -> Config:
    """The job with other ``train`` settings."""
    return replace(config, train=replace(config.train, **changes))
