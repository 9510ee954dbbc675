"""Which tokens are hidden: single ones, whole words, or spans of whole words."""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw
from megapre.objectives.example import Setting

LONGEST_SPAN = 10
"""Words of the longest span (SpanBERT)."""


def choose(tokens: np.ndarray, able: np.ndarray, draw: Draw, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Places to hide, int64 [k], and the first place of the unit that each is part of.

    ``able``, bool, are the places that may be chosen; others are only where too few are able. k is
    max(1, round(p n)) of n tokens; whole words may come to fewer.

    * ``token``: each alike (BERT, arXiv 1810.04805).
    * ``word``: words in random order while they fit (whole-word masking, Devlin et al. 2019).
    * ``span``: runs of 1 to 10 words from a random word on, their number geometric with p = 1 / ``mask_span``
      (SpanBERT, arXiv 1907.10529), until k places are hidden; the last span is cut.
    """
    wanted = max(1, round(setting.mask_probability * len(tokens)))
    if setting.mask_unit == "token" or not able.any():
        order = draw.words(len(tokens))
        # The top bit puts the others behind all that are able.
        order = np.where(able, order >> np.uint64(1), order | np.uint64(1 << 63))
        chosen = np.argpartition(order, wanted - 1)[:wanted]
        return chosen, chosen
    bounds = words(tokens, able, setting)
    return (_words if setting.mask_unit == "word" else _spans)(bounds, wanted, draw, setting)


def words(tokens: np.ndarray, able: np.ndarray, setting: Setting) -> np.ndarray:
    """First place and end of each word of the places that are able, int64 [words, 2]."""
    assert setting.joins is not None
    joins = setting.joins[tokens]
    goes_on = np.zeros(len(tokens), bool)
    goes_on[1:] = (joins[1:] & 1 > 0) & (joins[:-1] & 2 > 0) & able[1:] & able[:-1]
    starts = np.flatnonzero(able & ~goes_on)
    last = np.append(~goes_on[1:], True)
    return np.stack((starts, np.flatnonzero(able & last) + 1), 1)


def _words(bounds: np.ndarray, wanted: int, draw: Draw, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(bounds)[:, 0].tolist()
    order = draw.order(len(bounds)).tolist()
    kept, left = [], wanted
    for word in order:
        if lengths[word] <= left:
            kept.append(word)
            left -= lengths[word]
            if not left:
                break
    if not kept:  # every word is longer than what may be hidden: the shortest is, as one must be
        kept = [int(np.argmin(lengths))]
    return _places(bounds[np.array(kept)])


def _spans(bounds: np.ndarray, wanted: int, draw: Draw, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    p = 1.0 / setting.mask_span
    weights = (1 - p) ** np.arange(LONGEST_SPAN) * p
    cumulative = np.cumsum(weights / weights.sum())
    unit: dict[int, int] = {}
    room = min(wanted, int(np.diff(bounds).sum()))
    while len(unit) < room:
        count = 2 * room
        spans = np.minimum(np.searchsorted(cumulative, draw.uniform(count), "right"), LONGEST_SPAN - 1) + 1
        for first, length in zip(draw.below(len(bounds), count).tolist(), spans.tolist()):
            begin = int(bounds[first, 0])
            if begin in unit:
                continue
            for word in range(first, min(first + length, len(bounds))):
                # A span ends where something that may not be hidden stands between two words.
                if word > first and bounds[word, 0] != bounds[word - 1, 1]:
                    break
                for place in range(int(bounds[word, 0]), int(bounds[word, 1])):
                    if len(unit) < room:
                        unit.setdefault(place, begin)
            if len(unit) >= room:
                break
    return np.array(list(unit), np.int64), np.array(list(unit.values()), np.int64)


def _places(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places of words, and the first of each one's word."""
    lengths = np.diff(bounds)[:, 0]
    first = np.repeat(bounds[:, 0], lengths)
    within = np.arange(len(first)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return first + within, first
