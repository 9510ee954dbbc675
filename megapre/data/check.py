"""Refuse a job whose data cannot be read as it says, before torch is imported. Under a second for large sets."""

from __future__ import annotations

import os

from megapre.config.lengths import window
from megapre.config.schema import Config
from megapre.data.blend import round_weights
from megapre.data.indexed import IndexedDataset
from megapre.data.manifest import members
from megapre.data.order import SampleOrder
from megapre.data.pack import open_packs
from megapre.data.samples import make_cache, no_sample, open_sets, sample_weights, split_tokens
from megapre.data.setting import make_setting
from megapre.data.sidecar import TokenizerRecord, model_digest, model_files
from megapre.objectives.table import OBJECTIVES
from megapre.objectives.table import load as load_objective

PROBED_TOKENS = 1 << 16


def check_data(config: Config) -> int:
    """Open every path of ``data.paths``, check it against its record and the job, and return the vocabulary size.

    Raises ValueError, in one sentence with the numbers and the key to change, on a missing or cut file, a record
    that does not match, another tokenizer, a vocabulary or split that is too small, or a weight that rounds to 0.
    """
    data = config.data
    if not data.paths:
        raise ValueError("data.paths is empty: name at least one .bin/.idx prefix.")
    load_objective(data.objective)
    cache = make_cache(config)
    try:
        return _check(config, open_sets(config, cache))
    finally:
        if cache is not None:
            cache.close()


def _check(config: Config, datasets: list[IndexedDataset]) -> int:
    _check_tokenizer(config, datasets)
    vocab_size = _vocab_size(config, datasets)
    for dataset in datasets:
        make_setting(config, dataset, vocab_size, 0)
        _probe(dataset, vocab_size)
    _check_lengths(config, datasets)
    weights = sample_weights(config, datasets)
    for stage in weights:
        used = [i for i, share in enumerate(stage) if share or len(weights) == 1]
        round_weights([stage[i] for i in used], [datasets[i].prefix for i in used])
    return vocab_size


def _check_lengths(config: Config, datasets: list[IndexedDataset]) -> None:
    """Every source has a sample to train on, and one of them a sample to validate on."""
    data, length, pairs = config.data, window(config), OBJECTIVES[config.data.objective].pairs > 0
    found = []
    for dataset in datasets:
        lo, hi = split_tokens(dataset, data)[0]
        if pairs or data.packing == "best-fit":
            train, valid = (open_packs(dataset, config.model.sequence, data.split, n, sentences=pairs) for n in (0, 1))
            if train.count < 2:
                raise ValueError(f"{dataset.prefix} (train) has {train.count} rows of model.sequence, fewer than 2.")
            found.append(valid.count >= 2)
        else:
            SampleOrder(data.seed, 0, lo, hi, length, f"{dataset.prefix} (train)")
            lo, hi = split_tokens(dataset, data)[1]
            found.append(hi - lo > length)
    if config.train.eval_samples > 0 and not any(found):
        raise no_sample(config, "valid")
    if config.train.eval_by_path:
        held_out = {dataset.prefix for dataset, has_one in zip(datasets, found) if has_one}
        for path in data.paths:
            if held_out.isdisjoint(members(path)):
                raise ValueError(
                    f"train.eval_by_path finds no sample of {length + 1} tokens in the validation split of {path}: "
                    f"change data.split = {data.split} or set it to false."
                )


def _record(dataset: IndexedDataset) -> TokenizerRecord | None:
    return dataset.sidecar.tokenizer if dataset.sidecar else None


def _check_tokenizer(config: Config, datasets: list[IndexedDataset]) -> None:
    """All pairs, and ``data.tokenizer_model`` when it is given, are of one tokenizer as far as is known."""
    model = config.data.tokenizer_model
    seen, origin = None, ""
    if model:
        if not all(map(os.path.isfile, model_files(model))):
            raise ValueError(f"data.tokenizer_model = {model!r} does not exist.")
        seen, origin = model_digest(model), f"data.tokenizer_model = {model}"
    for dataset in datasets:
        record = _record(dataset)
        if record is None or record.digest is None:
            continue
        if seen is not None and record.digest != seen:
            raise ValueError(
                f"{dataset.prefix} was written by a tokenizer with sha256 {record.digest[:12]} "
                f"({record.vocab_size} ids) where {origin} has {seen[:12]}: tokenize it again or change data.paths."
            )
        seen, origin = record.digest, dataset.prefix


def _vocab_size(config: Config, datasets: list[IndexedDataset]) -> int:
    known = {dataset.prefix: record.vocab_size for dataset in datasets if (record := _record(dataset)) is not None}
    asked = config.model.vocab_size
    if not known and asked <= 0:
        raise ValueError(
            f"model.vocab_size = {asked} leaves the vocabulary to the data, and no .json beside data.paths records it."
        )
    for prefix, size in known.items():
        if 0 < asked < size:
            raise ValueError(
                f"model.vocab_size = {asked} is smaller than the {size} ids of the tokenizer that wrote {prefix}."
            )
    return asked if asked > 0 else max(known.values())


def _probe(dataset: IndexedDataset, vocab_size: int) -> None:
    """Look at the first tokens: a wrong vocabulary usually shows there. Every token is checked when it is read."""
    tokens = dataset.read(0, min(PROBED_TOKENS, dataset.total_tokens))
    if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        worst = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise ValueError(
            f"{dataset.prefix} holds token id {worst}, outside the {vocab_size} ids of the model: raise "
            "model.vocab_size or tokenize the data again."
        )
