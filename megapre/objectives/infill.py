"""Fill in the middle (Bavarian et al., arXiv 2207.14255): documents rearranged so that the end is asked for last.

PSM: <prefix> a <suffix> c <middle> b, SPM: <prefix> <suffix> c <middle> a b, for a document a b c cut at two places.
Context-level: what a window holds of a document is a document, so that no cut falls between its parts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megapre.objectives.causal import following
from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window

ADDED = 3
"""Ids that rearranging adds to a document."""


def build(window: Window, setting: Setting) -> Example:
    """[L + 1] tokens -> the causal example of L + 1 tokens in which ``fim_rate`` of the documents are rearranged.

    The room of the added ids is taken from the end of the window before anything is cut, so every document that is
    rearranged can be put together again. An end-of-document token stays last.
    """
    draw, tokens, bounds = Draw(setting, window.number), window.tokens, window.documents
    room, parts, starts = len(tokens), [], []
    chances, orders = draw.uniform(2 * (len(bounds) - 1)).reshape(2, -1)
    for index, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        starts.append(len(tokens) - room)
        part = tokens[start : min(stop, start + room)]
        if chances[index] < setting.fim_rate and room > ADDED:
            part = _rearrange(part[: room - ADDED], bool(orders[index] < setting.fim_spm_rate), draw, setting)
        parts.append(part)
        room -= len(part)
        if not room:
            break
    example = following(np.concatenate(parts), setting)
    length = len(tokens) - 1
    return replace(example, documents=np.array([*(start for start in starts if start < length), length]))


def _rearrange(document: np.ndarray, spm: bool, draw: Draw, setting: Setting) -> np.ndarray:
    assert setting.fim is not None
    ended = setting.eod is not None and document[-1] == setting.eod
    body, end = (document[:-1], document[-1:]) if ended else (document, document[:0])
    low, high = sorted(draw.below(len(body) + 1, 2).tolist())
    prefix, middle, suffix = body[:low], body[low:high], body[high:]
    a, c, b = ([token] for token in setting.fim)
    if spm:
        return np.concatenate((a, c, suffix, b, prefix, middle, end))
    return np.concatenate((a, prefix, c, suffix, b, middle, end))
