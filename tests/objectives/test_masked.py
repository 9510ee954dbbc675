"""Masked modelling: what is chosen, what becomes of it, and the units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megapre.objectives import masked, replaced
from megapre.objectives.draw import Draw
from megapre.objectives.example import Setting, Window
from megapre.objectives.units import LONGEST_SPAN, _spans, choose, words
from tests.objectives.cases import EOD, LAST, MASK, SEED, VOCAB, setting, window, within

JOINS = np.where(np.arange(VOCAB) % 3 == 0, 0, 3).astype(np.uint8)
"""A third of the ids stands alone, like punctuation; runs of the others are words."""


def row(tokens: np.ndarray, number: int = 0) -> Window:
    return Window(number, np.asarray(tokens, np.int64), np.array([0, len(tokens)]))


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_shares(unit: str) -> None:
    """15 % targets; of their units 80 % mask, 10 % random, 10 % kept, one fate for all tokens of a unit."""
    length, samples = 400, 150
    asked_for = setting(mask_unit=unit, joins=JOINS, mask_span=5.0)
    hidden = kept = units = chosen = mixed = 0
    places = np.zeros(length)
    for number in range(samples):
        stored = window(length, number, documents=3)
        made = masked.build(stored, asked_for)
        asked = made.weights == 1
        assert made.targets.tolist() == stored.tokens[:-1].tolist()
        assert (made.inputs[~asked] == made.targets[~asked]).all() and (made.targets[asked] != EOD).all()
        if unit == "word":
            assert 60 - 12 <= asked.sum() <= 60  # words in random order while they fit
        else:
            assert asked.sum() == 60
        chosen += int(asked.sum())
        places += asked
        runs = np.split(np.flatnonzero(asked), np.flatnonzero(np.diff(np.flatnonzero(asked)) > 1) + 1)
        if unit == "token":
            runs = [[place] for place in np.flatnonzero(asked)]
        elif unit == "word":
            bounds = words(made.targets, made.targets != EOD, asked_for)
            runs = [range(a, b) for a, b in bounds if asked[a]]
            assert all(asked[a:b].all() == asked[a] for a, b in bounds)
        for run in runs if unit != "span" else []:
            first = run[0]
            units += 1
            hidden += made.inputs[first] == MASK
            kept += made.inputs[first] == made.targets[first]
            fates = {(made.inputs[p] == MASK, made.inputs[p] == made.targets[p]) for p in run}
            mixed += len(fates) > 1
        if unit == "span":
            hidden += int((made.inputs[asked] == MASK).sum())
            kept += int((made.inputs[asked] == made.targets[asked]).sum())
            units += int(asked.sum())
    # Tokens of a span share a fate, so there are fewer trials than tokens.
    wider = 5.0 if unit != "span" else 5.0 * 5**0.5
    within(hidden, units, 0.8, wider)
    within(kept, units, 0.1, wider)
    if unit == "token":
        assert abs(places - 0.15 * samples).max() < 5 * (samples * 0.15 * 0.85) ** 0.5
    assert mixed < 9, f"MEGAPRE_SEED={SEED}"  # a random id may be the mask, or the token itself
    assert chosen > 0.8 * 60 * samples


def test_spans_are_geometric_in_words() -> None:
    """SpanBERT: lengths from a geometric distribution, cut at 10 words and normalised."""
    # One span a draw: as many words as fit are wanted, and the first span is what the first word's unit says.
    asked_for = setting(mask_unit="span", mask_span=5.0)
    bounds = np.stack((np.arange(3000), np.arange(1, 3001)), 1)
    counts = np.zeros(LONGEST_SPAN + 1)
    for number in range(600):
        places, unit = _spans(bounds, 60, Draw(asked_for, number), asked_for)
        _, sizes = np.unique(unit[:-LONGEST_SPAN], return_counts=True)  # the last one may be cut
        first = unit[0]
        counts[(unit == first).sum()] += 1
        assert sizes.max() <= LONGEST_SPAN and len(set(places.tolist())) == 60
    p = (0.8 ** np.arange(LONGEST_SPAN)) * 0.2
    p /= p.sum()
    for length in range(1, LONGEST_SPAN + 1):
        within(counts[length], 600, p[length - 1])


def test_words_and_spans_never_cross_what_may_not_be_hidden() -> None:
    for number in range(40):
        stored = window(100, number, documents=12)
        for unit in ("word", "span"):
            made = masked.build(stored, setting(mask_unit=unit, joins=np.full(VOCAB, 3, np.uint8)))
            assert (made.weights[made.targets == EOD] == 0).all()


def test_spans_are_runs_of_neighbours() -> None:
    """A span has no hole: what it may not hide ends it."""
    asked_for = setting(mask_unit="span", joins=np.full(VOCAB, 3, np.uint8), mask_probability=0.4, mask_span=8.0)
    for number in range(20):
        stored = window(120, number, documents=60)
        able = stored.tokens[:-1] != EOD
        places, first = choose(stored.tokens[:-1], able, Draw(asked_for, number), asked_for)
        for unit in set(first.tolist()):
            low, high = places[first == unit].min(), places[first == unit].max()
            assert able[low : high + 1].all(), f"MEGAPRE_SEED={SEED}"


def test_a_word_longer_than_the_share_is_hidden_when_there_is_no_other() -> None:
    made = masked.build(row(np.arange(1, 42)), setting(mask_unit="word", joins=np.full(VOCAB, 3, np.uint8)))
    assert made.weights.sum() == 40


def test_random_replacements_cover_the_vocabulary() -> None:
    asked_for = Setting(vocab_size=8, seed=1, mask_token=7, mask_probability=1.0)
    assert set(masked.build(row(np.full(4001, 3)), asked_for).inputs.tolist()) == set(range(8))


def test_the_draw_is_pinned() -> None:
    """The words of Philox are the same on any machine; a change of numbers changes every resumed run."""
    made = masked.build(row(np.arange(1, 18), 5), Setting(100, 3, mask_token=99, mask_probability=0.25))
    assert np.flatnonzero(made.weights).tolist() == [0, 2, 6, 13]


def test_at_least_one_target_and_never_the_end_of_document_while_there_is_a_choice() -> None:
    for length in (1, 2, 3, 5):
        assert masked.build(window(length), setting()).weights.sum() == 1
    stored = np.zeros(101, np.int64)
    stored[[7, 30]] = 12
    asked_for = Setting(100, 1, mask_token=99, eod=0, mask_probability=0.02)
    assert np.flatnonzero(masked.build(row(stored), asked_for).weights).tolist() == [7, 30]
    for unit in ("token", "word", "span"):
        asked_for = replace(asked_for, mask_unit=unit, joins=np.full(100, 3, np.uint8))
        assert masked.build(row(np.zeros(11)), asked_for).weights.sum() >= 1


def test_replaced_hides_every_chosen_token() -> None:
    for number in range(20):
        stored = window(200, number, documents=4)
        made = replaced.build(stored, setting())
        assert made.weights.sum() == 30 and made.targets.max() < LAST
        assert ((made.inputs == MASK) == (made.weights == 1)).all()
        assert (made.inputs[made.weights == 0] == made.targets[made.weights == 0]).all()
