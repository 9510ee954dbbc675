"""Denoising (BART, arXiv 1910.13461): the decoder writes the window as it was, the encoder reads it damaged.

In this order: sentence permutation, document rotation, token deletion, text infilling.
"""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.span_corruption import shifted


def build(window: Window, setting: Setting) -> Example:
    """[L + 1] tokens -> source of fixed length, the first L as target.

    * ``permute_sentences``: share of windows in which the sentences of each document are shuffled.
    * ``rotate_documents``: share of windows in which each document begins at a random token of it.
    * ``delete_probability``: share of tokens that are left out.
    * infilling: ``mask_probability`` of the tokens that are left go, in spans with a mask each. Span lengths are
      Poisson(``mask_span``) given their number and their sum, that is multinomial, so the source never needs
      padding; a span of no token is a mask that stands for nothing.
    """
    tokens, draw, plan = window.tokens[:-1], Draw(setting, window.number), setting.noise
    assert plan is not None and plan.tokens == len(tokens)
    order = np.arange(len(tokens))
    if draw.happens(setting.permute_sentences):
        order = _permuted(order, window, draw)
    if draw.happens(setting.rotate_documents):
        order = np.concatenate([np.roll(part, -draw.integer(len(part))) for part in _cut(order, window.documents)])
    source = tokens[order]
    if plan.deleted:
        source = np.delete(source, draw.subset(len(source), plan.deleted))
    if plan.hidden:
        source = _infilled(source, plan.hidden, plan.masks, draw, setting)
    return Example(shifted(tokens, setting), tokens, np.ones(len(tokens), np.float32), source=source)


def _cut(order: np.ndarray, bounds: np.ndarray) -> list[np.ndarray]:
    """The parts of ``order`` between bounds, of which the last may lie behind its end."""
    return [part for part in np.split(order, bounds[1:-1][bounds[1:-1] < len(order)]) if len(part)]


def _permuted(order: np.ndarray, window: Window, draw: Draw) -> np.ndarray:
    assert window.sentences is not None
    made = []
    for document in _cut(order, window.documents):
        inside = (window.sentences > document[0]) & (window.sentences <= document[-1])
        sentences = np.split(document, window.sentences[inside] - document[0])
        made += [sentences[i] for i in draw.order(len(sentences))]
    return np.concatenate(made)


def _infilled(tokens: np.ndarray, hidden: int, masks: int, draw: Draw, setting: Setting) -> np.ndarray:
    """Replace ``hidden`` tokens, in ``masks`` spans between which at least one token is left, by a mask each."""
    lengths = np.bincount(draw.below(masks, hidden), minlength=masks)
    left = len(tokens) - hidden
    gaps = draw.subset(left + 1, masks)  # tokens that are left before each span
    begins = gaps + np.cumsum(lengths) - lengths
    covered = np.zeros(len(tokens) + 1, np.int64)
    np.add.at(covered, begins, 1)
    np.add.at(covered, begins + lengths, -1)
    kept = tokens[np.cumsum(covered[:-1]) == 0]
    return np.insert(kept, gaps, setting.mask_token)
