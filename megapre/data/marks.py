"""Positions and document numbers inside a sample, from the places where documents begin."""

from __future__ import annotations

import numpy as np

from megapre.data import native


def mark(starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Position inside its document, and number of the document, of each of ``length`` tokens: int64 [length] each.

    ``starts``: places where documents begin, int64, ascending; the first token begins one in any case. Empty documents
    begin where the next one does, and what begins at ``length`` or behind is of no interest.
    """
    found = native.library()
    if found is None:
        return mark_reference(starts, length)
    positions, segments = np.empty(length, np.int64), np.empty(length, np.int64)
    found.megapre_mark_documents(
        starts.ctypes.data, len(starts), length, positions.ctypes.data, segments.ctypes.data
    )  # fmt: skip
    return positions, segments


def mark_reference(starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`mark` by its definition."""
    bounds = np.unique(np.concatenate(([0], starts[(starts > 0) & (starts < length)], [length])))
    sizes = np.diff(bounds)
    return np.arange(length) - np.repeat(bounds[:-1], sizes), np.repeat(np.arange(len(sizes)), sizes)
