"""Sample n of a run, as numpy arrays: blend -> order -> tokens -> objective. Imports no torch.

Everything here is a pure function of the job file, the data and n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megapre.config.lengths import window
from megapre.config.schema import Config, DataConfig
from megapre.data.blend import StagedBlend
from megapre.data.indexed import IndexedDataset
from megapre.data.manifest import members
from megapre.data.marks import mark
from megapre.data.order import SampleOrder, derive_key, split_documents
from megapre.data.pack import Packs, open_packs
from megapre.data.remote import Cache, is_remote
from megapre.data.setting import make_setting
from megapre.data.stage import Stage
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.table import OBJECTIVES
from megapre.objectives.table import load as load_objective

Spans = list[tuple[int, int]]
"""Ranges [start, stop) of a source's tokens."""
SPLITS = ("train", "valid", "test")
DRAWS = 64
"""Rows that are drawn to find one of another document."""


@dataclass(frozen=True)
class Sample:
    """One sample of a run."""

    number: int
    example: Example
    """With its positions; with segments where attention is kept apart."""


@dataclass(frozen=True)
class Source:
    """One path of ``data.paths`` cut to a split."""

    path: str
    dataset: IndexedDataset
    order: SampleOrder
    setting: Setting
    packs: Packs | None = None
    """Rows of whole documents or of sentences; then ``order`` counts rows as windows of one token."""


class Samples:
    """All samples of one split of a job, by number from 0, without end.

    Raises ValueError when a path cannot be read, the split is too small or an id is not below ``vocab_size``.
    """

    def __init__(self, config: Config, *, vocab_size: int, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split = {split!r} is unknown; the splits are {', '.join(SPLITS)}.")
        self.length, self.window = config.model.sequence, window(config)
        self.vocab_size = vocab_size
        self.data = config.data
        self._build, self._pairs = load_objective(config.data.objective), OBJECTIVES[config.data.objective].pairs
        self.cache = make_cache(config)
        datasets = open_sets(config, self.cache)
        weights = sample_weights(config, datasets)
        which = SPLITS.index(split)
        self.sources: list[Source] = []
        kept = []
        for number, dataset in enumerate(datasets):
            packs, length = None, self.window
            lo, hi = split_tokens(dataset, config.data)[which]
            setting = make_setting(config, dataset, vocab_size, which)
            if self._pairs or config.data.packing == "best-fit":
                packs = open_packs(dataset, self.length, config.data.split, which, sentences=self._pairs > 0)
                lo, hi, length = 0, packs.count, 1
            # A source may be too small to validate on, or rest in the first stage, whose shares validation has; it may
            # not silently vanish from training.
            if split != "train" and (hi - lo < length + 1 or not weights[0][number]):
                continue
            stream = number * len(SPLITS) + which
            order = SampleOrder(config.data.seed, stream, lo, hi, length, f"{dataset.prefix} ({split})")
            self.sources.append(Source(dataset.prefix, dataset, order, setting, packs))
            kept.append([stage[number] for stage in weights])
        if not self.sources:
            raise no_sample(config, split)
        names = [source.path for source in self.sources]
        # Validation and test are drawn by the first stage's shares throughout.
        stages = config.data.stages if split == "train" else []
        self.blend = StagedBlend([list(row) for row in zip(*kept)][: len(stages) + 1], stages, names)

    def locate(self, number: int) -> tuple[Source, int]:
        """Source of sample ``number`` and its rank among that source's samples."""
        source, rank = self.blend.locate(number)
        return self.sources[source], rank

    def spans(self, source: Source, rank: int) -> Spans:
        """Token ranges of sample ``rank`` of a source: a window and the token behind it, or those of a packed row."""
        if source.packs is not None:
            return source.packs.row(source.order.window(rank))
        return source.order.spans(rank)

    def prefetch(self, number: int) -> None:
        """Say that sample ``number`` will be read soon; nothing happens unless its source is remote."""
        if self.cache is not None:
            source, rank = self.locate(number)
            for start, stop in self.spans(source, rank):
                source.dataset.prefetch(start, stop)

    def sample(self, number: int) -> Sample:
        """Sample ``number``; ValueError on a token id that the model's vocabulary does not have."""
        source, rank = self.locate(number)
        spans = self.spans(source, rank)
        read = self._sentences if self._pairs else self._whole_documents if source.packs is not None else self._window
        window = read(number, source, spans)
        example = self._build(window, source.setting)
        if source.packs is not None and not self._pairs:
            ends = np.cumsum([stop - start for start, stop in spans])
            example.weights[ends[-1] :] = 0.0
            if self.data.objective == "causal":  # no document predicts the next one
                example.weights[ends - 1] = 0.0
        return Sample(number, self._placed(example, window))

    def _placed(self, example: Example, window: Window) -> Example:
        """The example with positions, and segments where attention is kept apart."""
        if not (self.data.reset_positions or self.data.reset_attention):
            return replace(example, positions=np.arange(self.length, dtype=np.int64))
        documents = example.documents if example.documents is not None else window.documents
        positions, segments = mark(documents, self.length)
        if not self.data.reset_positions:
            positions = np.arange(self.length, dtype=np.int64)
        return replace(
            example, positions=positions, segments=segments if self.data.reset_attention else example.segments
        )

    def _tokens(self, source: Source, spans: Spans) -> np.ndarray:
        parts = [source.dataset.read(start, stop) for start, stop in spans]
        stored = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._check_ids(stored, source)
        return stored.astype(np.int64)

    def _window(self, number: int, source: Source, spans: Spans) -> Window:
        """A window of a source's stored order, and the token behind it."""
        tokens, dataset = self._tokens(source, spans), source.dataset
        sentences = _bounds(spans, dataset.sequence_starts) if self.data.permute_sentences else None
        return Window(number, tokens, _bounds(spans, dataset.document_starts), sentences)

    def _whole_documents(self, number: int, source: Source, spans: Spans) -> Window:
        """A row of whole documents; what is left of it is end-of-document tokens that nothing is learnt from."""
        tokens = self._tokens(source, spans)
        ends = np.cumsum([stop - start for start, stop in spans])
        row = np.append(tokens, np.full(self.length + 1 - len(tokens), source.setting.eod or 0))
        rest = [self.length] if ends[-1] < self.length else []
        return Window(number, row, np.concatenate(([0], ends, rest)).astype(np.int64))

    def _sentences(self, number: int, source: Source, spans: Spans) -> Window:
        """A row of sentences of one document, and one of another document for objectives that pair two."""
        other = None if self._pairs < 2 else self._row(number, source, self._stranger(number, source, spans))
        return replace(self._row(number, source, spans), other=other)

    def _row(self, number: int, source: Source, spans: Spans) -> Window:
        ends = np.cumsum([0, *(stop - start for start, stop in spans)])
        return Window(number, self._tokens(source, spans), ends[[0, -1]], ends)

    def _stranger(self, number: int, source: Source, spans: Spans) -> Spans:
        """A row of another document than that of ``spans``, drawn by the sample's number."""
        assert source.packs is not None
        own, setting = source.dataset.document_at(spans[0][0])[0], source.setting
        for attempt in range(DRAWS):
            drawn = source.packs.row(derive_key(setting.seed, setting.stream, number, attempt) % source.packs.count)
            if source.dataset.document_at(drawn[0][0])[0] != own:
                return drawn
        raise ValueError(
            f"{source.path} has no second document in its {SPLITS[setting.stream]} split to take a random next "
            f"sentence from: change data.split = {self.data.split} or data.objective."
        )

    def _check_ids(self, tokens: np.ndarray, source: Source) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{source.path} holds token id {high if high >= self.vocab_size else low}, outside the "
                f"{self.vocab_size} ids of the model: raise model.vocab_size or tokenize the data again."
            )


def _bounds(spans: Spans, starts: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Places in the tokens of ``spans`` where something begins, ascending, with 0 at the front and their number at the
    end."""
    places, offset = [], 0
    for start, stop in spans:
        places.append(starts(start, stop) + (offset - start))
        offset += stop - start
    found = places[0] if len(places) == 1 else np.concatenate(places)
    bounds = np.empty(len(found) + 2, np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, found, offset
    fresh = bounds[1:] > bounds[:-1]
    return bounds if fresh.all() else bounds[np.append(True, fresh)]  # what is empty begins where the next one does


def cut(sample: Sample, rows: int) -> list[Sample]:
    """A sample as ``rows`` shorter ones, each predicting what it did; positions begin anew in each."""
    if rows == 1:
        return [sample]
    whole = sample.example
    assert whole.positions is not None
    length, made = len(whole.inputs) // rows, []
    for row in range(rows):
        part = slice(row * length, (row + 1) * length)
        places = np.arange(length, dtype=np.int64)
        begins = np.flatnonzero((whole.positions[part] == 0) & (places > 0))  # documents, with ``data.reset_positions``
        since = np.zeros(length, np.int64)
        since[begins] = begins
        shorter = Example(
            whole.inputs[part],
            whole.targets[part],
            whole.weights[part],
            positions=places - np.maximum.accumulate(since),
            segments=whole.segments[part] - whole.segments[part][0] if whole.segments is not None else None,
        )
        made.append(Sample(sample.number * rows + row, shorter))
    return made


def open_sets(config: Config, cache: Cache | None) -> list[IndexedDataset]:
    """The pairs of ``data.paths``, in order, or their copies on this node; a manifest stands for all that it lists."""
    staged = Stage(config.data.stage) if config.data.stage else str
    return [
        IndexedDataset(prefix, cache=cache, staged=staged) for path in config.data.paths for prefix in members(path)
    ]


def make_cache(config: Config) -> Cache | None:
    """The cache of remote paths, when there are any."""
    if not any(map(is_remote, config.data.paths)):
        return None
    return Cache(config.data.cache_dir, int(config.data.cache_gib * (1 << 30)))


def split_tokens(dataset: IndexedDataset, data: DataConfig) -> list[tuple[int, int]]:
    """Token ranges of training, validation and test: whole documents, in stored order; of training the fraction."""
    documents = split_documents(dataset.n_documents, [*data.split, 0.0, 0.0][: len(SPLITS)])
    first, last = documents[0]
    documents[0] = first, first + math.ceil((last - first) * data.fraction)
    return [(dataset.document_start(first), dataset.document_start(last)) for first, last in documents]


def no_sample(config: Config, split: str) -> ValueError:
    """The error of a split in which no source holds one sample."""
    return ValueError(
        f"no path of data.paths has the {window(config) + 1} tokens of one sample in its {split} split: change "
        f"data.split = {config.data.split}, shorten model.sequence or, for validation, set train.eval_samples = 0."
    )


def sample_weights(config: Config, datasets: list[IndexedDataset]) -> list[list[float]]:
    """Per stage, ``data.weights``, or the training tokens of each source when it is empty.

    The weight of a manifest is shared by its pairs according to their training tokens.
    """
    sizes = [len(members(path)) for path in config.data.paths]
    weights, count, stages = config.data.weights, len(sizes), len(config.data.stages) + 1
    if (weights or stages > 1) and len(weights) != count * stages:
        each = f" in each of {stages} stages" if stages > 1 else ""
        raise ValueError(f"data.weights has {len(weights)} shares for the {count} prefixes of data.paths{each}.")
    if weights and sum(sizes) == count:
        return [list(weights[stage * count : (stage + 1) * count]) for stage in range(stages)]
    tokens = [float(hi - lo) for lo, hi in (split_tokens(dataset, config.data)[0] for dataset in datasets)]
    if not weights:
        return [tokens]
    rows: list[list[float]] = [[] for _ in range(stages)]
    for path, size in enumerate(sizes):
        first = len(rows[0])
        held = tokens[first : first + size]
        for stage, row in enumerate(rows):
            row += [weights[stage * count + path] * part / (sum(held) or 1.0) for part in held]
    return rows
