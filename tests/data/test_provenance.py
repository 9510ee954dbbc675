"""Order and blend backwards, stages, and the steps in which a document is seen: against the samples themselves."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from megapre.config.ramp import Steps
from megapre.data.blend import Blend, StagedBlend
from megapre.data.order import derive_key, short_block_slot, two_level, two_level_place
from megapre.data.provenance import pieces, step_samples, visits
from megapre.data.samples import Samples
from tests.data.corpora import VOCAB, job, ramp, with_train, write_pair


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 100, 1000, 4099])
def test_places_are_the_inverse_of_the_order(size):
    key = derive_key(3, size)
    slot = short_block_slot(size, key, 16)
    order = [two_level(i, size, key, slot, 16, 64) for i in range(size)]
    assert sorted(order) == list(range(size))
    assert [two_level_place(w, size, key, slot, 16, 64) for w in order] == list(range(size))


def test_numbers_are_the_inverse_of_the_blend():
    blend = Blend([0.001, 0.6, 0.399])
    for sample in random.Random(1).sample(range(10**7), 300):
        source, rank = blend.locate(sample)
        assert blend.number(source, rank) == sample
        assert blend.count(source, sample) == rank


def test_stages_change_the_shares_and_repeat_no_sample():
    """Each source is served in its own order through all stages; a stage of weight 0 lets it rest."""
    blend = StagedBlend([[0.5, 0.5, 0.0], [0.9, 0.0, 0.1], [0.2, 0.2, 0.6]], [100, 300])
    served = {0: 0, 1: 0, 2: 0}
    counts = [[0, 0, 0] for _ in range(3)]
    for sample in range(1000):
        source, rank = blend.locate(sample)
        assert rank == served[source] and blend.number(source, rank) == sample
        served[source] += 1
        counts[(sample >= 100) + (sample >= 300)][source] += 1
    assert counts == [[50, 50, 0], [180, 0, 20], [140, 140, 420]]
    with pytest.raises(ValueError, match="no weight in any stage"):
        StagedBlend([[1, 0], [1, 0]], [10])
    with pytest.raises(ValueError, match=r"data\.stages"):
        StagedBlend([[1, 1], [1, 1]], [0])


def test_a_tiny_share_is_served_and_one_that_cannot_be_is_refused():
    blend = Blend([1.0, 1e-6])
    first = blend.number(1, 0)
    assert blend.locate(first) == (1, 0) and first < 2**20
    with pytest.raises(ValueError, match="rounds to 0"):
        Blend([1.0, 1e-8])


def test_the_pieces_of_a_step_are_its_tokens(tmp_path):
    prefixes = [ramp(tmp_path / "r", 1000, document=37), write_pair(tmp_path / "w", [29] * 40)]
    config = with_train(job(prefixes, weights=[0.7, 0.3]), batch_ramp=[4, 2, 12])
    samples = Samples(config, vocab_size=VOCAB)
    for step in (0, 3, 40):
        assert len(step_samples(config, step)) == Steps(config).at(step).samples
        for number in step_samples(config, step):
            source, _ = samples.locate(number)
            found = list(pieces(samples, number))
            sample = samples.sample(number).example
            tokens = np.concatenate([sample.inputs, sample.targets[-1:]])
            at = 0
            for piece in found:
                document = source.dataset.document(piece.document)
                part = document[piece.offset : piece.offset + piece.tokens]
                assert piece.path == source.path and part.tolist() == tokens[at : at + piece.tokens].tolist()
                at += piece.tokens
            assert at == 17


def test_visits_are_all_the_samples_that_hold_a_token_of_the_document(tmp_path):
    """Token t of the source is t, so a search through every sample of three epochs says who holds it."""
    prefixes = [ramp(tmp_path / "r", 700, document=23), ramp(tmp_path / "q", 300, document=41)]
    config = job(prefixes, weights=[0.7, 0.3, 0.4, 0.6], stages=[40])
    samples = Samples(config, vocab_size=VOCAB)
    steps = Steps(config)
    for document in range(len(samples.sources[0].dataset)):
        dataset = samples.sources[0].dataset
        wanted = set(range(dataset.document_start(document), dataset.document_start(document + 1)))
        found = {visit.sample: visit for visit in visits(config, samples, 0, document, 3)}
        windows = samples.sources[0].order.windows
        holding = set()
        for number in range(400):
            source, rank = samples.locate(number)
            if source is samples.sources[0] and rank < 3 * windows:
                sample = samples.sample(number).example
                if wanted & {*sample.inputs.tolist(), int(sample.targets[-1])}:
                    holding.add(number)
        assert set(found) == holding, document
        assert all(visit.step == steps.step_of(visit.sample) for visit in found.values())


def test_stages_reach_the_loader(tmp_path):
    pair = write_pair(tmp_path / "a", [40] * 20)
    config = job([pair, pair], weights=[1.0, 0.0, 0.5, 0.5], stages=[16])
    samples = Samples(config, vocab_size=VOCAB)
    assert {samples.locate(n)[0] is samples.sources[0] for n in range(16)} == {True}
    assert [samples.blend.locate(n)[0] for n in range(16, 24)].count(1) == 4
    with pytest.raises(ValueError, match="in each of 2 stages"):
        Samples(replace(config, data=replace(config.data, weights=[1.0, 2.0])), vocab_size=VOCAB)
