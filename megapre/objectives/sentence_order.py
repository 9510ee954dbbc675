"""Sentence-order prediction beside masked modelling (ALBERT, arXiv 1909.11942)."""

from __future__ import annotations

from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.pair import pair

IN_ORDER, SWAPPED = 0, 1


def build(window: Window, setting: Setting) -> Example:
    """Sentences of one document -> two texts that follow one another, half of the time swapped."""
    assert window.sentences is not None
    draw = Draw(setting, window.number)
    cut = int(window.sentences[1 + draw.integer(len(window.sentences) - 2)])
    first, second = window.tokens[:cut], window.tokens[cut:]
    if draw.happens(0.5):
        return pair(first, second, IN_ORDER, draw, setting)
    return pair(second, first, SWAPPED, draw, setting)
