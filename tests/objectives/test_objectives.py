"""All objectives: pure functions, nothing lost, rates and lengths as their papers say."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest

from megapre.config.lengths import corruption, corruption_of_source
from megapre.config.schema import DataConfig
from megapre.objectives import causal, denoising, infill, next_sentence, permuted, prefix, sentence_order
from megapre.objectives import span_corruption as t5
from megapre.objectives.example import Example, Setting, Window
from megapre.objectives.table import OBJECTIVES, load
from tests.objectives.cases import (
    CLS,
    EOD,
    FIM,
    LAST,
    MASK,
    PAD,
    SEED,
    SENTINELS,
    SEP,
    START,
    noisy,
    setting,
    spans_of,
    window,
    within,
)  # fmt: skip

T5 = DataConfig(objective="span_corruption")
"""15 %, mean span 3."""


def paired(number: int, sentences: int = 6) -> Window:
    """A row of sentences, and one of another document whose ids are all higher."""
    rng = np.random.default_rng([SEED, number])

    def made(low: int, high: int) -> Window:
        bounds = np.concatenate(([0], np.cumsum(rng.integers(1, 20, sentences))))
        return Window(number, rng.integers(low, high, bounds[-1]), bounds[[0, -1]], bounds)

    return replace(made(1, 2000), other=made(2000, LAST))


CASES = {
    "causal": (window(64, documents=4), setting()),
    "infill": (window(64, documents=4), setting(fim_rate=1.0)),
    "prefix": (window(64), setting()),
    "masked": (window(64), setting()),
    "replaced": (window(64), setting()),
    "permuted": (window(64), setting()),
    "next_sentence": (paired(0), setting()),
    "sentence_order": (paired(0), setting()),
    "span_corruption": (window(corruption_of_source(64, T5).tokens), spans_of(T5, 64)),
    "denoising": (window(64, sentences=True), noisy(64, permute_sentences=1.0, delete_probability=0.1)),
}


def same(a: Example, b: Example) -> bool:
    values = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Example)]
    return all(np.array_equal(p, q) if isinstance(p, np.ndarray) else p == q for p, q in values)


def test_table_holds_every_objective() -> None:
    assert load("causal") is causal.build and set(CASES) == set(OBJECTIVES)
    with pytest.raises(ValueError, match=r"data\.objective = 'electra'"):
        load("electra")


@pytest.mark.parametrize("name", CASES)
def test_an_objective_is_a_pure_function_of_seed_split_and_sample(name: str) -> None:
    stored, asked_for = CASES[name]
    build, before = load(name), stored.tokens.copy()
    first = build(stored, asked_for)
    again = build(replace(stored, tokens=stored.tokens.copy()), asked_for)
    assert same(first, again) and np.array_equal(stored.tokens, before)
    for array in (first.inputs, first.targets, first.source, first.token_types, first.ranks):
        assert array is None or array.dtype == np.int64
    assert first.weights.dtype == np.float32 and len(first.weights) == len(first.inputs) == len(first.targets)
    # Of eight other samples, seeds and splits, most differ: a coin may fall alike.
    others = [replace(stored, number=n) for n in range(1, 9)]
    differ = sum(not same(first, build(other, asked_for)) for other in others)
    differ += sum(not same(first, build(stored, replace(asked_for, seed=n))) for n in range(8))
    differ += sum(not same(first, build(stored, replace(asked_for, stream=n))) for n in range(1, 9))
    assert differ == 0 if name == "causal" else differ > 18


@pytest.mark.parametrize("name", ["masked", "replaced", "span_corruption", "denoising", "next_sentence"])
def test_a_hidden_token_leaves_no_trace_in_what_is_read(name: str) -> None:
    """Leakage: change what is hidden, and what the encoder reads stays as it was."""
    stored, asked_for = CASES[name]
    made = load(name)(stored, replace(asked_for, seed=SEED + 1))
    if name in ("span_corruption", "denoising"):
        assert made.source is not None
        kept = np.isin(stored.tokens[:-1], made.source)
        assert 0.05 < 1 - kept.mean() < 0.5
    else:
        asked = made.weights == 1
        assert (made.inputs[asked] != made.targets[asked]).mean() > 0.5


def test_causal_shifts_by_one() -> None:
    stored = Window(0, np.array([4, 0, 5, 0]), np.array([0, 2, 4]))
    made = causal.build(stored, setting())
    assert made.inputs.tolist() == [4, 0, 5] and made.targets.tolist() == [0, 5, 0]
    assert made.weights.tolist() == [1, 1, 1]
    assert causal.build(stored, Setting(9, 1, eod=0, eod_mask_loss=True)).weights.tolist() == [1, 0, 1]


def test_a_prefix_is_only_read() -> None:
    lengths = []
    for number in range(400):
        stored = window(20, number)
        made = prefix.build(stored, setting())
        assert made.prefix is not None and 1 <= made.prefix <= 20
        # What the place before the prefix's end asks for is inside the prefix, where all see it.
        assert made.weights.tolist() == [0.0] * (made.prefix - 1) + [1.0] * (21 - made.prefix)
        assert made.targets.tolist() == stored.tokens[1:].tolist()
        lengths.append(made.prefix)
    for length in (1, 10, 20):
        within(lengths.count(length), 400, 1 / 20)


@pytest.mark.parametrize("spm", [0.0, 1.0])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_infill_can_be_undone(rate: float, spm: float) -> None:
    """Documents come back exactly, in order; only the room of the added ids is taken, from the window's end."""
    changed = total = 0
    for number in range(120):
        stored = window(90, number, documents=5)
        made = infill.build(stored, setting(fim_rate=rate, fim_spm_rate=spm))
        whole = np.append(made.inputs, made.targets[-1])
        assert len(whole) == 91 and (made.inputs[1:] == made.targets[:-1]).all()
        assert made.documents is not None
        # A document that begins with the last token has no input, so the example does not count it.
        bounds = np.concatenate((made.documents[:-1], [90] if whole[89] == EOD else [], [91])).astype(int)
        back: list[int] = []
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
            part = whole[start:stop].tolist()
            if part[0] != FIM[0]:
                back += part
                continue
            changed += 1
            end = [part.pop()] if part[-1] == EOD else []
            suffix_at, middle_at = part.index(FIM[1]), part.index(FIM[2])
            before, suffix, rest = part[1:suffix_at], part[suffix_at + 1 : middle_at], part[middle_at + 1 :]
            if spm:
                assert not before
            back += [*before, *rest, *suffix, *end]
        total += int((bounds[:-1] < 91 - infill.ADDED).sum())  # one that begins later has no room for the added ids
        added = int(np.isin(whole, FIM).sum())
        assert added % 3 == 0 and back == stored.tokens[: 91 - added].tolist(), f"MEGAPRE_SEED={SEED}"
    within(changed, total, rate)


def test_infill_cuts_uniformly_and_mixes_orders() -> None:
    spm = middles = count = 0
    for number in range(500):
        stored = window(60, number)
        made = infill.build(stored, setting(fim_rate=1.0, fim_spm_rate=0.5))
        whole = np.append(made.inputs, made.targets[-1]).tolist()
        first = whole.index(FIM[1]) == 1
        spm += first
        if not first:
            count += 1
            middles += len(whole) - whole.index(FIM[2]) - 1
    # A prefix of no token looks the same in both orders: 2 in 59 or so.
    within(spm, 500, 0.5 + 0.5 * 2 / 59)
    assert abs(middles / count - 58 / 3) < 5 * (58 / 18**0.5) / count**0.5 + 1
    plain = infill.build(window(60), setting(fim_rate=0.0))
    assert same(replace(plain, documents=None), causal.build(window(60), setting()))


@pytest.mark.parametrize("length", [40, 114, 512])
def test_span_corruption_can_be_undone_and_fills_both_sides(length: int) -> None:
    asked_for = spans_of(T5, length)
    plan = asked_for.corruption
    assert plan is not None and plan.source == length
    assert abs(plan.hidden - 0.15 * plan.tokens) <= 0.5 + 1e-9 and abs(plan.spans - plan.hidden / 3) <= 0.5 + 1e-9
    runs, firsts = [], []
    for number in range(150):
        stored = window(plan.tokens, number, documents=2)
        made = t5.build(stored, asked_for)
        assert made.source is not None and len(made.source) == length and len(made.targets) == plan.target
        assert made.source[-1] == made.targets[-1] == EOD and (made.weights == 1).all()
        assert made.inputs[0] == START and (made.inputs[1:] == made.targets[:-1]).all()
        ids = SENTINELS[: plan.spans]
        assert made.source[np.isin(made.source, ids)].tolist() == ids.tolist()
        assert made.targets[np.isin(made.targets, ids)].tolist() == ids.tolist()
        spans = np.split(made.targets[:-1], np.flatnonzero(np.isin(made.targets, ids))[1:])
        back: list[int] = []
        for token in made.source[:-1].tolist():
            back += spans[int(np.flatnonzero(ids == token)[0])][1:].tolist() if token in ids else [token]
        assert back == stored.tokens[:-1].tolist(), f"MEGAPRE_SEED={SEED}"
        runs += [len(span) - 1 for span in spans]
        firsts.append(int(np.argmax(np.isin(made.source, ids))))
    assert min(runs) >= 1 and min(firsts) >= 1 and sum(runs) == 150 * plan.hidden
    if plan.spans > 5:  # parts of a random composition: P(length = 1) = (spans - 1) / (hidden - 1)
        ones = (plan.spans - 1) / (plan.hidden - 1)
        within(runs.count(1), len(runs), ones, 8.0)


def test_lengths_of_span_corruption_are_t5s() -> None:
    """512 -> 568 tokens and targets of 114, as in the T5 code's comment on random_spans_helper."""
    plan = corruption_of_source(512, T5)
    assert (plan.tokens, plan.target) == (568, 114)
    for source in range(4, 600):
        plan = corruption_of_source(source, T5)
        assert plan.source == source and corruption(plan.tokens, T5) == plan


def test_infilling_can_be_aligned_and_lengths_are_poissons() -> None:
    """BART: the source is the window with spans become masks; Poisson(3) within bounds, and no padding."""
    length = 400
    asked_for = noisy(length)
    plan = asked_for.noise
    assert plan is not None and plan.hidden == 120 and plan.masks == 40
    found = np.zeros(30)
    for number in range(200):
        stored = window(length, number, documents=1)
        # Ids of their own, so that what is left says where it stood.
        stored = replace(stored, tokens=np.random.default_rng([SEED, number]).permutation(length + 1) + 1)
        made = denoising.build(stored, asked_for)
        assert made.source is not None and len(made.source) == plan.source
        assert made.targets.tolist() == stored.tokens[:-1].tolist() and made.inputs[0] == START
        place = {token: i for i, token in enumerate(made.targets.tolist())}
        kept = [place.get(token, -1) for token in made.source.tolist()]
        assert kept.count(-1) == plan.masks
        # No two masks side by side, and what is left is in order: each mask stands for the gap that it is in.
        assert all(a >= 0 or b >= 0 for a, b in pairwise(kept))
        left = [-1, *(i for i in kept if i >= 0), length]
        assert left == sorted(set(left))
        before = -1
        for i, at in enumerate(kept):
            after = next((k for k in kept[i + 1 :] if k >= 0), length)
            if at < 0:
                found[after - before - 1] += 1
            elif at >= 0:
                assert i == 0 or kept[i - 1] < 0 or at == before + 1
                before = at
    n, p = found.sum(), 1 / plan.masks
    assert n == 200 * plan.masks and found @ np.arange(30) == 200 * plan.hidden
    poisson = 1.0
    for k in range(8):
        exact = np.prod([(plan.hidden - i) / (i + 1) for i in range(k)]) * p**k * (1 - p) ** (plan.hidden - k)
        poisson = np.exp(-3.0) * 3.0**k / np.prod(np.arange(1, k + 1, dtype=float))
        assert abs(exact - poisson) < 0.01
        within(found[k], n, float(exact), 6.0)


def test_sentences_are_permuted_and_documents_rotated_inside_documents() -> None:
    moved = 0
    for number in range(60):
        stored = window(80, number, documents=3, sentences=True)
        for changes in ({"permute_sentences": 1.0}, {"rotate_documents": 1.0}):
            made = denoising.build(stored, noisy(80, mask_probability=0.0, **changes))
            assert made.source is not None and made.targets.tolist() == stored.tokens[:-1].tolist()
            moved += not np.array_equal(made.source, made.targets)
            for start, stop in zip(stored.documents[:-1], np.minimum(stored.documents[1:], 80)):
                a, b = made.targets[start:stop].tolist(), made.source[start:stop].tolist()
                assert sorted(a) == sorted(b)
                if "rotate_documents" in changes:
                    assert any(a[i:] + a[:i] == b for i in range(max(1, len(a))))
                else:
                    inside = stored.sentences[(stored.sentences > start) & (stored.sentences < stop)] - start
                    whole = sorted(map(tuple, np.split(np.array(a), inside)))
                    text, at = list(b), 0
                    while whole:  # cut the shuffled document into its sentences again
                        sentence = next(s for s in whole if tuple(text[at : at + len(s)]) == s)
                        whole.remove(sentence)
                        at += len(sentence)
    assert moved > 100


def test_deletion_leaves_no_trace() -> None:
    made = denoising.build(window(100), noisy(100, mask_probability=0.0, delete_probability=0.2))
    assert made.source is not None and len(made.source) == 80 and MASK not in made.source
    left = iter(made.targets.tolist())
    assert all(token in left for token in made.source.tolist())


def test_permuted_predicts_the_end_of_a_random_order() -> None:
    length, firsts = 120, np.zeros(120)
    for number in range(300):
        stored = window(length, number, documents=2)
        made = permuted.build(stored, setting(mask_probability=1 / 6))
        assert made.ranks is not None and made.inputs.tolist() == made.targets.tolist() == stored.tokens[:-1].tolist()
        asked = made.weights == 1
        assert asked.sum() == 20 and ((made.ranks == 0) == ~asked).all()
        assert sorted(made.ranks[asked].tolist()) == list(range(1, 21)) and (made.inputs[asked] != EOD).all()
        firsts[np.flatnonzero(made.ranks == 1)] += 1
    assert firsts.max() < 5 * (300 / 120) ** 0.5 + 300 / 120 + 5


@pytest.mark.parametrize("build", [next_sentence.build, sentence_order.build])
def test_pairs_are_laid_out_as_bert_reads_them(build) -> None:
    labels, cuts = [], set()
    for number in range(300):
        stored = paired(number)
        made = build(stored, setting(length=256))
        assert stored.sentences is not None and made.token_types is not None and made.segments is not None
        used = int((made.segments == 0).sum())
        ends = np.flatnonzero(made.targets[:used] == SEP).tolist()
        assert made.targets[0] == CLS and len(ends) == 2 and ends[1] == used - 1
        assert made.token_types.tolist() == [0] * (ends[0] + 1) + [1] * (used - ends[0] - 1) + [0] * (256 - used)
        assert (made.targets[used:] == PAD).all() and (made.weights[used:] == 0).all()
        assert (made.weights[[0, *ends]] == 0).all() and (made.inputs[[0, *ends]] == made.targets[[0, *ends]]).all()
        assert made.weights.sum() == max(1, round(0.15 * used))
        first, second = made.targets[1 : ends[0]].tolist(), made.targets[ends[0] + 1 : ends[1]].tolist()
        whole = stored.tokens.tolist()
        labels.append(made.label)
        if build is sentence_order.build:
            assert (second + first if made.label else first + second) == whole
            cuts.add(len(second if made.label else first))
        elif made.label == next_sentence.IS_NEXT:
            assert first + second == whole
        else:
            assert whole[: len(first)] == first and min(second) >= 2000
            assert stored.other is not None and stored.other.tokens.tolist()[-len(second) :] == second
            assert len(first) in stored.sentences.tolist()
    within(sum(label == 1 for label in labels), 300, 0.5)


def test_a_random_next_text_fits_the_room() -> None:
    """Neither the end nor the length of a row tells a random text from the one that follows."""
    for number in range(50):
        stored = paired(number)
        length = len(stored.tokens) + 3
        made = next_sentence.build(stored, setting(length=length))
        assert len(made.inputs) == length
