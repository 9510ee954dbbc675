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


Example = tuple[np.ndarray, np.ndarray, np.ndarray]
"""inputs int64 [L], targets int64 [L], weights float32 [L]."""

Build = Callable[[np.ndarray, int, Setting], Example]
"""(tokens int64 [L + 1], number of the sample, setting) -> example; a pure function."""
