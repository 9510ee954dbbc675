"""Batches of a data-parallel rank, as torch CPU tensors laid out [seq, batch].

Batch k holds the G samples of the run from F on, G the global batch and F = k G unless it ramps up (``config.ramp``);
microbatch m of rank d of D holds F + (m D + d) b + [0, b). Step k runs batch k, or a later one where batches are
skipped. So the samples of a step depend on nothing but k, the skipped batches and the job's data settings.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megapre.config.ramp import Steps
from megapre.config.schema import Config
from megapre.data.samples import Sample, Samples, cut
from megapre.objectives.example import Example

LOOKAHEAD = 8
"""Steps whose blocks are asked for ahead, from remote paths."""
COLUMNS = ("targets", "weights", "positions", "segments", "source", "source_segments", "token_types", "ranks")
"""Arrays of an example that keep their names in a microbatch."""


@dataclass
class Microbatch:
    """Samples of one forward pass on one rank."""

    tokens: Tensor
    """int64 [seq, batch]."""
    targets: Tensor
    """int64 [seq, batch]."""
    weights: Tensor
    """float32 [seq, batch], 1 where the target counts in the loss."""
    positions: Tensor
    """int64 [seq, batch]."""
    segments: Tensor | None
    """int64 [seq, batch], document number inside the sample; only with ``data.reset_attention``."""
    samples: Tensor
    """int64 [batch], number of each sample in the run; -1 for padding of a validation."""
    source: Tensor | None = None
    """int64 [source_seq, batch]: the encoder's tokens of an encoder-decoder model; ``tokens`` are its decoder's."""
    source_segments: Tensor | None = None
    """int64 [source_seq, batch]: document or padding numbers of the source, to which cross-attention keeps too."""
    token_types: Tensor | None = None
    """int64 [seq, batch]: 0 in the first segment of text, 1 in the second (BERT, ALBERT)."""
    prefix: Tensor | None = None
    """int64 [batch]: leading tokens that see each other both ways (prefix LM)."""
    labels: Tensor | None = None
    """int64 [batch]: class of each sample (next sentence, sentence order)."""
    label_weights: Tensor | None = None
    """float32 [batch], 1 where the label counts in the loss; there whenever ``labels`` are."""
    ranks: Tensor | None = None
    """int64 [seq, batch]: place of each position in the factorisation order (XLNet)."""


class Counts(NamedTuple):
    """Denominators of a step's losses: sums over the microbatches of one rank, or of all."""

    targets: int
    """Sum of weights."""
    labels: int = 0
    """Sum of label weights."""
    tokens: int = 0
    """Tokens that the model reads (its decoder's, where it has two), without the padding of a validation."""


@dataclass
class StepBatch:
    """One optimizer step of one data-parallel rank."""

    step: int
    microbatches: list[Microbatch]
    counts: Counts
    """Of this rank's microbatches."""


class Loader:
    """Iterates over the batches of a run from ``start_step``, without end, read ahead by one thread.

    ``step_batch(step)`` computes any step directly and is what the thread calls: iterating only adds time.
    Raises ValueError when ``train.global_batch`` does not divide over the ranks, and for what ``Samples`` refuses.
    """

    def __init__(
        self,
        config: Config,
        *,
        vocab_size: int,
        data_rank: int,
        data_size: int,
        split: str = "train",
        start_step: int = 0,
        skipped: Sequence[int] = (),
    ) -> None:
        self._steps, micro = Steps(config), config.train.microbatch
        for batch in self._steps.batches():
            if micro < 1 or batch < 1 or batch % (data_size * micro):
                name = "train.global_batch" if batch == config.train.global_batch else "a batch of train.batch_ramp"
                raise ValueError(
                    f"{name} = {batch} is no multiple of {data_size} data-parallel ranks x train.microbatch = {micro}."
                )
        if not 0 <= data_rank < data_size or start_step < 0:
            raise ValueError(f"rank {data_rank} of {data_size} at step {start_step} does not exist.")
        self._micro = micro
        self._pinned = config.train.device != "cpu" and torch.cuda.is_available()
        self._rank, self._size = data_rank, data_size
        self._samples = Samples(config, vocab_size=vocab_size, split=split)
        self._next = start_step
        self._skipped = tuple(sorted(skipped))
        self._prefetch = config.data.prefetch
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(max(1, self._prefetch))
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def step_batch(self, step: int) -> StepBatch:
        """The batch of ``step`` on this rank: a pure function of the step."""
        microbatches, plan = [], self._steps.at(batch_number(step, self._skipped))
        if self._samples.cache is not None:
            for ahead in range(step, step + LOOKAHEAD):
                for number in self._mine(ahead):
                    self._samples.prefetch(number)
        for m in range(plan.samples // (self._size * self._micro)):
            first = plan.first + (m * self._size + self._rank) * self._micro
            rows = [row for i in range(self._micro) for row in cut(self._samples.sample(first + i), plan.rows)]
            microbatches.append(_collate(rows))
        counts = count(microbatches)
        return StepBatch(step, [_pin(m) for m in microbatches] if self._pinned else microbatches, counts)

    def _mine(self, step: int) -> Iterator[int]:
        """Numbers of this rank's samples of a step."""
        plan = self._steps.at(batch_number(step, self._skipped))
        for first in range(self._rank * self._micro, plan.samples, self._size * self._micro):
            yield from range(plan.first + first, plan.first + first + self._micro)

    def report(self) -> str:
        """How the cache of remote paths did; empty without one."""
        return self._samples.cache.report() if self._samples.cache is not None else ""

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed.is_set():
            raise StopIteration
        if self._failure is not None:
            raise self._failure
        if self._prefetch < 1:
            item: StepBatch | BaseException = self.step_batch(self._next)
        else:
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, args=(self._next,), name="loader", daemon=True)
                self._thread.start()
            item = self._ready.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self._next = item.step + 1
        return item

    def close(self) -> None:
        """Stop the thread; iterating afterwards ends."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._samples.cache is not None:
            self._samples.cache.close()

    def _read(self, step: int) -> None:
        while not self._closed.is_set():
            item: StepBatch | BaseException
            try:
                item = self.step_batch(step)
            except BaseException as error:  # handed to the consumer, which raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1


def batch_number(step: int, skipped: Sequence[int]) -> int:
    """The batch that ``step`` runs: the one after ``step`` others, those in ``skipped`` (rising) not counted."""
    for number in skipped:
        if number > step:
            break
        step += 1
    return step


def validation(config: Config, *, vocab_size: int, data_rank: int, data_size: int) -> list[Microbatch]:
    """The first ``train.eval_samples`` samples of the validation split, this rank's share of them.

    The set is the same for any ``data_size``, without repetition; fewer when the split holds fewer. Samples of
    weight 0 and number -1 fill up the last microbatches, so that all ranks have equally many. No microbatch when
    ``train.eval_samples`` is 0. Raises ValueError when the split does not hold one sample.
    """
    if config.train.eval_samples < 1:
        return []
    samples = Samples(config, vocab_size=vocab_size, split="valid")
    micro = config.train.microbatch
    numbers = []
    for number in range(config.train.eval_samples):
        source, rank = samples.locate(number)
        if rank < source.order.windows:
            numbers.append(number)
    numbers += [-1] * (-len(numbers) % (data_size * micro))
    mine = []
    for first in range(data_rank * micro, len(numbers), data_size * micro):
        mine.append(_collate([_validation_sample(samples, number) for number in numbers[first : first + micro]]))
    return mine


def held_out(config: Config, *, vocab_size: int, data_rank: int, data_size: int) -> dict[str, list[Microbatch]]:
    """What is validated on, by the name of the loss: ``loss`` on all paths as they are blended, and with
    ``train.eval_by_path`` ``loss_on/NAME`` on each path alone, whatever its weight and its neighbours."""
    sets = {"loss": config}
    for name, path in zip(names_of(config.data.paths), config.data.paths) if config.train.eval_by_path else ():
        alone = replace(config.data, paths=[path], weights=[], stages=[])
        sets[f"loss_on/{name}"] = replace(config, data=alone)
    place = {"vocab_size": vocab_size, "data_rank": data_rank, "data_size": data_size}
    return {name: validation(one, **place) for name, one in sets.items()}


def names_of(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last part without what the tools append, or all of it where two would be alike."""
    short = [re.sub(r"(_text_(document|sentence)|\.manifest\.json)+$", "", path.rpartition("/")[2]) for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _validation_sample(samples: Samples, number: int) -> Sample:
    if number >= 0:
        return samples.sample(number)
    filler = samples.sample(0).example
    return Sample(-1, replace(filler, weights=np.zeros_like(filler.weights), label_weight=0.0))


def _collate(samples: Sequence[Sample]) -> Microbatch:
    examples = [sample.example for sample in samples]
    arrays = {f.name: [getattr(example, f.name) for example in examples] for f in fields(Example)}
    columns = {name: _columns(arrays[name]) for name in COLUMNS if arrays[name][0] is not None}
    return Microbatch(
        tokens=_columns(arrays["inputs"]),
        segments=columns.pop("segments", None),
        samples=torch.tensor([sample.number for sample in samples], dtype=torch.int64),
        prefix=_row(arrays["prefix"], torch.int64),
        labels=_row(arrays["label"], torch.int64),
        label_weights=None if examples[0].label is None else _row(arrays["label_weight"], torch.float32),
        **columns,
    )


def _pin(microbatch: Microbatch) -> Microbatch:
    """The same in page-locked memory, from which a copy to the device need not be waited for."""
    tensors = {f.name: getattr(microbatch, f.name) for f in fields(microbatch)}
    return replace(microbatch, **{name: t.pin_memory() for name, t in tensors.items() if t is not None})


def _columns(rows: Sequence[np.ndarray]) -> Tensor:
    """Arrays [seq] as the columns of one contiguous tensor [seq, batch]."""
    return torch.from_numpy(np.stack(rows, axis=1))


def _row(values: Sequence[float | None], dtype: torch.dtype) -> Tensor | None:
    """One number of each sample [batch]; None where the objective makes none."""
    return None if values[0] is None else torch.tensor(values, dtype=dtype)


def count(microbatches: Sequence[Microbatch]) -> Counts:
    """The denominators of ``microbatches`` alone."""
    return Counts(
        targets=sum(int(m.weights.sum(dtype=torch.float64)) for m in microbatches),
        labels=sum(int(m.label_weights.sum()) for m in microbatches if m.label_weights is not None),
        tokens=sum(m.tokens.shape[0] * int((m.samples >= 0).sum()) for m in microbatches),
    )
