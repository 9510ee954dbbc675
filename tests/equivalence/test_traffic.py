"""Bytes on every axis are those of the closed forms: nothing is sent that need not be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megapre.config.check import check
from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Counts
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.training.engine import build
from megapre.verify.cells import Cell, batches, parse, scaled_down, share
from megapre.verify.instruments import counted
from megapre.verify.pool import RankPool

VOCAB = 67
JOB = Config(
    model=ModelConfig(
        norm="rmsnorm", activation="swiglu", positions="rope", heads=4, bias=False, tied_embeddings=False
    )
)  # fmt: skip


def traffic(ranks: Ranks, config: Config) -> tuple[dict[str, int], int, int]:
    """One step's bytes by axis and operation, elements of this rank's flat buffer, and blocks on this rank."""
    counts: dict[str, int] = {}
    with connected(config, ranks) as (grid, device):
        engine = build(config, counted(grid, counts), device, VOCAB)
        batch = batches(config, VOCAB, 1)[0]
        mine = share(batch, grid.data.rank, grid.data.size, config.train.microbatch)
        engine.step(mine, Counts(100), 0, 1e-3)
        held = [number for stage in engine.model.stages.values() for number in stage.numbers]
        blocks = sum(1 <= number <= config.model.layers for number in held)
        return counts, engine.model.flat.layout.total, blocks


def measure(
    pool: RankPool, layout: str, job: Config = JOB
) -> tuple[Config, Cell, list[tuple[dict[str, int], int, int]]]:
    cell = parse(layout)
    config, _ = scaled_down(job)
    config = check(cell.apply(replace(config, train=replace(config.train, microbatch=2, global_batch=8))), cell.world)
    return config, cell, pool.run(cell.world, traffic, config)


def activation(config: Config) -> int:
    """Bytes of one microbatch's [seq, batch, hidden] in fp32."""
    return config.model.sequence * config.train.microbatch * config.model.hidden * 4


@pytest.mark.parametrize("layout", ["2x1x1", "4x1x1", "2x1x1+sp", "4x1x1+sp"])
def test_tensor_parallel(layout: str, pool: RankPool) -> None:
    """A block: an all-reduce behind each of two row layers forward and two column layers backward.

    With sequence parallelism each becomes a reduce-scatter and an all-gather of the same volume, and backward gathers
    the blocks' column layers' input again. Embedding and head add one exchange each way: the head's loss makes its
    gradients with it, chunk by chunk, so that it gathers once and the bytes of its sums do not depend on the chunks.
    """
    config, _, found = measure(pool, layout)
    microbatches = config.train.global_batch // config.train.microbatch
    size, blocks = activation(config), config.model.layers
    for counts, _, _ in found:
        sums = Counter(counts)
        if "+sp" not in layout:
            losses = 3 * config.model.sequence * config.train.microbatch * 4  # max, and sum with target
            assert sums["tensor/all_reduce"] == microbatches * ((4 * blocks + 2) * size + losses)
            assert sums["tensor/all_gather"] == sums["tensor/reduce_scatter"] == 0
            continue
        assert sums["tensor/reduce_scatter"] == microbatches * (4 * blocks + 2) * size
        # Forward 2 per block and the head; backward 2 for dy, 2 for x again per block; embedding 1.
        assert sums["tensor/all_gather"] == microbatches * (6 * blocks + 2) * size


@pytest.mark.parametrize("layout", ["1x2x1", "1x4x1", "1x2x1+zb-h1", "1x2x1+interleaved:2"])
def test_pipeline(layout: str, pool: RankPool) -> None:
    """Every boundary between ranks carries one activation and one gradient per microbatch, and no more."""
    config, cell, found = measure(pool, layout)
    microbatches = config.train.global_batch // config.train.microbatch
    boundaries = cell.pipeline * cell.chunks - 1
    sent = sum(counts.get(f"{axis}/send", 0) for counts, _, _ in found for axis in ("pipeline", "backward"))
    received = sum(counts.get(f"{axis}/recv", 0) for counts, _, _ in found for axis in ("pipeline", "backward"))
    assert sent == received == 2 * boundaries * microbatches * activation(config)


@pytest.mark.parametrize(("layout", "zero"), [("1x1x2", 0), ("1x1x2+zero1", 1), ("1x1x1+ring:2+zero1", 1)])
def test_replicas(layout: str, zero: int, pool: RankPool) -> None:
    """Gradients cross once a step whatever the number of microbatches; under ZeRO-1 weights cross once too."""
    _, cell, found = measure(pool, layout)
    axis = "replicas" if cell.context > 1 else "data"  # with one context rank both are the same axis
    for counts, total, _ in found:
        if not zero:
            assert counts[f"{axis}/all_reduce"] == total * 4
            continue
        assert counts[f"{axis}/reduce_scatter"] == counts[f"{axis}/all_gather"] == total * 4
        assert f"{axis}/all_reduce" not in counts


def layer_sizes(ranks: Ranks, config: Config) -> tuple[dict[str, int], dict[int, int]]:
    """One step's bytes by axis and operation, and the elements that each layer of this rank uses."""
    counts: dict[str, int] = {}
    with connected(config, ranks) as (grid, device):
        engine = build(config, counted(grid, counts), device, VOCAB)
        batch = batches(config, VOCAB, 1)[0]
        engine.step(share(batch, grid.data.rank, grid.data.size, config.train.microbatch), Counts(100), 0, 1e-3)
        flat = engine.model.flat
        return counts, {n: sum(flat.layout.buckets[i].size for i in used) for n, used in flat.partition.used.items()}


@pytest.mark.parametrize("layout", ["1x1x2+zero2", "1x1x2+zero3", "1x2x2+zero2", "1x2x2+zero3"])
def test_sharded_gradients_and_weights(layout: str, pool: RankPool) -> None:
    """ZeRO-2 and 3 reduce-scatter once per microbatch; ZeRO-3 gathers for every forward and every backward.

    1F1B on rank r of P with M microbatches is w = min(M, P - 1 - r) forwards, M - w pairs, w backwards. Where forward
    turns to backward the stage's last block is still there, and where backward turns to forward its first layer. The
    head's forward is part of its backward.
    """
    cell = parse(layout)
    config, _ = scaled_down(JOB)
    config = check(cell.apply(config), cell.world)
    microbatches = config.train.global_batch // cell.data
    for rank, (counts, sizes) in enumerate(pool.run(cell.world, layer_sizes, config)):
        total = sum(sizes.values())  # embeddings are not tied: no layer shares a bucket
        assert counts["data/reduce_scatter"] == 4 * microbatches * total
        if cell.zero == 2:
            assert counts["data/all_gather"] == 4 * total
            continue
        turns = microbatches - min(microbatches, cell.pipeline - 1 - rank // cell.data)
        last = max(layer for layer in sizes if layer <= config.model.layers)
        kept = turns * sizes[last] + (turns - 1) * sizes[min(sizes)]
        kept += microbatches * sizes.get(config.model.layers + 1, 0)
        assert counts["data/all_gather"] == 4 * (2 * microbatches * total - kept)


def test_partial_gradients_cross_the_tensor_axis_once_a_step(pool: RankPool) -> None:
    """Norms under sequence parallelism: their shards are summed after the last microbatch, not whole in each."""
    config, cell, found = measure(pool, "2x1x2+sp+zero2")
    microbatches = config.train.global_batch // (config.train.microbatch * cell.data)
    norms = (2 * config.model.layers + 1) * config.model.hidden
    losses = 3 * config.model.sequence * config.train.microbatch * 4
    sent = [counts["tensor/all_reduce"] - microbatches * losses for counts, _, _ in found]
    assert sent[0] == sent[1] and sent[2] == sent[3]  # tensor ranks of one replica hold the same shard
    padded = (2 * config.model.layers + 1) * -(-config.model.hidden // 64) * 64
    assert 4 * norms <= sent[0] + sent[2] <= 4 * padded


MOE = replace(JOB, model=replace(JOB.model, experts=8, experts_per_token=2, router_aux_loss=0.01))


@pytest.mark.parametrize("layout", ["1x1x4+ep:2", "2x1x1+ep:2", "2x1x1+ep:2+sp", "2x1x2+ep:2+etp:2+sp"])
def test_experts(layout: str, pool: RankPool) -> None:
    """A choice of a token crosses the expert axis four times: there and back, forward and backward.

    Tensor ranks share out their tokens, so nothing travels twice; without sequence parallelism that costs an all-gather
    each way. Neighbours that share an expert gather tokens and sum results, as a dense MLP does.
    """
    config, cell, found = measure(pool, layout, MOE)
    model, microbatches = config.model, config.train.global_batch // (config.train.microbatch * cell.data)
    times = microbatches * model.layers
    size, etp = activation(config) // cell.tensor, cell.expert_tensor  # of the tokens that a rank routes
    choices = size // (model.hidden * 4) * model.experts_per_token
    rows = sum(counts["expert/all_to_all"] for counts, _, _ in found)
    lengths = cell.world * model.experts * 8
    assert rows == times * (4 * size * model.experts_per_token * etp * cell.world + lengths)
    per_expert = 3 * model.hidden * model.expert_hidden // etp
    held = model.layers * model.experts // cell.expert * per_expert
    for counts, _, _ in found:
        sums = Counter(counts)
        if cell.data * cell.tensor > cell.expert * etp:  # padding of buckets apart
            assert held * 4 <= sums["expert_replicas/all_reduce"] < held * 4 * 1.05
        if etp > 1:
            gathered = size * etp + choices * etp * 4
            assert sums["expert_tensor/all_gather"] == times * (gathered + size * etp + choices * etp * 8)
            assert sums["expert_tensor/reduce_scatter"] == times * (gathered + size * etp)
        if cell.tensor > 1:
            # With sequence parallelism attention, head and embedding gather as above, and experts not at all.
            gathers = 3 * model.layers + 2 if cell.sequence else 2 * model.layers
            whole = microbatches * gathers * activation(config)
            assert sums["tensor/all_gather"] == whole + times * choices * cell.tensor * 8  # and the choices, for losses


def test_ring(pool: RankPool) -> None:
    """Keys and values travel c - 1 times each way, their gradients c times home."""
    config, cell, found = measure(pool, "1x1x1+ring:4")
    microbatches = config.train.global_batch // config.train.microbatch
    pair = 2 * activation(config) // cell.context  # k and v, as wide as hidden here
    for counts, _, blocks in found:
        assert counts["context/exchange"] == microbatches * blocks * pair * (2 * (cell.context - 1) + cell.context)
