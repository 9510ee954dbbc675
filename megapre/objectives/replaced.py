"""Replaced-token detection (ELECTRA, arXiv 2003.10555): what its generator reads.

The generator fills in the hidden tokens; the discriminator says of every token whether it was replaced, so its truth
follows from the generator's samples and the targets.
"""

from __future__ import annotations

import numpy as np

from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.units import choose


def build(window: Window, setting: Setting) -> Example:
    """The masked example of [L + 1] tokens with every chosen one hidden: the generator itself adds the noise."""
    targets = window.tokens[:-1]
    able = np.ones(len(targets), bool) if setting.eod is None else targets != setting.eod
    chosen, _ = choose(targets, able, Draw(setting, window.number), setting)
    inputs, weights = targets.copy(), np.zeros(len(targets), np.float32)
    inputs[chosen], weights[chosen] = setting.mask_token, 1.0
    return Example(inputs, targets, weights)
