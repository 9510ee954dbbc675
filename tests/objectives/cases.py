"""Windows and settings for the tests of this folder."""

from __future__ import annotations

import os
import random

import numpy as np

from megapre.config.lengths import corruption_of_source, noise
from megapre.config.schema import DataConfig
from megapre.objectives.example import Setting, Window

SEED = int(os.environ.get("MEGAPRE_SEED", random.SystemRandom().randrange(2**31)))
print(f"objectives: MEGAPRE_SEED={SEED}")

VOCAB = 5000
EOD, MASK, CLS, SEP, PAD, START = 0, 4999, 4998, 4997, 4996, 4995
FIM = (4990, 4991, 4992)
SENTINELS = np.arange(4989, 4889, -1)
FIRST, LAST = 1, 4800
"""Ordinary ids, so that whatever an objective adds is told apart."""


def setting(**changes) -> Setting:
    """A setting with every special id, of this run's seed."""
    known = {
        "vocab_size": VOCAB, "seed": SEED, "eod": EOD, "mask_token": MASK, "cls": CLS, "sep": SEP, "pad": PAD,
        "start": START, "fim": FIM, "sentinels": SENTINELS, "length": 128,
    }  # fmt: skip
    return Setting(**{**known, **changes})


def window(length: int, number: int = 0, *, documents: int = 1, sentences: bool = False, eod: bool = True) -> Window:
    """``length`` + 1 random tokens in documents of random lengths that end in EOD, but for the last."""
    rng = np.random.default_rng([SEED, number, length])
    tokens = rng.integers(FIRST, LAST, length + 1)
    cuts = np.sort(rng.choice(np.arange(1, length + 1), documents - 1, replace=False))
    bounds = np.concatenate(([0], cuts, [length + 1]))
    if eod:
        tokens[bounds[1:-1] - 1] = EOD
    found = None
    if sentences:
        more = rng.choice(np.arange(1, length + 1), length // 8, replace=False)
        found = np.unique(np.concatenate((bounds, more)))
    return Window(number, tokens, bounds, found)


def spans_of(data: DataConfig, source: int) -> Setting:
    """The setting of span corruption."""
    return setting(corruption=corruption_of_source(source, data), mask_span=data.mask_span)


def noisy(length: int, **data) -> Setting:
    """The setting of denoising."""
    job = DataConfig(**{"mask_probability": 0.3, **data})
    return setting(
        length=length, noise=noise(length, job), mask_probability=job.mask_probability, mask_span=job.mask_span,
        permute_sentences=job.permute_sentences, rotate_documents=job.rotate_documents,
    )  # fmt: skip


def within(count: float, n: float, share: float, sigmas: float = 5.0) -> None:
    """``count`` of ``n`` trials of probability ``share`` is within confidence bounds."""
    bound = sigmas * (n * share * (1 - share)) ** 0.5 + 1
    assert abs(count - share * n) < bound, f"{count} of {n} where {share} is wanted (MEGAPRE_SEED={SEED})"
