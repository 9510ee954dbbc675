from __future__ import annotations

import numpy as np
import pytest

from megapre.objectives import causal, masked
from megapre.objectives.example import Setting
from megapre.objectives.table import OBJECTIVES, load

SETTING = Setting(vocab_size=5000, seed=3, mask_token=4999, eod=0)


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 4999, length + 1)


def test_table_holds_every_objective():
    assert load("causal") is causal.build and load("masked") is masked.build and len(OBJECTIVES) == 2
    with pytest.raises(ValueError, match=r"data\.objective = 'infill'"):
        load("infill")


def test_causal_shifts_by_one():
    made = causal.build(np.array([4, 0, 5, 0]), 0, SETTING)
    assert made.inputs.tolist() == [4, 0, 5] and made.targets.tolist() == [0, 5, 0]
    assert made.weights.tolist() == [1, 1, 1]
    weights = causal.build(np.array([4, 0, 5, 0]), 0, Setting(9, 1, eod=0, eod_mask_loss=True)).weights
    assert weights.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"data\.eod_mask_loss"):
        causal.build(np.array([4, 0]), 0, Setting(9, 1, eod_mask_loss=True))


def test_masked_shares():
    """15 % targets; of them 80 % mask, 10 % random, 10 % kept: within five standard deviations."""
    length, samples = 500, 200
    hidden = kept = changed = 0
    places = np.zeros(length)
    for number in range(samples):
        stored = tokens(length, number)
        made = masked.build(stored, number, SETTING)
        inputs, targets, weights = made.inputs, made.targets, made.weights
        assert targets.tolist() == stored[:-1].tolist() and weights.sum() == 75
        asked = weights == 1
        assert (inputs[~asked] == targets[~asked]).all()
        hidden += int((inputs[asked] == SETTING.mask_token).sum())
        kept += int((inputs[asked] == targets[asked]).sum())
        changed += int(((inputs[asked] != targets[asked]) & (inputs[asked] != SETTING.mask_token)).sum())
        places += asked
    n = 75 * samples
    for count, share in ((hidden, 0.8), (kept, 0.1), (changed, 0.1)):
        assert abs(count - share * n) < 5 * (n * share * (1 - share)) ** 0.5 + n / 5000
    # Every place of the sample is as likely as any other.
    assert abs(places - 0.15 * samples).max() < 5 * (samples * 0.15 * 0.85) ** 0.5


def test_random_replacements_cover_the_vocabulary():
    setting = Setting(vocab_size=8, seed=1, mask_token=7, mask_probability=1.0)
    stored = np.full(4001, 3)
    inputs = masked.build(stored, 0, setting).inputs
    assert set(inputs.tolist()) == set(range(8))


def test_masked_is_a_function_of_seed_sample_and_split():
    stored = tokens(64)
    first = masked.build(stored, 5, SETTING)
    again = masked.build(stored.copy(), 5, SETTING)
    assert np.array_equal(first.inputs, again.inputs) and np.array_equal(first.weights, again.weights)
    for other in (
        masked.build(stored, 6, SETTING),
        masked.build(stored, 5, Setting(5000, 4, mask_token=4999, eod=0)),
        masked.build(stored, 5, Setting(5000, 3, stream=1, mask_token=4999, eod=0)),
    ):
        assert not np.array_equal(first.weights, other.weights)


def test_the_draw_is_pinned():
    """The words of Philox are the same on any machine; a change of numbers changes every resumed run."""
    weights = masked.build(np.arange(1, 18), 5, Setting(100, 3, mask_token=99, mask_probability=0.25)).weights
    assert np.flatnonzero(weights).tolist() == [0, 2, 6, 13]


def test_at_least_one_target_and_never_the_end_of_document_while_there_is_a_choice():
    for length in (1, 2, 3, 5):
        weights = masked.build(tokens(length), 0, SETTING).weights
        assert weights.sum() == 1
    stored = np.zeros(101, np.int64)
    stored[[7, 30]] = 12
    weights = masked.build(stored, 0, Setting(100, 1, mask_token=99, eod=0, mask_probability=0.02)).weights
    assert np.flatnonzero(weights).tolist() == [7, 30]
    weights = masked.build(np.zeros(11, np.int64), 0, Setting(100, 1, mask_token=99, eod=0)).weights
    assert weights.sum() == 2


def test_inputs_do_not_alias_the_targets():
    stored = tokens(50)
    before = stored.copy()
    masked.build(stored, 0, SETTING)
    assert np.array_equal(stored, before)
