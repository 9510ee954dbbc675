"""What every objective takes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megapre.config.lengths import Corruption, Noise


@dataclass(frozen=True)
class Setting:
    """Facts of the data and choices of the job that objectives read. Special ids are None where none is known."""

    vocab_size: int
    seed: int
    length: int = 0
    """Tokens of an example: ``model.sequence``."""
    stream: int = 0
    """Separates the randomness of splits under one seed."""
    eod: int | None = None
    """Id of the end-of-document token."""
    eod_mask_loss: bool = False
    mask_token: int = 0
    mask_probability: float = 0.15
    mask_unit: str = "token"
    mask_span: float = 3.0
    joins: np.ndarray | None = None
    """uint8 [vocab_size]: bit 0, a word may go on into this token; bit 1, it may go on after it."""
    cls: int | None = None
    sep: int | None = None
    pad: int | None = None
    start: int | None = None
    """First token that a decoder reads."""
    fim: tuple[int, int, int] | None = None
    """Ids that announce the prefix, the suffix and the middle."""
    sentinels: np.ndarray | None = None
    """int64: ids that stand for the first hidden span, the second, ..."""
    fim_rate: float = 0.5
    fim_spm_rate: float = 0.5
    corruption: Corruption | None = None
    """Lengths of span corruption."""
    noise: Noise | None = None
    """Lengths of denoising."""
    permute_sentences: float = 0.0
    rotate_documents: float = 0.0


@dataclass(frozen=True)
class Window:
    """What the data gives for one sample."""

    number: int
    """Of the sample in the run, never the same twice: with the seed it keys all randomness (dynamic masking)."""
    tokens: np.ndarray
    """int64 [n], n one more than the objective asked for, so that each token has a next one."""
    documents: np.ndarray
    """int64: where each document begins in ``tokens``, ascending from 0, and n."""
    sentences: np.ndarray | None = None
    """The same of sentences, for objectives that read them; n is then their sum, whatever was asked for."""
    other: Window | None = None
    """Sentences of another document, for objectives that pair two."""


@dataclass(frozen=True)
class Example:
    """What a model is shown of a sample and what it is asked. None: the objective makes no such thing."""

    inputs: np.ndarray
    """int64 [L]; of an encoder-decoder model, what its decoder reads."""
    targets: np.ndarray
    """int64 [L]."""
    weights: np.ndarray
    """float32 [L], 1 where the target counts in the loss."""
    documents: np.ndarray | None = None
    """int64: where each document begins in ``inputs``, and L; None: as in the window."""
    positions: np.ndarray | None = None
    """int64 [L]; None: 0 to L - 1, or by document with ``data.reset_positions``."""
    segments: np.ndarray | None = None
    """int64 [L]; attention stays inside a number. Padding, where it cannot be avoided, has one of its own. None: by
    document with ``data.reset_attention``."""
    source: np.ndarray | None = None
    """int64 [source length]: what the encoder of an encoder-decoder model reads."""
    source_segments: np.ndarray | None = None
    """int64 [source length]: ``segments`` of the source, to which cross-attention keeps as well."""
    token_types: np.ndarray | None = None
    """int64 [L]: 0 in the first of two segments of text, 1 in the second (BERT)."""
    prefix: int | None = None
    """Leading tokens that see each other both ways."""
    label: int | None = None
    """Class of the whole sample."""
    label_weight: float = 1.0
    """1 where ``label`` counts in the loss."""
    ranks: np.ndarray | None = None
    """int64 [L]: place of each token in the factorisation order (XLNet); content sees ranks <= its own, a query <."""


Build = Callable[[Window, Setting], Example]
"""A pure function: what it draws is keyed by (``setting.seed``, ``window.number``)."""
