"""Permuted language modelling with partial prediction (XLNet, arXiv 1906.08237)."""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.units import choose


def build(window: Window, setting: Setting) -> Example:
    """Predict the last ``mask_probability`` (1 / K) of a random factorisation order of the first L of [L + 1] tokens.

    As in the authors' code, tokens that are only read share the first rank, so they see each other; the predicted
    ones follow in random order. Nothing is hidden in ``inputs``: what a target may see, its rank says.
    """
    tokens, draw = window.tokens[:-1], Draw(setting, window.number)
    able = np.ones(len(tokens), bool) if setting.eod is None else tokens != setting.eod
    chosen, _ = choose(tokens, able, draw, setting)
    ranks, weights = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.float32)
    ranks[np.sort(chosen)] = 1 + draw.order(len(chosen))
    weights[chosen] = 1.0
    return Example(tokens, tokens.copy(), weights, ranks=ranks)
