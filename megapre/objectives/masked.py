"""Masked language modelling (BERT, arXiv 1810.04805)."""

from __future__ import annotations

import numpy as np

from megapre.objectives.example import Example, Setting

MASKED, RANDOM = 0.8, 0.1
"""Of the chosen tokens 80 % become the mask, 10 % a random token, 10 % stay."""


def build(tokens: np.ndarray, sample: int, setting: Setting) -> Example:
    """Hide ``mask_probability`` of the first L tokens of int64 [L + 1] and ask for them back.

    The number of targets is fixed, max(1, round(p L)); end-of-document tokens are chosen only when nothing else is
    there. Philox keyed by (seed, sample), read as raw 64-bit words: numpy's generator methods may change their
    stream between versions, the words may not.
    """
    targets = tokens[:-1]
    length = len(targets)
    generator = np.random.Philox(key=[setting.seed % 2**64, sample], counter=[0, 0, 0, setting.stream])
    order, kind, draw = generator.random_raw(3 * length).reshape(3, length)
    if setting.eod is not None:
        # The top bit puts the end-of-document tokens behind all others.
        order = np.where(targets == setting.eod, order | np.uint64(1 << 63), order >> np.uint64(1))
    wanted = max(1, round(setting.mask_probability * length))
    chosen = np.argpartition(order, wanted - 1)[:wanted]
    share = (kind[chosen] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    replacement = (draw[chosen] % np.uint64(setting.vocab_size)).astype(np.int64)
    hidden = np.where(share < MASKED, setting.mask_token, replacement)
    inputs = targets.copy()
    inputs[chosen] = np.where(share < MASKED + RANDOM, hidden, targets[chosen])
    weights = np.zeros(length, np.float32)
    weights[chosen] = 1.0
    return Example(inputs, targets, weights)
