from __future__ import annotations

import random
import subprocess
import sys
import threading
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch

from megapre.data.indexed import IndexedDataset
from megapre.data.loader import Loader, Microbatch, StepBatch, held_out, validation
from megapre.data.samples import Samples
from tests.data.corpora import EOD, VOCAB, job, ramp, with_train, write_pair


@pytest.fixture
def pair(tmp_path):
    rng = random.Random(0)
    return write_pair(tmp_path / "a", [rng.randrange(1, 60) for _ in range(40)])


def same(a: StepBatch, b: StepBatch) -> bool:
    return (
        a.step == b.step
        and a.counts == b.counts
        and len(a.microbatches) == len(b.microbatches)
        and all(same_microbatch(x, y) for x, y in zip(a.microbatches, b.microbatches))
    )


def same_microbatch(x: Microbatch, y: Microbatch) -> bool:
    pairs = [(getattr(x, f.name), getattr(y, f.name)) for f in fields(Microbatch)]
    return all(p is q is None or torch.equal(p, q) for p, q in pairs)


def columns(microbatches: list[Microbatch]) -> dict[int, tuple]:
    """Samples of microbatches by their number."""
    found = {}
    for m in microbatches:
        for i, number in enumerate(m.samples.tolist()):
            segments = None if m.segments is None else m.segments[:, i].tolist()
            found[number] = (*(t[:, i].tolist() for t in (m.tokens, m.targets, m.weights, m.positions)), segments)
    return found


def test_shapes_types_and_shift(pair):
    config = job([pair], sequence=16, batch=8, micro=2)
    batch = Loader(config, vocab_size=VOCAB, data_rank=1, data_size=2).step_batch(3)
    assert batch.step == 3 and len(batch.microbatches) == 2
    for m in batch.microbatches:
        for name in ("tokens", "targets", "weights", "positions"):
            tensor = getattr(m, name)
            assert tensor.shape == (16, 2) and tensor.is_contiguous()
            assert tensor.dtype == (torch.float32 if name == "weights" else torch.int64)
        assert m.segments is None and m.samples.dtype == torch.int64
        assert torch.equal(m.tokens[1:], m.targets[:-1])
        assert m.positions[:, 0].tolist() == list(range(16))
    # Global batch 8, two ranks, two microbatches of two: rank 1 holds 2, 3 and 6, 7 of each step.
    assert [m.samples.tolist() for m in batch.microbatches] == [[26, 27], [30, 31]]
    assert batch.counts.targets == 4 * 16


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_global_batches_do_not_depend_on_the_data_parallel_size(tmp_path, pair, objective):
    other = write_pair(tmp_path / "b", [33] * 30, seed=5)
    config = job([pair, other], weights=[0.3, 0.7], objective=objective, reset_attention=True, reset_positions=True)
    for step in (0, 1, 17):
        reference = None
        for size in (1, 2, 4):
            for micro in (1, 2):
                ranks = [
                    Loader(with_train(config, microbatch=micro), vocab_size=VOCAB, data_rank=r, data_size=size)
                    for r in range(size)
                ]
                batches = [rank.step_batch(step) for rank in ranks]
                whole = columns([m for b in batches for m in b.microbatches])
                tokens = sum(b.counts.targets for b in batches)
                assert sorted(whole) == list(range(step * 8, step * 8 + 8))
                reference = reference or (whole, tokens)
                assert (whole, tokens) == reference


def test_resume_at_any_step_equals_the_straight_run(pair):
    """B58-B61: over several epochs, resumed twice, and at each step."""
    config = job([pair], batch=4, micro=4)
    windows = Samples(config, vocab_size=VOCAB).sources[0].order.windows
    steps = 3 * windows // 4 + 2
    run = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1)
    straight = list(islice(run, steps))
    run.close()
    assert [b.step for b in straight] == list(range(steps))
    for start in range(steps):
        loader = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1, start_step=start)
        assert same(loader.step_batch(start), straight[start])
    again = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1, start_step=5)
    first = list(islice(again, 3))
    again.close()
    second = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1, start_step=first[-1].step + 1)
    resumed = first + list(islice(second, steps - 8))
    second.close()
    assert all(same(a, b) for a, b in zip(resumed, straight[5:], strict=True))


@pytest.mark.parametrize("start_in_second_epoch", [False, True])
def test_every_epoch_holds_each_window_once(tmp_path, start_in_second_epoch):
    """Token t of the source is t, so every input token must appear exactly once in every epoch."""
    prefix = ramp(tmp_path / "r", 16 * 24 + 5)
    config = job([prefix], batch=8, micro=8)
    first = 4 if start_in_second_epoch else 0
    loader = Loader(config, vocab_size=389, data_rank=0, data_size=1, start_step=first)
    orders = []
    for epoch in range(first // 3, 4):
        batches = [loader.step_batch(3 * epoch + i) for i in range(3)]
        tokens = torch.cat([m.tokens for b in batches for m in b.microbatches], dim=1)
        assert tokens.unique().numel() == tokens.numel() == 24 * 16
        orders.append(tokens[0].tolist())
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_length_of_the_run_changes_no_sample(pair):
    """The peer reorders the whole run when the sample target rises."""
    config = job([pair])
    longer = with_train(config, steps=config.train.steps * 1000)
    for step in (0, 3, 50):
        a = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1).step_batch(step)
        b = Loader(longer, vocab_size=VOCAB, data_rank=0, data_size=1).step_batch(step)
        assert same(a, b)


def test_another_seed_is_another_order(pair):
    config = job([pair])
    other = replace(config, data=replace(config.data, seed=config.data.seed + 1))
    a, b = (Loader(c, vocab_size=VOCAB, data_rank=0, data_size=1).step_batch(0) for c in (config, other))
    assert not torch.equal(a.microbatches[0].tokens, b.microbatches[0].tokens)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_reading_ahead_changes_nothing(pair, prefetch):
    config = job([pair], prefetch=prefetch)
    threads = threading.active_count()
    loader = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=2, start_step=2)
    for step, batch in enumerate(islice(loader, 12), 2):
        assert same(batch, loader.step_batch(step))
    loader.close()
    assert list(loader) == []
    assert threading.active_count() == threads


def test_an_exception_of_the_reading_thread_reaches_the_consumer_and_stays(pair):
    loader = Loader(job([pair]), vocab_size=VOCAB, data_rank=0, data_size=1)
    compute = loader.step_batch

    def fail(step: int) -> StepBatch:
        if step == 2:
            raise OSError("the disk is gone")
        return compute(step)

    loader.step_batch = fail
    assert [next(loader).step, next(loader).step] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(loader)
    loader.close()


def test_an_id_outside_the_vocabulary_is_an_error_where_it_is_read(pair):
    loader = Loader(job([pair]), vocab_size=VOCAB - 200, data_rank=0, data_size=1)
    with pytest.raises(ValueError, match=rf"{pair} holds token id \d+, outside the 800 ids .*model\.vocab_size"):
        next(loader)
    loader.close()


def test_positions_and_segments_follow_the_documents(tmp_path, pair):
    config = job([pair], reset_positions=True, reset_attention=True)
    dataset = IndexedDataset(pair)
    bounds = set(dataset.documents.tolist())
    samples = Samples(config, vocab_size=VOCAB)
    begin_with_document = 0
    for number in range(4 * samples.sources[0].order.windows):
        sample = samples.sample(number).example
        spans = samples.sources[0].order.spans(number)
        flat = [t for start, stop in spans for t in range(start, stop)][:-1]
        position, segment = -1, 0
        begin_with_document += flat[0] in bounds
        for i, token in enumerate(flat):
            starts = token in bounds and i > 0
            position, segment = (0, segment + 1) if starts else (position + 1, segment)
            assert sample.positions[i] == position and sample.segments[i] == segment
            # Every document of this pair ends in EOD, so the index and the ids must tell the same story.
            assert starts == (i > 0 and sample.inputs[i - 1] == EOD)
    assert begin_with_document > 0
    only = Samples(job([pair], reset_positions=True), vocab_size=VOCAB).sample(3).example
    assert only.segments is None and only.positions.max() < 16


def test_eod_mask_loss_silences_what_eod_predicts(pair):
    config = job([pair], eod_mask_loss=True)
    batch = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1).step_batch(0)
    ends = 0
    for m in batch.microbatches:
        assert torch.equal(m.weights == 0, m.tokens == EOD)
        ends += int((m.tokens == EOD).sum())
    assert ends > 0 and batch.counts.targets == 8 * 16 - ends


def test_splits_share_no_token(tmp_path):
    prefix = ramp(tmp_path / "r", 2000, document=20)
    config = job([prefix], split=[0.6, 0.3, 0.1])
    seen = {}
    for split in ("train", "valid", "test"):
        samples = Samples(config, vocab_size=2000, split=split)
        windows = samples.sources[0].order.windows
        arrays = [samples.sample(n).example for n in range(8 * windows)]
        seen[split] = {int(t) for s in arrays for t in np.concatenate((s.inputs, s.targets))}
    assert seen["train"] == set(range(1200)) and seen["valid"] == set(range(1200, 1800))
    assert seen["test"] == set(range(1800, 2000))


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.9])
def test_a_fraction_is_whole_documents_each_once_an_epoch_and_leaves_validation_alone(tmp_path, fraction):
    whole = job([ramp(tmp_path / "ramp", 6000)], sequence=7, split=[0.8, 0.1, 0.1])
    part = replace(whole, data=replace(whole.data, fraction=fraction))
    samples = Samples(part, vocab_size=6000)
    (source,) = samples.sources
    documents = int(np.ceil(96 * fraction))  # of the 120 of 50 tokens, 96 are for training
    assert (source.order.lo, source.order.hi) == (0, 50 * documents)
    for epoch in range(2):
        read = [samples.sample(epoch * source.order.windows + n).example.inputs for n in range(source.order.windows)]
        seen = np.sort(np.concatenate(read))
        assert len(set(seen.tolist())) == len(seen) > 50 * documents - 7 and seen[-1] < 50 * documents
    held_out = [Samples(config, vocab_size=6000, split="valid").sources[0].order for config in (whole, part)]
    assert (held_out[0].lo, held_out[0].hi) == (held_out[1].lo, held_out[1].hi) == (4800, 5400)


def test_weights_default_to_training_tokens(tmp_path):
    small, large = write_pair(tmp_path / "s", [100] * 10), write_pair(tmp_path / "l", [100] * 30, seed=1)
    assert Samples(job([small, large]), vocab_size=VOCAB).blend.counts == [1, 3]


def test_validation_is_one_set_for_every_data_parallel_size(tmp_path, pair):
    other = write_pair(tmp_path / "b", [50] * 30, seed=5)
    config = with_train(job([pair, other], split=[0.5, 0.5, 0.0], batch=12), eval_samples=13)
    reference = None
    for size in (1, 2, 3):
        for micro in (1, 2):
            changed = with_train(config, microbatch=micro)
            ranks = [validation(changed, vocab_size=VOCAB, data_rank=r, data_size=size) for r in range(size)]
            assert len({len(rank) for rank in ranks}) == 1
            everything = [m for rank in ranks for m in rank]
            weight = sum(float(m.weights.sum()) for m in everything)
            assert weight == 13 * 16
            for m in everything:
                assert ((m.weights.sum(0) == 0) == (m.samples < 0)).all()
            found = {k: v for k, v in columns(everything).items() if k >= 0}
            assert sorted(found) == list(range(13))
            reference = reference or found
            assert found == reference


@pytest.mark.parametrize("stages", [[], [10**6]])
def test_validation_by_path_reads_each_path_alone_whatever_the_others(tmp_path, stages):
    paths = [ramp(tmp_path / "first_text_document", 2000), ramp(tmp_path / "second_text_document", 3000)]
    split, weights = [0.5, 0.5, 0.0], [0.3, 0.7] if not stages else [0.0, 1.0, 0.5, 0.5]
    place = dict(vocab_size=3000, data_rank=0, data_size=1)
    config = with_train(job(paths, split=split, weights=weights, stages=stages), eval_samples=10, eval_by_path=True)
    sets = held_out(config, **place)
    assert list(sets) == ["loss", "loss_on/first", "loss_on/second"]
    for name, path, low, high in (("first", paths[0], 1000, 2000), ("second", paths[1], 1500, 3000)):
        alone = validation(with_train(job([path], split=split), eval_samples=10), **place)
        assert all(same_microbatch(a, b) for a, b in zip(sets[f"loss_on/{name}"], alone, strict=True))
        read = torch.cat([m.tokens.flatten() for m in alone])
        assert low <= int(read.min()) and int(read.max()) < high
    # a path that rests in the first stage has no part in the whole
    assert bool((torch.cat([m.tokens[0] for m in sets["loss"]]) < 1500).any()) != bool(stages)
    assert list(held_out(with_train(config, eval_by_path=False), **place)) == ["loss"]


def test_a_small_validation_split_is_used_once(tmp_path):
    prefix = ramp(tmp_path / "r", 1000, document=50)
    config = with_train(job([prefix], split=[0.9, 0.1, 0.0]), eval_samples=64)
    parts = validation(config, vocab_size=1000, data_rank=0, data_size=1)
    tokens = torch.cat([m.tokens for m in parts], dim=1)
    assert tokens.shape[1] == 6 and tokens.unique().numel() == 6 * 16
    with pytest.raises(ValueError, match=r"valid split.*data\.split"):
        validation(with_train(job([prefix]), eval_samples=1), vocab_size=1000, data_rank=0, data_size=1)
    assert validation(job([prefix]), vocab_size=1000, data_rank=0, data_size=1) == []


def test_batches_that_do_not_divide_are_refused(pair):
    with pytest.raises(ValueError, match=r"train\.global_batch = 8 .* 3 data-parallel"):
        Loader(job([pair]), vocab_size=VOCAB, data_rank=0, data_size=3)


def test_the_torch_free_modules_import_no_torch():
    names = "indexed order blend samples check sidecar"
    code = "import sys\n" + "".join(f"import megapre.data.{name}\n" for name in names.split())
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
