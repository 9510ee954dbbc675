"""Span corruption (T5, arXiv 1910.10683, section 3.1.4)."""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window


def build(window: Window, setting: Setting) -> Example:
    """[N + 1] tokens -> source with a sentinel for each hidden span, target of sentinels and spans; all lengths fixed.

    The first N tokens are cut into runs that are left and runs that are hidden, in turn, the first left and the last
    hidden; all ways to do so are alike, which gives spans a mean of ``mask_span``. Source and target end in the
    end-of-document token. No place of either is padding (``config/lengths.py``).
    """
    assert setting.sentinels is not None and setting.eod is not None
    tokens, draw, plan = window.tokens[:-1], Draw(setting, window.number), setting.corruption
    assert plan is not None and len(tokens) == plan.tokens
    left, hidden = draw.parts(plan.tokens - plan.hidden, plan.spans), draw.parts(plan.hidden, plan.spans)
    sentinels = setting.sentinels[: plan.spans]
    covered = np.repeat(np.tile([False, True], plan.spans), np.stack((left, hidden), 1).ravel())
    source = np.insert(tokens[~covered], np.cumsum(left), sentinels)
    target = np.insert(tokens[covered], np.cumsum(hidden) - hidden, sentinels)
    source, target = (np.append(part, setting.eod) for part in (source, target))
    return Example(shifted(target, setting), target, np.ones(len(target), np.float32), source=source)


def shifted(target: np.ndarray, setting: Setting) -> np.ndarray:
    """What a decoder reads to write ``target``: the start token, then all but the last."""
    assert setting.start is not None
    return np.concatenate(([setting.start], target[:-1]))
