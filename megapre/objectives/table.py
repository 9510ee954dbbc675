"""Objectives by name."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import NamedTuple

from megapre.objectives.example import Build


class Entry(NamedTuple):
    """Where an objective is, and what it must be given."""

    module: str
    needs: tuple[str, ...] = ()
    """Fields of its setting that may not be None."""
    pairs: int = 0
    """1: reads rows of sentences of one document; 2: and such a row of another document; 0: reads windows."""


OBJECTIVES = MappingProxyType(
    {
        "causal": Entry("causal"),
        "infill": Entry("infill", ("fim",)),
        "prefix": Entry("prefix"),
        "masked": Entry("masked"),
        "replaced": Entry("replaced"),
        "permuted": Entry("permuted"),
        "next_sentence": Entry("next_sentence", ("cls", "sep", "pad"), 2),
        "sentence_order": Entry("sentence_order", ("cls", "sep", "pad"), 1),
        "span_corruption": Entry("span_corruption", ("sentinels", "eod", "start")),
        "denoising": Entry("denoising", ("start",)),
    }
)


def load(name: str) -> Build:
    """The ``build`` function of an objective; ValueError on an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(f"data.objective = {name!r} is unknown; the objectives are {', '.join(OBJECTIVES)}.")
    build: Build = import_module(f"megapre.objectives.{OBJECTIVES[name].module}").build
    return build
