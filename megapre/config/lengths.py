"""How long what an objective makes is: pure arithmetic, which rules, loader and objectives share."""

from __future__ import annotations

from typing import NamedTuple

from megapre.config.schema import Config, DataConfig


class Corruption(NamedTuple):
    """Span corruption of a window of ``tokens`` (T5, arXiv 1910.10683)."""

    tokens: int
    hidden: int
    """Tokens that are replaced by sentinels."""
    spans: int
    """Runs that they stand in, each with a sentinel of its own."""

    @property
    def source(self) -> int:
        """What the encoder reads: the tokens left, the sentinels and an end-of-document token."""
        return self.tokens - self.hidden + self.spans + 1

    @property
    def target(self) -> int:
        """What the decoder writes: the hidden tokens, the sentinels before each span and an end-of-document token."""
        return self.hidden + self.spans + 1


def corruption(tokens: int, data: DataConfig) -> Corruption:
    """Numbers of hidden tokens and spans of a window; as T5 rounds them."""
    hidden = min(max(1, round(tokens * data.mask_probability)), tokens - 1)
    spans = min(max(1, round(hidden / data.mask_span)), hidden, tokens - hidden)
    return Corruption(tokens, hidden, spans)


def corruption_of_source(source: int, data: DataConfig) -> Corruption:
    """The window whose corrupted form fills an encoder of ``source`` tokens: the largest one, as T5 chooses it."""
    tokens = 2
    while corruption(tokens + 1, data).source <= source:
        tokens += 1
    return corruption(tokens, data)


class Noise(NamedTuple):
    """Deletion and infilling of a window (BART, arXiv 1910.13461)."""

    tokens: int
    deleted: int
    hidden: int
    masks: int
    """Each stands for a span of any number of hidden tokens, 0 among them."""

    @property
    def source(self) -> int:
        """What the encoder reads."""
        return self.tokens - self.deleted - self.hidden + self.masks


def noise(tokens: int, data: DataConfig) -> Noise:
    """Numbers of deleted and hidden tokens and of masks of a window."""
    deleted = min(round(tokens * data.delete_probability), tokens - 1)
    left = tokens - deleted
    hidden = min(round(left * data.mask_probability), left)
    masks = min(max(1, round(hidden / data.mask_span)), left - hidden + 1) if hidden else 0
    return Noise(tokens, deleted, hidden, masks)


def window(config: Config) -> int:
    """Tokens of the data that one sample uses up."""
    if config.data.objective == "span_corruption":
        return corruption_of_source(config.model.source_sequence, config.data).tokens
    return config.model.sequence
