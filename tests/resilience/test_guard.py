"""Faults in the numbers: who is named, and that the run ends with the bits that it should."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from megapre.checkpoint import store
from megapre.config.schema import Config
from megapre.data.loader import Loader, StepBatch, batch_number
from megapre.monitor.metrics import Monitor
from megapre.parallel.buckets import Buffers
from megapre.parallel.comm import Work
from megapre.parallel.placement import Address
from megapre.parallel.shared import SharedAxis
from megapre.resilience.guard import zscore
from megapre.resilience.ranks import Ranks
from megapre.training.rewind import checkpoint_before, skipped_batches
from megapre.training.step import StepResult, TrainStep
from megapre.verify.cells import parse
from megapre.verify.pool import RankPool
from tests.training.jobs import corpus, events, job, losses, run, same

SEED = random.SystemRandom().randrange(10**6)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def run_with(ranks: Ranks, config: Config, kind: str, rank: int, when: int, times: int = 1) -> int:
    """Train with a fault of ``kind`` on ``rank`` (-1: all) at step or batch ``when``, at most ``times`` times."""
    left = [times if rank in (-1, ranks.rank) else 0]
    heard = Path(config.train.run_dir) / "heard.txt"
    call, close, step_batch, text = TrainStep.__call__, Buffers.close, Loader.step_batch, Monitor.text
    now = [-1]

    def step(self: TrainStep, microbatches: Any, targets: int, index: int, lr: float) -> StepResult:
        now[0] = index
        result = call(self, microbatches, targets, index, lr)
        if kind == "flip" and index == when and left[0] > 0:
            left[0] -= 1
            self.flat.weights.settle()
            weights = self.flat.weights.rooms[0].tensor
            slot = self.flat.layout.buckets[0].slots[0]
            place = random.Random(SEED).randrange(slot.end - slot.start)
            weights.view(torch.int16 if weights.element_size() == 2 else torch.int32)[place] ^= 1 << 3
        return result

    def done(self: Buffers, layer: int, last: bool) -> None:
        if ((kind == "gradient" and now[0] == when) or (kind == "from now on" and now[0] >= when)) and left[0] > 0:
            left[0] -= 1
            index = self.partition.used[layer][0]
            self.gradients.rooms[index].tensor[0] = float("nan")
        close(self, layer, last)

    def batch(self: Loader, number: int) -> StepBatch:
        made = step_batch(self, number)
        if batch_number(number, self._skipped) == when and left[0] > 0:
            for microbatch in made.microbatches:
                if kind == "loss":
                    microbatch.weights[0, 0] = float("nan")
                if kind == "spike":
                    microbatch.weights *= 50
        return made

    def say(self: Monitor, line: str) -> None:
        if ranks.rank == 0:
            with open(heard, "a") as file:
                file.write(line + "\n")
        text(self, line)

    with (
        patched(TrainStep, "__call__", step),
        patched(Buffers, "close", done),
        patched(Loader, "step_batch", batch),
        patched(Monitor, "text", say),
    ):
        return run(ranks, config)


def guarded(config: Config, **settings: Any) -> Config:
    return replace(config, resilience=replace(config.resilience, **settings))


def heard(config: Config) -> str:
    return (Path(config.train.run_dir) / "heard.txt").read_text()


def last(config: Config) -> Path:
    return Path(config.train.run_dir) / "checkpoints" / store.step_name(config.train.steps)


def metrics(config: Config) -> dict[int, dict[str, Any]]:
    rows = map(json.loads, (Path(config.train.run_dir) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if row.get("split") == "train"}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_by_all_and_named(kind: str, pool: RankPool, tmp_path: Path) -> None:
    """Whichever rank it comes from, all skip the step, and the weights are those of a run that skipped it too."""
    prefix = corpus(tmp_path / "text")
    ends = []
    for culprit in (3, 0) if kind == "gradient" else (2, 3):
        config = job(prefix, tmp_path / f"run{culprit}", parse("1x2x2+zero1"), steps=6, interval=0)
        assert pool.run(4, run_with, config, kind, culprit, 3, 10**6 if kind == "loss" else 1) == [0] * 4
        said = heard(config)
        assert "step 4: " in said and "is not finite" in said and "the step was skipped" in said, said
        assert {step: row["skipped"] for step, row in metrics(config).items() if row["skipped"]} == {4: 1.0}
        if kind == "loss":
            assert f"the loss of rank {culprit} and the gradient of" in said and f"on rank {culprit}" in said, said
            assert "passing fault" not in said
        else:
            assert "the gradient of" in said and "a passing fault" in said, said
        ends.append(last(config))
        assert store.read_state(ends[-1])["optimizer_steps"] == 5
    same(*ends)


def test_a_passing_fault_is_run_again_to_the_bits_of_an_undisturbed_run(pool: RankPool, tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "text")
    whole = job(prefix, tmp_path / "whole", parse("1x1x2+zero1"), steps=8, interval=2)
    assert pool.run(2, run, whole) == [0, 0]
    config = guarded(job(prefix, tmp_path / "run", parse("1x1x2+zero1"), steps=8, interval=2), on_nonfinite="rerun")
    assert pool.run(2, run_with, config, "gradient", 1, 4) == [0, 0]
    assert "it is run again; going on from step 4" in heard(config)
    same(last(whole), last(config))
    assert losses(Path(config.train.run_dir)) == losses(tmp_path / "whole")
    again = guarded(job(prefix, tmp_path / "again", parse("1x1x2+zero1"), steps=8, interval=2), on_nonfinite="rerun")
    assert pool.run(2, run_with, again, "loss", 1, 4, 10**6) == [0, 0]
    assert "again, so it is no passing fault; the step was skipped" in heard(again)


def test_skips_without_end_stop_the_run_and_no_checkpoint_holds_a_nan(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x1x2"), steps=9, interval=2)
    config = guarded(config, max_skips=3)
    with pytest.raises(Exception, match=r"that was the 3th step in a row \(resilience.max_skips\)"):
        pool.run(2, run_with, config, "from now on", 1, 5, 10**6)
    entries = [entry for entry in store.list_checkpoints(tmp_path / "run" / "checkpoints") if entry.finished]
    assert entries
    for entry in entries:
        for name, (shape, dtype) in store.names(entry.path).items():
            flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
            store.load(entry.path, [(Address(name, shape, (0,) * len(shape), shape, 0, len(flat)), flat)])
            assert bool(flat.isfinite().all()), (entry.path, name)


def test_a_spike_goes_back_and_leaves_its_batch_out(pool: RankPool, tmp_path: Path) -> None:
    """Bitwise the run of a stream without that batch; a checkpoint that holds the spike is not resumed from."""
    prefix, cell = corpus(tmp_path / "text"), parse("1x1x2+zero1")
    settings = {"spike_zscore": 12.0, "spike_window": 16}
    base = job(prefix, tmp_path / "without", cell, steps=26, interval=3)
    base = guarded(replace(base, model=replace(base.model, dropout=0.1)), **settings)
    without = replace(base, data=replace(base.data, skip_batches=[20]))
    assert pool.run(2, run, without) == [0, 0]
    config = replace(base, train=replace(base.train, run_dir=str(tmp_path / "run")))
    assert pool.run(2, run_with, config, "spike", -1, 20, 10**6) == [0, 0]
    assert "step 21: the " in heard(config) and "is left" not in heard(config)
    assert "going on from step 18 without batch 20 (samples 160 to 167)" in heard(config), heard(config)
    assert store.read_state(last(config))["skipped_batches"] == [20]
    same(last(without), last(config))
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    start, rewind, end = events(tmp_path / "run")
    assert (start["event"], start["step"], start["ranks"], start["attempt"]) == ("start", 0, 2, 0)
    assert (rewind["event"], rewind["step"], rewind["left_out"]) == ("rewind", 18, [20])
    assert "step 21" in rewind["reason"]
    assert (end["event"], end["step"], end["code"], end["signal"]) == ("end", 26, 0, "")


def test_without_a_checkpoint_to_go_back_to_the_run_goes_on(pool: RankPool, tmp_path: Path) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x1x1"), steps=24, interval=0)
    config = guarded(config, spike_zscore=12.0, spike_window=16)
    assert pool.run(1, run_with, config, "spike", -1, 20, 10**6) == [0]
    assert "there is no checkpoint of step 20 or before to go back to, so the run goes on" in heard(config)


@pytest.mark.parametrize("layout,dtype", [("1x1x4", "fp32"), ("1x1x4+zero1", "bf16")])
def test_a_flipped_weight_is_found_its_rank_named_and_undone(
    layout: str, dtype: str, pool: RankPool, tmp_path: Path
) -> None:
    prefix = corpus(tmp_path / "text")
    culprit = random.Random(SEED).randrange(4)
    whole = job(prefix, tmp_path / "whole", parse(layout), steps=8, interval=4, dtype=dtype)
    assert pool.run(4, run, whole) == [0] * 4
    config = guarded(job(prefix, tmp_path / "run", parse(layout), steps=8, interval=4, dtype=dtype), digest_interval=2)
    # With ZeRO the other ranks' shards are gathered anew each step: the flip must be looked for in the step it is made.
    assert pool.run(4, run_with, config, "flip", culprit, 5) == [0] * 4
    said = heard(config)
    assert f"of rank {culprit} is not what 3 replicas of it hold" in said and "step 6: " in said, (SEED, said)
    assert "going on from step 4" in said
    same(last(whole), last(config))


def test_the_robust_score() -> None:
    window = [3.0, 3.1, 2.9, 3.05, 2.95] * 4
    assert zscore(3.0, window) == 0 and zscore(2.0, window) < 0
    assert 4 < zscore(3.5, window) < 8 and zscore(30.0, window) > 300
    assert zscore(3.0 + 1e-9, [3.0] * 20) < 1, "a flat curve makes no spikes of rounding"
    assert zscore(30.0, [*window, 1e9, 1e9, 1e9]) > 100, "outliers do not hide the next one"


def test_batches_that_are_left_out_are_counted_once() -> None:
    assert [batch_number(step, (2, 3, 7)) for step in range(6)] == [0, 1, 4, 5, 6, 8]
    assert [batch_number(step, (0,)) for step in range(3)] == [1, 2, 3]
    assert skipped_batches({}, [5, 2]) == [2, 5]
    assert skipped_batches({"step": 4, "skipped_batches": [1]}, [5, 1]) == [1, 5]
    with pytest.raises(ValueError, match="batch 4, but the checkpoint of step 4 has passed batch 4"):
        skipped_batches({"step": 4, "skipped_batches": [1]}, [4])


def run_on_broken_hardware(ranks: Ranks, config: Config, culprit: int, what: str) -> int:
    linear, reduce = functional.linear, SharedAxis.all_reduce

    def wrong_linear(*args: Any) -> torch.Tensor:
        out = linear(*args)
        return out * (1 + 1e-3) if ranks.rank == culprit else out

    def wrong_reduce(self: SharedAxis, tensor: torch.Tensor, op: str = "sum") -> Work:
        work = reduce(self, tensor, op)
        if self.name == "data" and ranks.rank == culprit and tensor.dtype == torch.float32:
            work.wait()
            tensor[-1] += 1
        return work

    owner, name, value = {
        "arithmetic": (functional, "linear", wrong_linear),
        "network": (SharedAxis, "all_reduce", wrong_reduce),
    }[what]
    with patched(owner, name, value):
        return run(ranks, config)


@pytest.mark.parametrize(
    "what,told",
    [("arithmetic", "matrix product"), ("network", "all-reduce over the data axis")],
    ids=["arithmetic", "network"],
)
def test_a_rank_that_computes_wrong_is_named_before_it_trains(
    what: str, told: str, pool: RankPool, tmp_path: Path
) -> None:
    config = job(corpus(tmp_path / "text"), tmp_path / "run", parse("1x1x4"), steps=2, interval=0, dtype="bf16")
    with pytest.raises(Exception, match="rank 2 fails its self-test") as failure:
        pool.run(4, run_on_broken_hardware, config, 2, what)
    assert told in str(failure.value)


def test_a_spike_removes_what_was_saved_after_it(tmp_path: Path) -> None:
    pieces = [(Address("w", (3,), (0,), (3,), 0, 3), torch.ones(3))]
    for step in (3, 6, 9, 12):
        store.save(tmp_path, step, pieces, {}, rank=0, world=1, sync=store.SingleProcess())
    said: list[str] = []
    found = checkpoint_before(tmp_path, 7, 0, store.SingleProcess(), said.append)
    assert found == tmp_path / store.step_name(6) and not said
    assert [entry.step for entry in store.list_checkpoints(tmp_path)] == [3, 6]
    assert checkpoint_before(tmp_path, 2, 0, store.SingleProcess(), said.append) is None
    assert [entry.step for entry in store.list_checkpoints(tmp_path)] == [3, 6], "with nothing to go back to, all stay"
