"""ZeRO 1 to 3 and offload: what is held, what is posted when, and that none of it changes a bit of the result."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megapre.config.check import ConfigError, check
from megapre.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megapre.data.loader import Counts
from megapre.models.spec import tensors
from megapre.parallel.buckets import Buffers
from megapre.parallel.comm import Axis, Work
from megapre.parallel.grid import single
from megapre.parallel.offload import Host
from megapre.parallel.zero import Room
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.training.engine import Engine, build
from megapre.verify import oracle
from megapre.verify.cells import batches, parse, scaled_down, share
from megapre.verify.instruments import instrumented
from megapre.verify.pool import RankPool
from megapre.verify.trace import fake_grid

GPT = Config(model=ModelConfig(), optimizer=OptimizerConfig(lr=3e-3))
BF16 = replace(GPT, precision=PrecisionConfig(dtype="bf16"))


def small(layout: str, base: Config = GPT, **parallel: Any) -> tuple[Config, int]:
    cell = parse(layout)
    config, vocab_size = scaled_down(base)
    config = check(cell.apply(config), cell.world)
    return replace(config, parallel=replace(config.parallel, **parallel)), vocab_size


def step(engine: Engine, config: Config, vocab_size: int, data_rank: int = 0) -> None:
    batch = batches(config, vocab_size, 1)[0]
    engine.step(share(batch, data_rank, config.parallel.data, config.train.microbatch), Counts(50), 0, 1e-3)


# ------------------------------------------------------------------------------------------ what is held


class Watch:
    """Bytes held by weights and by gradients, at rest and at most during a step."""

    def __init__(self, buffers: Buffers, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers = buffers
        self.rest = self.peak = self.now()
        take = Room.take

        def taken(room: Room) -> None:
            take(room)
            self.peak = tuple(max(pair) for pair in zip(self.peak, self.now()))

        monkeypatch.setattr(Room, "take", taken)

    def now(self) -> tuple[int, ...]:
        held = []
        for part in (self.buffers.weights, self.buffers.gradients):
            tensors = [room.tensor for room in part.rooms] + part.shards
            held.append(sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values()))
        return tuple(held)


def most_of_two_layers(buffers: Buffers) -> int:
    """Elements of the largest two neighbouring layers, in the order of backward; a bucket counts once."""
    used = buffers.partition.used
    sizes = [bucket.size for bucket in buffers.layout.buckets]
    return max(sum(sizes[i] for i in {*used[a], *used[a + 1]}) for a in sorted(used)[:-1])


@pytest.mark.parametrize("layout", ["1x1x4", "1x1x4+zero1", "1x1x4+zero2", "1x1x4+zero3", "1x2x4+zero3+zb-h1"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_memory_falls_as_the_papers_say(layout: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live bytes of weights, gradients and optimizer of one rank against closed forms; nothing stays behind a step."""
    config, vocab_size = small(layout, replace(GPT, precision=PrecisionConfig(dtype=dtype)))
    zero, width, ranks = config.parallel.zero, 2 if dtype == "bf16" else 4, 4
    with fake_grid(config, 1) as (grid, _):
        engine = build(config, grid, torch.device("cpu"), vocab_size)
        buffers = engine.model.flat
        watch = Watch(buffers, monkeypatch)
        step(engine, config, vocab_size)
        engine.step.evaluate(share(batches(config, vocab_size, 1)[0], 0, 4, 1), Counts(50))
        total, two = buffers.layout.total, most_of_two_layers(buffers)
        weights = (total // ranks, two) if zero == 3 else (total, 0)
        gradients = (total // ranks, two) if zero >= 2 else (total, 0)
        assert watch.rest == watch.now() == (width * weights[0], 4 * gradients[0])
        assert watch.peak[0] <= width * sum(weights) and watch.peak[1] <= 4 * sum(gradients)
        if "+zb" not in layout:
            assert watch.peak == (width * sum(weights), 4 * sum(gradients))
        state = {id(t): t.nbytes for held in engine.step.optimizer.state.values() for t in held}
        masters = 4 if width == 2 else 0  # of an fp32 model they are its weights
        mine = {id(t) for t in buffers.weights.shards}
        found = sum(size for key, size in state.items() if key not in mine)
        assert found == (masters + 8) * (total // ranks if zero else total)


# ------------------------------------------------------------------------------------------ what is posted when


class Diary(Axis):
    """Writes down every collective, when it is posted and when it is awaited."""

    def __init__(self, axis: Axis, lines: list[str]) -> None:
        super().__init__(axis.name, axis.rank, axis.size, axis.group)
        self.lines = lines

    def _note(self, kind: str, tensor: Tensor, work: Work) -> Work:
        name = f"{self.name} {kind} {tensor.numel()}"
        self.lines.append(f"post {name}")
        return _Noted(work, f"wait {name}", self.lines)

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        return self._note("all_gather", output, super().all_gather(output, shard))

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        return self._note("reduce_scatter", tensor, super().reduce_scatter(shard, tensor))

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        return self._note("all_reduce", tensor, super().all_reduce(tensor, op))


class _Noted:
    def __init__(self, work: Work, line: str, lines: list[str]) -> None:
        self.work, self.line, self.lines = work, line, lines

    def wait(self) -> None:
        self.lines.append(self.line)
        self.work.wait()


def diary(ranks: Ranks, config: Config, vocab_size: int) -> tuple[list[str], dict[int, list[int]], dict[str, int]]:
    """One rank's events of two steps, sizes of its layers' buckets, and its place on the axes."""
    lines: list[str] = []
    with connected(config, ranks) as (grid, device):
        written = grid.mapped(lambda axis: Diary(axis, lines))
        engine = build(config, written, device, vocab_size)
        for stage in engine.model.stages.values():
            for number, layer in zip(stage.numbers, stage.layers):
                layer.register_forward_pre_hook(lambda *_, n=number: lines.append(f"layer {n}"))  # type: ignore[attr-defined]
        for index in range(2):
            lines.append(f"step {index}")
            step(engine, config, vocab_size, grid.data.rank)
        flat = engine.model.flat
        sizes = {n: [flat.layout.buckets[i].size for i in used] for n, used in flat.partition.used.items()}
        return lines, sizes, {name: getattr(grid, name).rank for name in ("pipeline", "data", "tensor")}


def gathers(sizes: list[int]) -> list[str]:
    return [f"data all_gather {size}" for size in sizes]


def test_zero1_gathers_travel_during_the_next_forward(pool: RankPool) -> None:
    """All are posted before the first layer runs, in the order of use; a layer waits for its own and no others'."""
    config, vocab_size = small("1x1x2+zero1", bucket_elements=1)
    lines, sizes, _ = pool.run(2, diary, config, vocab_size)[0]
    second = lines[lines.index("step 1") :]
    before = [line for line in lines[: lines.index("step 1")] if "data all_gather" in line]
    order = list(dict.fromkeys(line for n in sorted(sizes) for line in gathers(sizes[n])))
    assert all(line.startswith("post") for line in before)
    assert list(dict.fromkeys(line.removeprefix("post ") for line in before)) == order
    expected: list[str] = []
    seen = 0
    for layer in range(config.model.layers + 2):
        end = second.index(f"layer {layer}")
        expected = [line for line in second[seen:end] if "all_gather" in line]
        tied = layer == config.model.layers + 1  # the head's weight came with the embedding
        assert sorted(expected) == sorted(f"wait {line}" for line in gathers(sizes[layer]))[: -1 if tied else None]
        seen = end


def saved_at_once(ranks: Ranks, config: Config, vocab_size: int) -> bool:
    """Whether what a checkpoint would hold right after a step, and a validation loss, are all numbers."""
    with connected(config, ranks) as (grid, device):
        engine = build(config, instrumented(grid, "delay", 3), device, vocab_size)
        step(engine, config, vocab_size, grid.data.rank)
        held = all(bool(piece.isfinite().all()) for _, piece in engine.step.optimizer.pieces(share=True))
        step(engine, config, vocab_size, grid.data.rank)
        batch = share(batches(config, vocab_size, 1)[0], grid.data.rank, 2, 1)
        return held and bool(engine.step.evaluate(batch, Counts(50)).isfinite())


def test_checkpoints_and_validation_wait_for_the_gathers(pool: RankPool) -> None:
    """A gather under way shows NaN: an fp32 model's weights are its master weights, which a checkpoint reads."""
    config, vocab_size = small("1x1x2+zero1")
    assert pool.run(2, saved_at_once, config, vocab_size) == [True, True]


def test_zero3_gathers_one_layer_ahead_and_in_reverse(pool: RankPool) -> None:
    config, vocab_size = small("1x1x2+zero3", replace(GPT, model=ModelConfig(tied_embeddings=False)))
    lines, sizes, _ = pool.run(2, diary, config, vocab_size)[0]
    events = [line for line in lines[: lines.index("step 1")] if "data all_gather" in line or line.startswith("layer")]
    blocks, head = config.model.layers, config.model.layers + 1
    visits = [*range(head), head, *reversed(range(head))]  # one microbatch; the head's forward is part of its backward
    kept = {blocks + 2}  # the place of the last block's backward: its weights are still there from forward
    assert [visits[n] for n in kept] == [blocks]
    expected: list[str] = []
    for place, layer in enumerate(visits):
        for arriving in (place, place + 1) if place == 0 else (place + 1,):
            if arriving not in kept and arriving < len(visits):
                expected += [f"post {line}" for line in gathers(sizes[visits[arriving]])]
        if place not in kept:
            expected += [f"wait {line}" for line in gathers(sizes[layer])]
        if place <= head:  # an event of forward; backward calls no module
            expected.append(f"layer {layer}")
    assert events[: len(expected)] == expected


@pytest.mark.parametrize("layout", ["2x2x2+sp+zero3+interleaved:2", "1x2x2+zero2+zb-v:2"])
def test_every_axis_sees_one_order_on_all_its_ranks(layout: str, pool: RankPool) -> None:
    """What NCCL asks for, and what a rank's own waits and hurries may not change."""
    config, vocab_size = small(layout)
    found = pool.run(parse(layout).world, diary, config, vocab_size)
    for axis, others in (("data", ("pipeline", "tensor")), ("tensor", ("pipeline", "data"))):
        orders: dict[tuple[int, ...], set[str]] = {}
        for lines, _, places in found:
            posted = [line for line in lines if line.startswith(f"post {axis} ")]
            orders.setdefault(tuple(places[name] for name in others), set()).add(json.dumps(posted))
            assert axis == "tensor" or posted
        assert all(len(texts) == 1 for texts in orders.values())


# ------------------------------------------------------------------------------------------ what comes out


def trained(ranks: Ranks, config: Config, vocab_size: int) -> list[Tensor]:
    """One rank's whole buckets after three steps."""
    with connected(config, ranks) as (grid, device):
        engine = build(config, grid, device, vocab_size)
        for index, batch in enumerate(batches(config, vocab_size, 3)):
            mine = share(batch, grid.data.rank, grid.data.size, config.train.microbatch)
            engine.step(mine, Counts(50), index, 1e-2)
        flat, result = engine.model.flat, []
        for index in range(len(flat.layout.buckets)):
            with flat.weights.whole(index) as whole:
                result.append(whole.clone())
        return result


def test_stages_and_offload_change_no_bit(pool: RankPool) -> None:
    """With one microbatch sums are made in one order at every stage; with many, from stage 2 on."""

    def weights(layout: str, microbatch: int) -> list[list[Tensor]]:
        config, vocab_size = small(layout, BF16, bucket_elements=1)
        config = replace(config, train=replace(config.train, global_batch=8, microbatch=microbatch))
        return pool.run(2, trained, config, vocab_size)

    def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
        return all(torch.equal(x, y) for rank in zip(a, b) for x, y in zip(*rank))

    one = weights("1x1x2+zero1", 4)
    for layout in ("1x1x2", "1x1x2+zero2", "1x1x2+zero3", "1x1x2+zero1+offload", "1x1x2+zero3+offload-parameters"):
        assert same(weights(layout, 4), one), layout
    many = weights("1x1x2+zero2", 1)
    assert not same(many, one)
    for layout in ("1x1x2+zero3", "1x1x2+zero3+offload-parameters"):
        assert same(weights(layout, 1), many), layout


class Plain(nn.Module):
    """The oracle's model as a module."""

    def __init__(self, config: Config, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.names = config, list(weights)
        self.values = nn.ParameterList([nn.Parameter(value) for value in weights.values()])

    def forward(self, m: Any, step: int) -> Tensor:
        return oracle.loss_sum(self.config, dict(zip(self.names, self.values)), m, step)


def by_fully_shard(ranks: Ranks, config: Config, vocab_size: int) -> dict[str, Tensor]:
    """Weights after three steps of the oracle's model, sharded by torch's FSDP2."""
    with connected(config, ranks) as (grid, _):
        net = Plain(config, oracle.initial_weights(config, vocab_size))
        fully_shard(net, mesh=init_device_mesh("cpu", (ranks.world,)))
        decays = [spec.decay for spec in tensors(config.model, vocab_size)]
        groups = [
            {"params": [p for p, d in zip(net.values, decays) if d == decay], "weight_decay": rate}
            for decay, rate in ((True, config.optimizer.weight_decay), (False, 0.0))
        ]
        o = config.optimizer
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(o.beta1, o.beta2), eps=o.eps)
        for index, batch in enumerate(batches(config, vocab_size, 3)):
            for m in share(batch, grid.data.rank, grid.data.size, config.train.microbatch):
                (net(m, index) * ranks.world / 50).backward()  # FSDP averages over ranks
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.full_tensor().detach() for name, value in zip(net.names, net.values)}  # type: ignore[attr-defined]


def test_fully_shard_ends_with_the_same_weights(pool: RankPool) -> None:
    """Another engine's ZeRO-3 over the same ranks, in fp64."""
    base = replace(GPT, precision=PrecisionConfig(dtype="fp64"), optimizer=OptimizerConfig(clip=0.0))
    config, vocab_size = small("1x1x2+zero3", base, bucket_elements=1)
    theirs = pool.run(2, by_fully_shard, config, vocab_size)[0]
    with fake_grid(config, 0) as (grid, _):
        buckets = build(config, grid, torch.device("cpu"), vocab_size).model.flat.layout.buckets
    for bucket, whole in zip(buckets, pool.run(2, trained, config, vocab_size)[0]):
        for slot in bucket.slots:
            ours = whole[bucket.place(slot)].view(slot.shape)
            true = theirs[slot.spec.name]
            # Biases of keys have no gradient but rounding: the floor is the length of a step.
            error = (ours - true).norm() / max(float(true.norm()), 1e-2 * true.numel() ** 0.5)
            assert error < 1e-9, f"{slot.spec.name} is off by {error:.1e}"


def test_offloaded_state_is_kept_apart_from_the_model() -> None:
    config, vocab_size = small("1x1x1+zero3+offload")
    engine = build(config, single(), torch.device("cpu"), vocab_size)
    flat, state = engine.model.flat, engine.step.optimizer.state
    assert isinstance(flat.home, Host) and flat.weights.home is not flat.home
    assert not {t.data_ptr() for t in state["weight"]} & {t.data_ptr() for t in flat.weights.shards}
    config = replace(config, parallel=replace(config.parallel, offload="parameters"))
    engine = build(config, single(), torch.device("cpu"), vocab_size)
    assert engine.model.flat.weights.home is engine.model.flat.home


def test_the_number_of_microbatches_may_change_between_steps() -> None:
    """As it does under a batch-size ramp: sums over other numbers of microbatches leave nothing behind."""
    config, vocab_size = small("1x1x1+zero3", replace(GPT, precision=PrecisionConfig(dtype="fp64")))
    found = []
    for stage in (1, 3):
        parallel = replace(config.parallel, zero=stage, bucket_elements=1)
        engine = build(replace(config, parallel=parallel), single(), torch.device("cpu"), vocab_size)
        batch = batches(config, vocab_size, 1)[0]
        for count in (2, 8, 4):
            engine.step(batch[:count], Counts(50), 0, 1e-3)
        found.append(engine.step.optimizer.state["weight"])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_offload_of_parameters_needs_zero_3() -> None:
    job = replace(GPT, parallel=ParallelConfig(zero=1, offload="parameters"))
    with pytest.raises(ConfigError, match=r"parallel\.offload = 'parameters' needs parallel\.zero = 3, not 1"):
        check(job)
