"""Time: the arithmetic of kernels, links and schedules, and its agreement with published runs."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest

from megapre.planner import hardware
from megapre.planner.constants import FILE, Constants, load, to_toml
from megapre.planner.explain import assumptions, bill, bound, further_assumptions
from megapre.planner.job import Job, Layout, Shape, Stack
from megapre.planner.memory import memory
from megapre.planner.network import Network
from megapre.planner.pipeline import Costs, pipeline_time, run, stage_layers
from megapre.planner.search import closed_form
from megapre.planner.speed import READ_BANDWIDTH, Speed, alignment, tile_share
from megapre.planner.timing import block, head, join, predict
from megapre.planner.work import Linear

CONSTANTS = load()
SHAPE = Shape(32, 4096, 32, 8, 128, 14336, 128256, 8192, gated=True, tied=False)
LAYOUT = Layout(tensor=2, pipeline=4, data=4, sequence=True, zero=1, microbatch=1, global_batch=128)
JOB = Job(SHAPE, LAYOUT, Stack(), hardware.load("h100"))


def test_there_are_at_most_32_constants_and_the_file_holds_them_all() -> None:
    assert len(fields(Constants)) <= 32
    assert FILE.is_file() and set(to_toml(CONSTANTS, "").split()) >= {f.name for f in fields(Constants)}
    for f in fields(Constants):  # a share is a share
        if f.name.startswith(("gemm", "memory", "softmax", "link", "nic", "hop", "all_to_all")) or "overlap" in f.name:
            assert 0 < getattr(CONSTANTS, f.name) <= 1, f.name


def test_the_parts_of_a_step_add_up() -> None:
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    for _ in range(40):
        tensor, pipeline, context = draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4)), draw.choice((1, 2))
        chunks = draw.choice((1, 2)) if pipeline > 1 else 1
        layout = Layout(
            tensor, pipeline, draw.choice((1, 2, 8)), context, chunks=chunks, zero=draw.choice((0, 1, 3)),
            schedule="interleaved" if chunks > 1 else "1f1b", recompute=draw.choice(("none", "full")),
            sequence=tensor > 1, microbatch=draw.choice((1, 2)), global_batch=128,
        )  # fmt: skip
        time = predict(replace(JOB, layout=layout), CONSTANTS)
        assert sum(time.parts().values()) == pytest.approx(time.step, rel=1e-6), (seed, layout, time)
        assert min(time.parts().values()) >= 0, (seed, layout, time)
        busy = JOB.shape.model_flops(JOB.tokens) / layout.ranks / JOB.device.peak["bf16"]
        assert time.step > busy, "faster than the data sheet allows"


def test_more_work_takes_longer_and_a_faster_device_less() -> None:
    base = predict(JOB, CONSTANTS).step
    assert predict(JOB.on(recompute="full"), CONSTANTS).step > base
    assert predict(JOB.on(global_batch=256), CONSTANTS).step > 1.8 * base
    assert predict(replace(JOB, shape=replace(SHAPE, ffn=2 * 14336)), CONSTANTS).step > 1.2 * base
    assert predict(replace(JOB, device=hardware.load("a100-80")), CONSTANTS).step > 1.8 * base
    assert predict(replace(JOB, device=hardware.load("h200")), CONSTANTS).step < base
    assert predict(replace(JOB, stack=replace(JOB.stack, dtype="fp8")), CONSTANTS).step < 0.9 * base
    assert predict(replace(JOB, nic=1e9), CONSTANTS).step > base
    assert predict(replace(JOB, stack=replace(JOB.stack, overlap=False)), CONSTANTS).step > base


def test_products_reach_at_most_the_best_known_one() -> None:
    speed = Speed(JOB, CONSTANTS)
    for rows, columns, inner in ((8192, 8192, 8192), (4096, 100, 4096), (1, 4096, 4096), (300, 70, 1000)):
        rate = 2 * rows * columns * inner / speed.product(rows, columns, inner)
        assert 0 < rate <= JOB.device.best["bf16"], (rows, columns, inner)
    assert tile_share(256 * 132, 128, 132) == 1.0
    assert 133 / 264 < tile_share(256 * 133, 128, 132) < 0.7  # a second wave for one tile; smaller tiles lose less
    assert (alignment(4096, 4096), alignment(100, 4096)) == (1.0, 0.6)


def test_a_profile_may_bring_constants_of_its_own() -> None:
    slow = replace(JOB.device, measured={"gemm_hopper": 0.5 * CONSTANTS.gemm_hopper})
    assert CONSTANTS.on(JOB.device) is CONSTANTS
    product = Speed(JOB, CONSTANTS).product(8192, 8192, 8192)
    assert Speed(replace(JOB, device=slow), CONSTANTS).product(8192, 8192, 8192) == pytest.approx(2 * product)
    assert 1.3 < predict(replace(JOB, device=slow), CONSTANTS).step / predict(JOB, CONSTANTS).step < 2.0


def test_a_profile_may_bring_the_speed_of_our_head() -> None:
    """Loss and gradients in one go, all of it forward's; other engines have heads of their own."""
    tokens, columns = LAYOUT.microbatch * SHAPE.sequence, SHAPE.vocab / LAYOUT.tensor
    work = 6.0 * tokens * columns * SHAPE.hidden
    knows = replace(JOB, device=replace(JOB.device, head={"bf16": {2048: 2e14, 6144: 4e14, 8192: 5e14}}))
    assert head(knows, Speed(knows, CONSTANTS)) == (pytest.approx(work / 3e14), 0.0, 0.0)
    for job in (replace(knows, stack=replace(JOB.stack, engine="megatron")), replace(knows, stack=Stack(dtype="fp16"))):
        bare = replace(job, device=JOB.device)
        assert head(job, Speed(job, CONSTANTS)) == head(bare, Speed(bare, CONSTANTS))
    slow = replace(JOB, device=replace(JOB.device, head={"bf16": {64: 1e13}}))
    assert slow.device.head_rate("bf16", 4096) == 1e13 and slow.device.head_rate("fp32", 64) is None
    assert predict(slow, CONSTANTS).step > 1.5 * predict(JOB, CONSTANTS).step


def test_gradients_are_added_to_the_sum_of_microbatches() -> None:
    """In the product itself behind its arithmetic, or by a second kernel that reads and writes all of them again."""
    speed, layer = Speed(JOB, CONSTANTS), Linear(4096, 4096, 8192)
    apart = Speed(replace(JOB, stack=replace(JOB.stack, separate_sum=True)), CONSTANTS)
    assert speed.linear(layer)[:2] == apart.linear(layer)[:2]
    again = 4096 * 4096 * (2 + 2 * 4) / (JOB.device.bandwidth * READ_BANDWIDTH)
    assert apart.linear(layer)[2] == pytest.approx(speed.linear(layer)[2] + again)
    few = replace(layer, rows=16)  # bound by memory
    assert speed.linear(few)[2] >= 4096 * 4096 * 2 * 4 / (JOB.device.bandwidth * READ_BANDWIDTH)
    one = Speed(replace(JOB.on(global_batch=4), stack=apart.job.stack), CONSTANTS)
    assert one.linear(layer)[2] == pytest.approx(speed.linear(layer)[2]), "one microbatch has nothing to add to"


def test_our_engine_hides_tensor_parallel_traffic_of_backward_alone() -> None:
    def traffic(**stack: object) -> tuple[float, float]:
        job = replace(JOB, stack=replace(JOB.stack, **stack))  # type: ignore[arg-type]
        made = block(job, Speed(job, CONSTANTS), moe=False)
        return made.forward_traffic, made.backward_traffic

    bare = traffic(overlap=False)
    assert bare[0] == bare[1] == traffic(tensor_overlap=False)[0]
    assert traffic() == (bare[0], pytest.approx(bare[1] * (1 - 0.5 * CONSTANTS.tensor_overlap)))
    assert traffic(engine="megatron")[1] < traffic()[1] and traffic(engine="megatron")[0] < bare[0]


def test_fp8_casts_its_weights_once_a_step() -> None:
    job = replace(JOB, stack=replace(JOB.stack, dtype="fp8"))
    once, many = Speed(job.on(global_batch=4), CONSTANTS), Speed(job, CONSTANTS)
    weights = (SHAPE.attention_weights() + SHAPE.mlp_weights(False)) / 2
    saved = once.byte_bound(8192, moe=False)[0] - many.byte_bound(8192, moe=False)[0]
    assert saved == pytest.approx(2 * weights * (1 - 1 / 32) / many.memory)


def test_rings_cost_what_the_formula_says() -> None:
    net = Network(JOB, CONSTANTS)
    size = 1e9
    inside = 2 * 7 * (size / 8 + net.chunk) / net.inside
    assert net.all_reduce(size, 8) == pytest.approx(inside + net.started(8))
    assert net.gather(size, 64) < 63 * (size / 64 + net.chunk) / net.adapter
    assert net.gather(size, 1) == net.all_reduce(size, 1) == 0
    # Ranks of two nodes that stand 2 apart share the adapters of a pair.
    assert net.bandwidth(8, 2) == pytest.approx(4 * net.adapter)
    assert net.bandwidth(4, 2) == net.inside
    # Without the latency, a token travels to every node of its experts once.
    far = net.exchange_of_experts(1000, 8, 8192, 16, 1) - 2 * net.latency
    assert far == pytest.approx(max(1000 * (1 - 0.5**8) * 8192 / net.exchange, 1000 * 8 * 8192 * 7 / 8 / net.inside))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_even_stages_give_the_textbook_bubble(schedule: str) -> None:
    """(p - 1) / m of the ideal time (arXiv 2104.04473, section 2.2), extrapolated beyond what is simulated."""
    for microbatches in (8, 64, 1000):
        layout = Layout(pipeline=4, schedule=schedule, global_batch=microbatches)
        costs = Costs([1.0] * 4, [2.0] * 4, [1.0] * 4, 0.0)
        wanted = 3.0 * (microbatches + 3)
        assert pipeline_time(replace(JOB, layout=layout), costs) == pytest.approx(wanted)
        assert closed_form(replace(JOB, layout=layout), costs) == pytest.approx(wanted)


def test_extrapolated_schedules_are_the_simulated_ones() -> None:
    for schedule, chunks in (("interleaved", 2), ("zb-h1", 1), ("zb-v", 2), ("1f1b", 1)):
        stages = 4 * chunks
        costs = Costs([1.0] * (stages - 1) + [1.7], [2.0] * (stages - 1) + [3.1], [1.0] * stages, 0.05)
        layout = Layout(pipeline=4, chunks=chunks, schedule=schedule, global_batch=48)
        simulated = run(layout, costs, 48).time
        assert pipeline_time(replace(JOB, layout=layout), costs) == pytest.approx(simulated, rel=5e-3), schedule


def test_zero_bubble_schedules_are_ordered_as_their_paper_says() -> None:
    """1F1B > ZB-H1 > ZB-H2 > ideal (arXiv 2401.10241, table 4)."""
    costs = Costs([1.0] * 4, [2.0] * 4, [1.0] * 4, 0.0)
    layout = Layout(pipeline=4, global_batch=12)
    times = [
        pipeline_time(replace(JOB, layout=replace(layout, schedule=name)), costs) for name in ("1f1b", "zb-h1", "zb-h2")
    ]
    assert times[0] > times[1] > times[2] >= 36


def test_models_cut_as_if_embedding_and_head_were_blocks() -> None:
    assert stage_layers(replace(SHAPE, layers=126), Layout(pipeline=8, chunks=16)) == (0, *[1] * 126, 0)
    assert stage_layers(replace(SHAPE, layers=70), Layout(pipeline=12)) == (5, *[6] * 10, 5)
    assert stage_layers(SHAPE, Layout(pipeline=4)) == (8, 8, 8, 8)


def test_the_host_is_a_floor() -> None:
    assert join(1.0, 0.1) == pytest.approx(1.0, rel=1e-6)
    assert join(0.1, 1.0) == pytest.approx(1.0, rel=1e-6)
    assert 1.0 < join(1.0, 1.0) < 1.1 and join(0.0, 0.0) == 0.0
    small = Job(Shape(12, 256, 4, 4, 64, 1024, 1024, 128), Layout(global_batch=1), Stack(), hardware.load("h100"))
    assert "host" in bound(predict(small, CONSTANTS))


def test_every_assumption_has_a_range_around_the_prediction() -> None:
    base = predict(JOB, CONSTANTS).step
    found = assumptions(JOB, CONSTANTS)
    assert {"attention kernel", "overlap of traffic and computation", "network between nodes"} <= {
        entry.name for entry in found
    }
    for entry in found:
        assert entry.low <= base * (1 + 1e-9) and base * (1 - 1e-9) <= entry.high, entry
    experts = replace(SHAPE, experts=8, experts_per_token=2, expert_ffn=4096)
    moe = replace(JOB, shape=experts, layout=replace(LAYOUT, expert=8))
    assert "balance of experts" in {entry.name for entry in assumptions(moe, CONSTANTS)}
    cost, need = bill(JOB, predict(JOB, CONSTANTS), 1e12, price=2.0), memory(JOB, 0)
    answers = {"GiB": need.total / 2**30, "$": cost.dollars, "MWh": cost.kilowatt_hours / 1000}
    for entry in further_assumptions(JOB, need, cost):
        assert entry.low < answers.pop(entry.unit) < entry.high and entry.unit in entry.answers, entry
    assert not answers


def test_a_bill_multiplies() -> None:
    time = predict(JOB, CONSTANTS)
    cost = bill(JOB, time, 1e12, price=2.0)
    steps = 1e12 / (128 * 8192)
    assert cost.seconds == pytest.approx(steps * time.step)
    assert cost.dollars == pytest.approx(cost.seconds / 3600 * 32 * 2.0)
    assert cost.kilowatt_hours == pytest.approx(cost.seconds / 3600 * 32 * 0.7 * 1.3)
    assert cost.mfu == pytest.approx(SHAPE.model_flops(JOB.tokens) / 32 / time.step / 989e12)


def test_flops_follow_the_published_formula() -> None:
    """72 B L s h^2 (1 + s/(6h) + V/(12 h L)) with full attention (arXiv 2205.05198, eq. 7)."""
    shape = Shape(48, 6144, 64, 64, 96, 4 * 6144, 51200, 2048, causal=False)
    wanted = 72 * 4 * 48 * 2048 * 6144**2 * (1 + 2048 / (6 * 6144) + 51200 / (12 * 6144 * 48))
    assert shape.model_flops(4 * 2048) == pytest.approx(wanted)
