"""Memory: elements are those of the spec, and bytes those that a traced rank of the engine holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megapre.config.check import check
from megapre.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, TrainConfig
from megapre.models import spec
from megapre.planner import hardware
from megapre.planner.job import Layout, from_config, shape_of
from megapre.planner.memory import elements, memory
from megapre.planner.pipeline import stage_layers

VOCAB = 32000
GPT = ModelConfig(layers=4, hidden=512, heads=8, sequence=512)
LLAMA = ModelConfig(
    layers=8, hidden=512, heads=8, kv_heads=4, ffn_hidden=1408, sequence=512, norm="rmsnorm", activation="swiglu",
    positions="rope", bias=False, tied_embeddings=False,
)  # fmt: skip
SHORT = replace(LLAMA, layers=4)
PALM = replace(GPT, parallel_block=True, norm="rmsnorm", bias=False)
CPU = replace(hardware.load("h100"), kind="cpu")


def job(model: ModelConfig, dtype: str, batch: int, micro: int, **parallel: object) -> Config:
    grid = ParallelConfig(**parallel)  # type: ignore[arg-type]
    train = TrainConfig(global_batch=batch, microbatch=micro)
    return check(Config(model=model, parallel=grid, precision=PrecisionConfig(dtype=dtype), train=train))


LAYOUTS = {
    "gpt": (job(GPT, "bf16", 8, 4, data=2), 0),
    "gpt-fp32": (job(GPT, "fp32", 8, 4, data=2), 0),
    "gpt-tp2-sp": (job(GPT, "bf16", 8, 4, data=2, tensor=2, sequence=True), 0),
    "gpt-pp2-last": (job(GPT, "bf16", 16, 4, data=1, pipeline=2), 1),
    "gpt-zero2": (job(GPT, "bf16", 8, 2, data=4, zero=2), 0),
    "gpt-zero3-full": (job(GPT, "bf16", 8, 2, data=4, zero=3, recompute="full"), 0),
    "palm": (job(PALM, "bf16", 8, 4, data=2, zero=1), 0),
    "llama-zero1": (job(SHORT, "bf16", 16, 4, data=4, zero=1), 0),
    "llama-tp2-sp-full": (job(SHORT, "bf16", 8, 4, data=2, tensor=2, sequence=True, recompute="full"), 0),
    "llama-tp2-pp4": (job(SHORT, "bf16", 16, 2, data=1, tensor=2, pipeline=4), 0),
    "llama-interleaved-selective": (
        job(LLAMA, "bf16", 16, 2, data=1, pipeline=4, chunks=2, schedule="interleaved", recompute="selective"), 0
    ),
    "llama-zb-h1": (job(SHORT, "bf16", 16, 2, data=1, pipeline=4, schedule="zb-h1"), 0),
    "llama-zb-v": (job(LLAMA, "bf16", 16, 2, data=1, pipeline=4, chunks=2, schedule="zb-v"), 0),
    "llama-gpipe": (job(SHORT, "bf16", 8, 2, data=1, pipeline=4, schedule="gpipe"), 0),
    "llama-ulysses": (job(SHORT, "bf16", 8, 4, data=1, context=2, context_method="ulysses"), 0),
    "llama-ring": (job(SHORT, "bf16", 4, 4, data=1, context=2, tensor=2), 0),
}  # fmt: skip
LAYOUTS |= {
    kind: (replace(job(SHORT, "bf16", 8, 2, data=2, tensor=2, zero=1), optimizer=OptimizerConfig(kind=kind)), 0)
    for kind in ("lion", "muon", "adafactor")
}
WITHIN = 0.03
LONG = ("llama-ring", "gpt-fp32", "llama-gpipe", "gpt-tp2-sp")
"""Traces that take seconds and tell little more than the others."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly) if n in LONG else n for n in LAYOUTS])
def test_memory_is_that_of_a_traced_rank(name: str) -> None:
    from megapre.verify.trace import trace

    config, rank = LAYOUTS[name]
    found = trace(config, VOCAB, rank)
    parallel = config.parallel
    planned = memory(from_config(config, CPU, VOCAB), rank // (parallel.tensor * parallel.data * parallel.context))
    measured, predicted = sum(found.peak.values()), planned.total
    ours = {kind: int(size) >> 20 for kind, size in planned.kinds().items()}
    told = f"{ {kind: size >> 20 for kind, size in found.peak.items()} } against {ours}, MiB"
    assert abs(predicted / measured - 1) < WITHIN, f"{predicted / measured - 1:+.1%}: {told}"
    if parallel.zero < 2:
        for kind in ("weights", "gradients", "optimizer"):
            assert abs(planned.kinds()[kind] / found.peak[kind] - 1) < 0.01, f"{kind}: {told}"


@pytest.mark.parametrize("model", [GPT, LLAMA, PALM, replace(LLAMA, kv_heads=1), replace(GPT, tied_embeddings=False)])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 2), (1, 4)])
def test_elements_are_those_of_the_spec(model: ModelConfig, tensor: int, pipeline: int) -> None:
    config = job(model, "bf16", 8, 1, tensor=tensor, pipeline=pipeline, data=1)
    planned = from_config(config, CPU, VOCAB)
    ranges = spec.stages(model, pipeline, [])
    assert [len([n for n in held if 1 <= n <= model.layers]) for held in ranges] == list(
        stage_layers(planned.shape, planned.layout)
    )
    tensors = spec.tensors(model, VOCAB, tensor)
    for rank, held in enumerate(ranges):
        wanted = 0
        for entry in tensors:
            if set(entry.layers) & set(held):
                size = 1
                for length in entry.placement.local_shape(entry.shape, tensor):
                    size *= length
                wanted += size
        assert elements(planned, rank).dense == wanted, f"rank {rank}"


MOE = replace(
    SHORT, experts=8, experts_per_token=2, expert_hidden=256, shared_experts=1, moe_dense_first=1, kv_heads=8
)


@pytest.mark.parametrize("model", [GPT, LLAMA, PALM, MOE])
def test_parameters_are_those_of_the_spec(model: ModelConfig) -> None:
    wanted = 0
    for entry in spec.tensors(model, VOCAB):
        size = 1
        for length in entry.shape:
            size *= length
        wanted += size
    assert shape_of(Config(model=model), VOCAB).parameters() == wanted


def test_zero_shards_what_its_stage_says() -> None:
    """ZeRO paper, table 1: 2 + 4 + 12 bytes a weight, sharded one after the other (arXiv 1910.02054)."""
    base = from_config(job(LLAMA, "bf16", 64, 1, data=8), CPU, VOCAB)
    sizes = [memory(base.on(zero=stage)) for stage in range(4)]
    count = elements(base, 0).dense
    assert [m.weights / count for m in sizes] == [2, 2, 2, 2 / 8]
    assert [m.gradients / count for m in sizes] == [4, 4, 4 / 8, 4 / 8]
    assert [m.optimizer / count for m in sizes] == [12, 12 / 8, 12 / 8, 12 / 8]


def test_experts_are_split_over_their_own_ranks() -> None:
    planned = from_config(job(LLAMA, "bf16", 64, 1, data=8), CPU, VOCAB)
    shape = replace(planned.shape, experts=16, experts_per_token=2, expert_ffn=256)
    moe = replace(planned, shape=shape, layout=replace(planned.layout, expert=4))
    routed = 3 * 512 * 256 * 16 * LLAMA.layers
    assert elements(moe, 0).experts == routed / 4
    assert elements(replace(moe, layout=replace(moe.layout, expert=1)), 0).experts == routed
    assert moe.layout.expert_replicas == 2


def test_recomputing_more_keeps_less() -> None:
    model = replace(LLAMA, kv_heads=1)
    base = from_config(job(model, "bf16", 64, 2, data=1, tensor=2, sequence=True), CPU, VOCAB)
    sizes = [memory(base.on(recompute=how)).activations for how in ("none", "selective", "full")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    halves = memory(base.on(recompute="full", recompute_share=0.5)).activations
    assert sizes[2] < halves < sizes[0]


def test_stages_hold_what_is_in_flight() -> None:
    """1F1B: rank r of p holds p - r microbatches (arXiv 2205.05198, section 4.3)."""
    model = replace(LLAMA, layers=8)
    base = from_config(job(model, "bf16", 64, 1, data=1, pipeline=4), CPU, VOCAB)
    held = [memory(base, rank).activations for rank in range(3)]
    one = held[0] - held[1]
    assert held[1] - held[2] == pytest.approx(one)
    assert memory(base.on(schedule="gpipe"), 0).activations > held[0] + 8 * one
    assert Layout(pipeline=4).stages == 4
