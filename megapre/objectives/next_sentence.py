"""Next-sentence prediction beside masked modelling (BERT, arXiv 1810.04805)."""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.pair import ADDED, pair

IS_NEXT, IS_RANDOM = 0, 1


def build(window: Window, setting: Setting) -> Example:
    """Sentences of one document, and of another -> a pair: half of the time the second text follows the first.

    The first text is a random number of the leading sentences. The second is the rest, or as many of the last
    sentences of the other document as there is room for: both end a row, so neither end nor length tells them apart.
    """
    assert window.sentences is not None and window.other is not None and window.other.sentences is not None
    draw = Draw(setting, window.number)
    cut = int(window.sentences[1 + draw.integer(len(window.sentences) - 2)])
    first, second = window.tokens[:cut], window.tokens[cut:]
    if draw.happens(0.5):
        return pair(first, second, IS_NEXT, draw, setting)
    room, other = setting.length - ADDED - len(first), window.other
    starts = window.other.sentences[:-1]
    fits = starts[len(other.tokens) - starts <= room]
    begin = int(fits[0] if len(fits) else starts[-1])
    return pair(first, np.asarray(other.tokens[begin:][:room]), IS_RANDOM, draw, setting)
