"""Objectives by name."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType

from megapre.objectives.example import Build

OBJECTIVES = MappingProxyType(
    {
        "causal": "megapre.objectives.causal",
        "masked": "megapre.objectives.masked",
    }
)


def load(name: str) -> Build:
    """The ``build`` function of an objective; ValueError on an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(f"data.objective = {name!r} is unknown; the objectives are {', '.join(OBJECTIVES)}.")
    build: Build = import_module(OBJECTIVES[name]).build
    return build
