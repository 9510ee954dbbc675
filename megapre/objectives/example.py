"""What every objective takes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Setting:
    """Facts of the data and choices of the job that objectives read."""

    vocab_size: int
    seed: int
    stream: int = 0
    """Separates the randomness of splits under one seed."""
    eod: int | None = None
    """Id of the end-of-document token, when it is known."""
    eod_mask_loss: bool = False
    mask_token: int = 0
    mask_probability: float = 0.15


@dataclass(frozen=True)
class Example:
    """What a model is shown of a sample and what it is asked. None: the objective makes no such thing."""

    inputs: np.ndarray
    """int64 [L]; of an encoder-decoder model, what its decoder reads."""
    targets: np.ndarray
    """int64 [L]."""
    weights: np.ndarray
    """float32 [L], 1 where the target counts in the loss."""
    positions: np.ndarray | None = None
    """int64 [L]; None: 0 to L - 1, or by document with ``data.reset_positions``."""
    segments: np.ndarray | None = None
    """int64 [L]; attention stays inside a number. Padding, where it cannot be avoided, has one of its own."""
    source: np.ndarray | None = None
    """int64 [source length]: what the encoder of an encoder-decoder model reads."""
    source_segments: np.ndarray | None = None
    """int64 [source length]: ``segments`` of the source, to which cross-attention keeps as well."""
    token_types: np.ndarray | None = None
    """int64 [L]: 0 in the first of two segments of text, 1 in the second (BERT)."""
    prefix: int | None = None
    """Leading tokens that see each other both ways."""
    label: int | None = None
    """Class of the whole sample."""
    label_weight: float = 1.0
    """1 where ``label`` counts in the loss."""
    ranks: np.ndarray | None = None
    """int64 [L]: place of each token in the factorisation order (XLNet); content sees ranks <= its own, a query <."""


Build = Callable[[np.ndarray, int, Setting], Example]
"""(tokens int64 [L + 1], number of the sample, setting) -> example; a pure function."""
