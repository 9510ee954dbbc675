"""Next-token prediction (GPT, Radford et al. 2018)."""

from __future__ import annotations

import numpy as np

from megapre.objectives.example import Example, Setting


def build(tokens: np.ndarray, sample: int, setting: Setting) -> Example:
    """Each token predicts the one after it: int64 [L + 1] -> inputs [L], targets [L], weights [L].

    With ``eod_mask_loss`` an end-of-document token predicts nothing: what follows it is another document.
    Raises ValueError when ``eod_mask_loss`` is set and the end-of-document id is unknown.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    weights = np.ones(len(inputs), np.float32)
    if setting.eod_mask_loss:
        if setting.eod is None:
            raise ValueError(
                "data.eod_mask_loss = true needs the end-of-document id, which is recorded in the .json beside "
                "the .bin/.idx pair and is missing there."
            )
        weights[inputs == setting.eod] = 0.0
    return Example(inputs, targets, weights)
