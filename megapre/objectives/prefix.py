"""Prefix language modelling (UniLM, arXiv 1905.03197; T5, arXiv 1910.10683 section 3.2.1; GLM, arXiv 2103.10360).

The first tokens see each other both ways and are only read; the rest is predicted from left to right.
"""

from __future__ import annotations

from dataclasses import replace

from megapre.objectives.causal import following
from megapre.objectives.draw import Draw
from megapre.objectives.example import Example, Setting, Window


def build(window: Window, setting: Setting) -> Example:
    """[L + 1] tokens -> the causal example, of which a prefix of 1 to L tokens, each length alike, is only read.

    The last token of the prefix predicts the first one behind it. The others' next tokens are in plain sight.
    """
    example = following(window.tokens, setting)
    prefix = 1 + Draw(setting, window.number).integer(len(example.inputs))
    example.weights[: prefix - 1] = 0.0
    return replace(example, prefix=prefix)
