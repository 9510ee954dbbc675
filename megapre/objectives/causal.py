"""Next-token prediction (GPT, Radford et al. 2018)."""

from __future__ import annotations

import numpy as np

from megapre.objectives.example import Example, Setting, Window


def build(window: Window, setting: Setting) -> Example:
    """Each token predicts the one after it: [L + 1] -> inputs [L], targets [L], weights [L]."""
    return following(window.tokens, setting)


def following(tokens: np.ndarray, setting: Setting) -> Example:
    """The example of int64 [L + 1].

    With ``eod_mask_loss`` an end-of-document token predicts nothing: what follows it is another document.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    weights = np.ones(len(inputs), np.float32)
    if setting.eod_mask_loss:
        assert setting.eod is not None, "refused before: data/setting.py"
        weights[inputs == setting.eod] = 0.0
    return Example(inputs, targets, weights)
