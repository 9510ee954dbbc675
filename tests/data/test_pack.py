"""Packed rows: every token once, no document cut that fits, and no target across documents."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megapre.data.check import check_data
from megapre.data.indexed import IndexedDataset
from megapre.data.loader import Loader
from megapre.data.pack import best_fit, items, plan
from megapre.data.samples import Samples
from tests.data.corpora import EOD, VOCAB, job, with_train, write_pair
from tools import pack_data


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_the_definition(seed):
    """Against a walk over all open rows; rows with equal room may be swapped, which changes no row's room."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 200)))
    rows = best_fit(lengths, capacity)
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    filled = np.bincount(rows, weights=lengths) if len(rows) else np.empty(0)
    assert sorted((capacity - filled).astype(int).tolist()) == sorted(rooms)


def test_rows_hold_every_token_of_the_split_once(tmp_path):
    rng = random.Random(3)
    pair = write_pair(tmp_path / "a", [rng.choice([1, 3, 9, 16, 17, 40]) for _ in range(80)])
    assert pack_data.main([pair, "--sequence", "16", "--split", "0.8", "0.2", "0"]) == 0
    config = with_train(
        job([pair], packing="best-fit", split=[0.8, 0.2, 0.0], reset_positions=True, reset_attention=True),
        eval_samples=2,
    )
    assert check_data(config) == VOCAB
    dataset = IndexedDataset(pair)
    bounds = dataset.documents
    for split, documents in (("train", range(0, 64)), ("valid", range(64, 80))):
        samples = Samples(config, vocab_size=VOCAB, split=split)
        order = samples.sources[0].order
        for epoch in range(2):
            seen = []
            for number in range(epoch * order.windows, (epoch + 1) * order.windows):
                sample, at = samples.sample(number).example, 0
                for start, stop in samples.spans(samples.sources[0], number):
                    seen += range(start, stop)
                    inside = slice(at, at + stop - start)
                    assert sample.inputs[inside].tolist() == dataset.read(start, stop).tolist()
                    assert sample.positions[inside].tolist() == list(range(stop - start))
                    assert len(set(sample.segments[inside].tolist())) == 1
                    assert sample.weights[inside].tolist() == [1.0] * (stop - start - 1) + [0.0]
                    assert sample.targets[inside][:-1].tolist() == dataset.read(start, stop).tolist()[1:]
                    document = int(np.searchsorted(bounds, start, side="right")) - 1
                    whole = bounds[document + 1] - bounds[document]
                    assert stop - start == whole if whole <= 16 else stop - start <= 16
                    at += stop - start
                assert (sample.inputs[at:] == EOD).all() and (sample.weights[at:] == 0).all()
            assert sorted(seen) == list(range(bounds[documents.start], bounds[documents.stop]))
    batch = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1).step_batch(3)
    assert batch.counts.targets < 8 * 16


def test_parts_of_long_documents(tmp_path):
    pair = write_pair(tmp_path / "a", [5, 33, 16])
    starts, lengths = items(IndexedDataset(pair), 0, 3, 16)
    assert starts.tolist() == [0, 5, 21, 37, 38] and lengths.tolist() == [5, 16, 16, 1, 16]


def test_a_plan_that_does_not_fit_the_job_is_refused(tmp_path):
    pair = write_pair(tmp_path / "a", [5] * 40)
    for config in (job([pair], packing="best-fit"), job([pair], packing="best-fit", sequence=8)):
        with pytest.raises(ValueError, match=r"finds no plan for model\.sequence"):
            check_data(config)
    plan(pair, 16, [1.0, 0.0, 0.0])
    assert check_data(job([pair], packing="best-fit")) == VOCAB
    with pytest.raises(ValueError, match=r"another data\.split"):
        check_data(job([pair], packing="best-fit", split=[0.5, 0.5, 0.0]))
    write_pair(tmp_path / "a", [5] * 40, seed=9)
    with pytest.raises(ValueError, match="finds no plan"):
        check_data(job([pair], packing="best-fit"))
