"""Objectives through the loader: special ids, rows of sentences, one corruption for any ranks and after any resume."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapre.config.check import check
from megapre.config.lengths import corruption_of_source
from megapre.config.schema import Config, DataConfig, ModelConfig
from megapre.data.check import check_data
from megapre.data.indexed import IndexedDataset, IndexedWriter
from megapre.data.loader import Counts, Loader, count, validation
from megapre.data.pack import open_packs, plan
from megapre.data.samples import Samples
from megapre.data.sidecar import TokenizerRecord
from megapre.tokenizers.plain import ByteTokenizer
from megapre.tokenizers.vocabulary import record, word_bits
from tests.data.corpora import with_train
from tests.data.test_loader import columns, same, same_microbatch

VOCAB, EOD = 400, 7
SPECIALS = {"cls": 390, "sep": 391, "pad": 392, "fim_prefix": 393, "fim_suffix": 394, "fim_middle": 395}
SPLIT = [0.7, 0.3, 0.0]
ARCHITECTURE = {
    "causal": "decoder", "infill": "decoder", "prefix": "decoder", "masked": "encoder", "next_sentence": "encoder",
    "sentence_order": "encoder", "span_corruption": "encoder_decoder", "denoising": "encoder_decoder",
    "permuted": "two_stream", "replaced": "replaced_token",
}  # fmt: skip


def write(
    prefix: Path, documents: int = 40, sentences: int = 7, seed: int = 0, longest: int = 11, **changes: Any
) -> str:
    """Documents of sentences; every token of document d is 10 + d, but for its end."""
    rng = np.random.default_rng(seed)
    known = dict(mask=399, specials=SPECIALS, sentinels=list(range(389, 369, -1)), words=word_bits([b"a"] * VOCAB))
    tokenizer = TokenizerRecord("NullTokenizer", "0" * 64, VOCAB, EOD, eod_appended=True, **{**known, **changes})
    with IndexedWriter(str(prefix), "<u2", tokenizer) as writer:
        for document in range(documents):
            lengths = rng.integers(2, longest + 1, sentences)
            ids = np.full(lengths.sum(), 10 + document)
            ids[-1] = EOD
            writer.add_document(ids, lengths.tolist())
    return str(prefix)


def job(prefix: str, objective: str, sequence: int = 32, **data: Any) -> Config:
    """A job of ``objective`` whose lengths fit it."""
    made = DataConfig(paths=[prefix], split=SPLIT, objective=objective, **data)
    model = ModelConfig(sequence=sequence)
    if objective == "span_corruption":
        model = replace(model, source_sequence=40, sequence=corruption_of_source(40, made).target)
    if objective == "denoising":
        made = replace(made, mask_probability=0.3)
        model = replace(model, source_sequence=25)
    config = Config(model=replace(model, vocab_size=VOCAB), data=made)
    return with_train(config, global_batch=8, microbatch=2, eval_samples=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = write(tmp_path_factory.mktemp("objectives") / "a")
    plan(prefix, 32, SPLIT, sentences=True)
    return prefix


@pytest.mark.parametrize("objective", ARCHITECTURE)
def test_one_corruption_for_any_ranks_any_resume_and_in_validation(objective: str, pair: str) -> None:
    config = job(pair, objective)
    assert check_data(config) == VOCAB
    reference: Any = None
    for size, micro in ((1, 2), (2, 1), (4, 2)):
        ranks = [
            Loader(with_train(config, microbatch=micro), vocab_size=VOCAB, data_rank=r, data_size=size, start_step=5)
            for r in range(size)
        ]
        batches = [next(rank) for rank in ranks]
        for rank in ranks:
            rank.close()
        made: dict[int, Any] = {}
        for m in (m for batch in batches for m in batch.microbatches):
            for i, number in enumerate(m.samples.tolist()):
                values = {name: value for name, value in vars(m).items() if value is not None}
                made[number] = {name: value.select(-1, i).tolist() for name, value in values.items()}
        counts = Counts(*(sum(column) for column in zip(*(batch.counts for batch in batches))))
        assert sorted(made) == list(range(40, 48)) and counts.tokens == 8 * config.model.sequence
        reference = reference or (made, counts)
        assert (made, counts) == reference
    straight = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1)
    for _ in range(6):
        batch = next(straight)
    straight.close()
    assert same(batch, Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1).step_batch(5))
    evaluated = with_train(config, eval_samples=6)
    first, again = (validation(evaluated, vocab_size=VOCAB, data_rank=0, data_size=1) for _ in range(2))
    assert len(first) == 3 and all(same_microbatch(a, b) for a, b in zip(first, again))


def test_source_and_target_have_the_lengths_that_the_job_says(pair: str) -> None:
    for objective in ("span_corruption", "denoising"):
        config = job(pair, objective)
        for m in Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1).step_batch(0).microbatches:
            assert m.source is not None and m.source.shape == (config.model.source_sequence, 2)
            assert m.tokens.shape == m.targets.shape == (config.model.sequence, 2) and m.source.dtype == torch.int64
            assert float(m.weights.min()) == 1.0


def test_infilled_documents_keep_their_segments(pair: str) -> None:
    """Positions and attention follow the documents as they lie after rearranging."""
    config = job(pair, "infill", reset_attention=True, reset_positions=True, fim_rate=1.0)
    samples = Samples(config, vocab_size=VOCAB)
    for number in range(30):
        example = samples.sample(number).example
        for segment in set(example.segments.tolist()):
            inside = example.segments == segment
            ordinary = {t for t in example.inputs[inside].tolist() if 10 <= t < 60}
            assert len(ordinary) <= 1, "a segment holds one document"
            assert example.positions[inside].tolist() == list(range(int(inside.sum())))


def test_the_random_text_is_of_another_document(pair: str) -> None:
    samples = Samples(job(pair, "next_sentence"), vocab_size=VOCAB)
    labels = []
    for number in range(200):
        example = samples.sample(number).example
        labels.append(example.label)
        texts = [{t for t in example.targets[example.token_types == k].tolist() if 10 <= t < 60} for k in (0, 1)]
        assert len(texts[0]) == 1
        # A text that is an end-of-document token alone says nothing.
        assert not texts[1] or (texts[0] != texts[1]) == (example.label == 1)
    assert 60 < sum(labels) < 140


def test_rows_of_sentences_are_consecutive_and_cover_the_documents(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents=30, sentences=9, longest=40)
    plan(prefix, 32, SPLIT, sentences=True)
    dataset = IndexedDataset(prefix)
    for split, (low, high) in enumerate(((0, 21), (21, 30))):
        packs, seen = open_packs(dataset, 32, SPLIT, split, sentences=True), 0
        for number in range(packs.count):
            row = packs.row(number)
            assert len(row) >= 2 and sum(stop - start for start, stop in row) <= 29
            assert len({dataset.document_at(start)[0] for start, _ in row}) == 1
            assert all(a[1] == b[0] for a, b in pairwise(row))
            assert low <= dataset.document_at(row[0][0])[0] < high
            seen += sum(stop - start for start, stop in row)
        assert seen > 0.97 * (dataset.document_start(high) - dataset.document_start(low))


def test_validation_counts_every_label_once(pair: str) -> None:
    config = with_train(job(pair, "sentence_order"), eval_samples=5)
    ranks = [validation(config, vocab_size=VOCAB, data_rank=r, data_size=2) for r in range(2)]
    assert sum(count(rank).labels for rank in ranks) == 5
    assert sum(count(rank).tokens for rank in ranks) == 5 * 32
    for m in (m for rank in ranks for m in rank):
        assert m.labels is not None and m.label_weights is not None
        assert (m.label_weights == (m.samples >= 0).float()).all()
    assert len(columns([m for rank in ranks for m in rank])) == 6


@pytest.mark.parametrize(
    ("objective", "lost", "words"),
    [
        ("infill", {"specials": None}, r"'infill' needs .* set data\.fim_tokens"),
        ("next_sentence", {"specials": {"sep": 391, "pad": 392}}, r"'next_sentence' needs .* set data\.cls_token"),
        ("sentence_order", {"specials": {"cls": 391, "pad": 392}}, r"set data\.sep_token"),
        ("sentence_order", {"specials": {"cls": 391, "sep": 392}}, r"set data\.pad_token"),
        ("span_corruption", {"sentinels": None}, r"'span_corruption' needs .* set data\.sentinel_tokens"),
        ("span_corruption", {"sentinels": [389]}, r"data\.sentinel_tokens gives 1 ids .* needs 2"),
        ("masked", {"words": None}, r"data\.mask_unit = 'word' needs the tokenizer's table of words"),
    ],
)
def test_what_is_not_known_is_refused_by_key(objective: str, lost: dict, words: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", **lost)
    plan(prefix, 32, SPLIT, sentences=True)
    data = {"mask_unit": "word"} if objective == "masked" else {}
    with pytest.raises(ValueError, match=words):
        check_data(job(prefix, objective, **data))


def test_sentences_are_refused_where_there_are_none(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", sentences=1)
    for config in (job(prefix, "next_sentence"), job(prefix, "denoising", permute_sentences=1.0)):
        with pytest.raises(ValueError, match="--split-sentences"):
            check_data(config)
    with pytest.raises(ValueError, match="--split-sentences"):
        plan(prefix, 32, SPLIT, sentences=True)
    other = write(tmp_path / "b")
    with pytest.raises(ValueError, match=r"pack_data.py .* --sequence 32 --sentences"):
        check_data(job(other, "next_sentence"))


def test_keys_of_the_job_stand_in_for_the_tokenizers(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", specials=None, sentinels=None)
    config = job(prefix, "infill", fim_tokens=[1, 2, 3], fim_rate=1.0)
    assert check_data(config) == VOCAB
    assert {1, 2, 3} <= set(Samples(config, vocab_size=VOCAB).sample(0).example.inputs.tolist())
    down = job(prefix, "span_corruption", sentinel_tokens=[389, 380], start_token=5)
    example = Samples(down, vocab_size=VOCAB).sample(0).example
    assert example.inputs[0] == 5 and example.targets[0] == 389 and 388 in example.source
    with pytest.raises(ValueError, match=r"data\.start_token = 400 is not one of the 400 ids"):
        check_data(job(prefix, "span_corruption", sentinel_tokens=[389, 380], start_token=400))


def test_lengths_that_waste_are_refused_with_the_right_ones(pair: str) -> None:
    config = job(pair, "span_corruption")
    wrong = replace(config, model=replace(config.model, sequence=9, architecture="encoder_decoder"))
    with pytest.raises(ValueError, match=r"model\.sequence \(9\) must be 10: "):
        rule(wrong)
    config = job(pair, "denoising")
    wrong = replace(config, model=replace(config.model, source_sequence=32, architecture="encoder_decoder"))
    with pytest.raises(ValueError, match=r"model\.source_sequence \(32\) must be 25,"):
        rule(wrong)


def rule(config: Config) -> None:
    """The rules of objectives alone: architectures come and go beside them."""
    from megapre.config.rules_objectives import OBJECTIVE_RULES

    for found in (hold(config) for hold in OBJECTIVE_RULES):
        if found:
            raise ValueError(found)
    check(config)


def test_the_table_of_words_follows_the_bytes() -> None:
    made = record(ByteTokenizer(), True)
    assert made.specials is None and made.sentinels is None and made.words is not None
    bits = word_bits([b" the", b"re", b",", None, b"fore_", b"\xc3", "語".encode(), "é".encode()])
    from megapre.data.setting import word_table

    table = word_table(replace(made, vocab_size=8, words=bits))
    assert table is not None and table.tolist() == [2, 3, 0, 0, 3, 3, 0, 3]
    assert json.loads(json.dumps(vars(made)))["words"] == made.words
