"""Sample n of a run, as numpy arrays: blend -> order -> tokens -> objective. Imports no torch.

Everything here is a pure function of the job file, the data and n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megapre.config.schema import Config
from megapre.data.blend import StagedBlend
from megapre.data.indexed import IndexedDataset
from megapre.data.order import SampleOrder, split_documents
from megapre.data.pack import Packs, open_packs
from megapre.data.remote import Cache, is_remote
from megapre.objectives.example import Example, Setting
from megapre.objectives.table import load as load_objective

SPLITS = ("train", "valid", "test")


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
    """Rows of whole documents; then ``order`` counts rows as windows of one token."""


class Samples:
    """All samples of one split of a job, by number from 0, without end.

    Raises ValueError when a path cannot be read, the split is too small or an id is not below ``vocab_size``.
    """

    def __init__(self, config: Config, *, vocab_size: int, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split = {split!r} is unknown; the splits are {', '.join(SPLITS)}.")
        self.length = config.model.sequence
        self.vocab_size = vocab_size
        self.data = config.data
        self._build = load_objective(config.data.objective)
        self.cache = make_cache(config)
        datasets = [IndexedDataset(path, cache=self.cache) for path in config.data.paths]
        weights = sample_weights(config, datasets)
        which = SPLITS.index(split)
        self.sources: list[Source] = []
        kept = []
        for number, dataset in enumerate(datasets):
            packs, length = None, self.length
            lo, hi = split_tokens(dataset, config.data.split)[which]
            if config.data.packing == "best-fit":
                packs = open_packs(dataset, self.length, config.data.split, which)
                lo, hi, length = 0, packs.count, 1
            # A source may be too small to validate on; it may not silently vanish from training.
            if split != "train" and hi - lo < length + 1:
                continue
            stream = number * len(SPLITS) + which
            order = SampleOrder(config.data.seed, stream, lo, hi, length, f"{dataset.prefix} ({split})")
            setting = _setting(config, dataset, vocab_size, which)
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

    def spans(self, source: Source, rank: int) -> list[tuple[int, int]]:
        """Token ranges of sample ``rank`` of a source: L + 1 tokens, or at most L with packing."""
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
        parts = [source.dataset.read(start, stop) for start, stop in spans]
        stored = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._check_ids(stored, source)
        tokens = stored.astype(np.int64)
        if source.packs is not None:  # what is left of the row is end-of-document tokens that nothing is learnt from
            tokens = np.append(tokens, np.full(self.length + 1 - len(tokens), source.setting.eod or 0))
        example = self._build(tokens, number, source.setting)
        if source.packs is not None:
            example.weights[len(stored) :] = 0.0
            if self.data.objective == "causal":  # no document predicts the next one
                example.weights[np.cumsum([stop - start for start, stop in spans]) - 1] = 0.0
        positions = np.arange(self.length, dtype=np.int64)
        segments = None
        if self.data.reset_positions or self.data.reset_attention:
            bounds = self._document_bounds(source, spans)
            lengths = np.diff(bounds)
            if self.data.reset_positions:
                positions -= np.repeat(bounds[:-1], lengths)
            segments = np.repeat(np.arange(len(lengths)), lengths) if self.data.reset_attention else None
        return Sample(number, replace(example, positions=positions, segments=segments))

    def _document_bounds(self, source: Source, spans: list[tuple[int, int]]) -> np.ndarray:
        """Places in the sample where a document begins, ascending, with 0 at the front and L at the end."""
        if source.packs is not None:
            ends = np.cumsum([stop - start for start, stop in spans])
            return np.concatenate(([0], ends, [self.length] if ends[-1] < self.length else [])).astype(np.int64)
        places, offset = [], 0
        for start, stop in spans:
            places.append(source.dataset.document_starts(start, stop) + (offset - start))
            offset += stop - start
        starts = places[0] if len(places) == 1 else np.concatenate(places)
        bounds = np.concatenate(([0], starts[(starts > 0) & (starts < self.length)], [self.length]))
        return bounds[np.append(True, np.diff(bounds) > 0)]  # empty documents begin where the next one does

    def _check_ids(self, tokens: np.ndarray, source: Source) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{source.path} holds token id {high if high >= self.vocab_size else low}, outside the "
                f"{self.vocab_size} ids of the model: raise model.vocab_size or tokenize the data again."
            )


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
            places - np.maximum.accumulate(since),
            whole.segments[part] - whole.segments[part][0] if whole.segments is not None else None,
        )
        made.append(Sample(sample.number * rows + row, shorter))
    return made


def make_cache(config: Config) -> Cache | None:
    """The cache of remote paths, when there are any."""
    if not any(map(is_remote, config.data.paths)):
        return None
    return Cache(config.data.cache_dir, int(config.data.cache_gib * (1 << 30)))


def split_tokens(dataset: IndexedDataset, shares: list[float]) -> list[tuple[int, int]]:
    """Token ranges of training, validation and test: whole documents, in stored order."""
    documents = split_documents(dataset.n_documents, [*shares, 0.0, 0.0][: len(SPLITS)])
    return [(dataset.document_start(first), dataset.document_start(last)) for first, last in documents]


def no_sample(config: Config, split: str) -> ValueError:
    """The error of a split in which no source holds one sample."""
    return ValueError(
        f"no path of data.paths has the {config.model.sequence + 1} tokens of one sample in its {split} split: change "
        f"data.split = {config.data.split}, shorten model.sequence or, for validation, set train.eval_samples = 0."
    )


def sample_weights(config: Config, datasets: list[IndexedDataset]) -> list[list[float]]:
    """Per stage, ``data.weights``, or the training tokens of each source when it is empty."""
    weights, count, stages = config.data.weights, len(datasets), len(config.data.stages) + 1
    if (weights or stages > 1) and len(weights) != count * stages:
        each = f" in each of {stages} stages" if stages > 1 else ""
        raise ValueError(f"data.weights has {len(weights)} shares for the {count} prefixes of data.paths{each}.")
    if weights:
        return [list(weights[stage * count : (stage + 1) * count]) for stage in range(stages)]
    tokens = [split_tokens(dataset, config.data.split)[0] for dataset in datasets]
    return [[float(hi - lo) for lo, hi in tokens]]


def mask_token(config: Config, dataset: IndexedDataset, vocab_size: int) -> int:
    """Id that hides a token: the job's, else the tokenizer's, else the last of the vocabulary."""
    record = dataset.sidecar.tokenizer if dataset.sidecar else None
    token = config.data.mask_token
    if token < 0:
        token = record.mask if record is not None and record.mask is not None else vocab_size - 1
    if token >= vocab_size:
        raise ValueError(f"data.mask_token = {token} is not one of the {vocab_size} ids of model.vocab_size.")
    return token


def _setting(config: Config, dataset: IndexedDataset, vocab_size: int, split: int) -> Setting:
    record = dataset.sidecar.tokenizer if dataset.sidecar else None
    return Setting(
        vocab_size=vocab_size,
        seed=config.data.seed,
        stream=split,
        eod=record.eod if record else None,
        eod_mask_loss=config.data.eod_mask_loss,
        mask_token=mask_token(config, dataset, vocab_size),
        mask_probability=config.data.mask_probability,
    )
