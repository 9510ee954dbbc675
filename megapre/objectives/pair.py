"""Two texts as one row, for objectives that ask how they belong together."""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting
from megapre.objectives.masked import hide

ADDED = 3
"""[CLS] and two [SEP]."""


def pair(first: np.ndarray, second: np.ndarray, label: int, draw: Draw, setting: Setting) -> Example:
    """[CLS] first [SEP] second [SEP], then padding; tokens of both texts are hidden as in masked modelling.

    Padding is a segment of its own, with weight 0.
    """
    assert setting.cls is not None and setting.sep is not None and setting.pad is not None
    cls, sep = [setting.cls], [setting.sep]
    tokens = np.concatenate((cls, first, sep, second, sep)).astype(np.int64)
    used, length = len(tokens), setting.length
    assert used <= length
    able = np.ones(used, bool) if setting.eod is None else tokens != setting.eod
    able[[0, len(first) + 1, used - 1]] = False
    inputs, weights = hide(tokens, able, draw, setting)
    places = np.arange(length, dtype=np.int64)
    return Example(
        inputs=np.append(inputs, np.full(length - used, setting.pad)),
        targets=np.append(tokens, np.full(length - used, setting.pad)),
        weights=np.append(weights, np.zeros(length - used, np.float32)),
        segments=(places >= used).astype(np.int64),
        token_types=((places >= len(first) + 2) & (places < used)).astype(np.int64),
        label=label,
    )
