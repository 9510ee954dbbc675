"""An example of an objective as text, for people."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megapre.objectives.example import Example
from megapre.tokenizers.base import Tokenizer

SHOWN = 12
"""Targets of a row that are listed one by one."""


def lines(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Name and text of what is read and what is asked for."""

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist())

    asked = example.weights > 0
    if example.source is not None:
        yield "encoder reads", text(example.source)
        yield "decoder reads", text(example.inputs)
        yield "decoder writes", text(example.targets)
    elif example.prefix is not None:
        yield f"prefix, {example.prefix} tokens both ways", text(example.inputs[: example.prefix])
        yield "to be continued with", text(example.targets[example.prefix - 1 :])
    elif _next_token(example):
        yield "reads", text(example.inputs)
        yield "writes after each token", text(example.targets)
    else:
        padded = example.label is not None and example.segments is not None
        yield "reads", text(example.inputs[example.segments == 0] if padded else example.inputs)
        places = np.flatnonzero(asked)
        if example.ranks is not None:
            places = places[np.argsort(example.ranks[places])]
        shown = [(text(example.inputs[[p]]), text(example.targets[[p]]), p) for p in places[:SHOWN]]
        pairs = (f"{read!r}->{target!r}@{place}" for read, target, place in shown)
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        order = "in this order" if example.ranks is not None else "read->asked@place"
        yield f"asked for ({order})", " ".join(pairs) + more
    if example.token_types is not None:
        yield "second text", text(example.targets[example.token_types == 1])
    if example.label is not None:
        yield "label", str(example.label)
    yield "targets", f"{int(asked.sum())} of {len(asked)} places"


def _next_token(example: Example) -> bool:
    return example.ranks is None and np.array_equal(example.inputs[1:], example.targets[:-1])
