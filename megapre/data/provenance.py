"""Where each sample of a run comes from, and when a document is seen: computed, since the order is a function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megapre.config.ramp import Steps
from megapre.config.schema import Config
from megapre.data.samples import Samples


@dataclass(frozen=True)
class Piece:
    """Tokens of one document inside a sample."""

    sample: int
    path: str
    document: int
    offset: int
    """First of its tokens inside the document."""
    tokens: int


@dataclass(frozen=True)
class Visit:
    """A sample that holds tokens of a document."""

    step: int
    sample: int
    epoch: int


def step_samples(config: Config, step: int) -> range:
    """Numbers of the samples of a step."""
    plan = Steps(config).at(step)
    return range(plan.first, plan.first + plan.samples)


def pieces(samples: Samples, number: int) -> Iterator[Piece]:
    """The documents of sample ``number``, in order; its last token is a target only."""
    source, rank = samples.locate(number)
    for start, stop in samples.spans(source, rank):
        at = start
        while at < stop:
            document, begin, end = source.dataset.document_at(at)
            upto = min(end, stop)
            yield Piece(number, source.path, document, at - begin, upto - at)
            at = upto


def visits(config: Config, samples: Samples, source: int, document: int, epochs: int) -> Iterator[Visit]:
    """Steps that read any token of ``document`` of source ``source`` in its first ``epochs`` epochs, by epoch.

    A document outside the split is never seen.
    """
    found, steps = samples.sources[source], Steps(config)
    start, stop = found.dataset.document_start(document), found.dataset.document_start(document + 1)
    for epoch in range(epochs):
        for rank in found.order.ranks(start, stop, epoch):
            number = samples.blend.number(source, rank)
            if number is not None:
                yield Visit(steps.step_of(number), number, epoch)
