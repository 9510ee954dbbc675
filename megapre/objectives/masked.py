"""Masked language modelling (BERT, arXiv 1810.04805; masked anew at each visit as in RoBERTa, arXiv 1907.11692)."""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw, shares
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.units import choose

MASKED, RANDOM = 0.8, 0.1
"""Of the chosen units 80 % become the mask, 10 % random tokens, 10 % stay."""


def build(window: Window, setting: Setting) -> Example:
    """Hide ``mask_probability`` of the first L of [L + 1] tokens and ask for them back.

    End-of-document tokens are chosen only when nothing else is there.
    """
    targets = window.tokens[:-1]
    able = np.ones(len(targets), bool) if setting.eod is None else targets != setting.eod
    inputs, weights = hide(targets, able, Draw(setting, window.number), setting)
    return Example(inputs, targets, weights)


def hide(tokens: np.ndarray, able: np.ndarray, draw: Draw, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """``tokens`` with some of the places that are ``able`` hidden, and weights, float32, 1 at those places."""
    chosen, units = choose(tokens, able, draw, setting)
    kind, other = draw.words(2 * len(tokens)).reshape(2, len(tokens))
    share = shares(kind[units])  # one fate for all tokens of a unit
    replacement = (other[chosen] % np.uint64(setting.vocab_size)).astype(np.int64)
    hidden = np.where(share < MASKED, setting.mask_token, replacement)
    inputs = tokens.copy()
    inputs[chosen] = np.where(share < MASKED + RANDOM, hidden, tokens[chosen])
    weights = np.zeros(len(tokens), np.float32)
    weights[chosen] = 1.0
    return inputs, weights
