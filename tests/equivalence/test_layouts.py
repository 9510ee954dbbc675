"""Every layout that fits 8 ranks computes the oracle's training run: losses, every gradient, norms, weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig, TrainConfig
from megapre.parallel.pipeline.schedules import plans
from megapre.parallel.pipeline.simulate import simulate
from megapre.verify.cells import Cell, every, parse, scaled_down
from megapre.verify.pool import RankPool
from megapre.verify.run import Prover

CELLS = list(every(8))
WIDE = [cell for cell in CELLS if (cell.tensor > 1) + (cell.pipeline > 1) + (cell.data > 1) == 2]
SEED = random.SystemRandom().randrange(10**6)

GPT = Config(model=ModelConfig(), optimizer=OptimizerConfig(lr=3e-3))
BERT = Config(
    model=ModelConfig(architecture="encoder"),
    data=DataConfig(objective="masked"),
    optimizer=OptimizerConfig(lr=3e-3),
    precision=PrecisionConfig(dtype="bf16"),
)
LLAMA = Config(
    model=ModelConfig(
        norm="rmsnorm", activation="swiglu", positions="rope", heads=4, kv_heads=2, bias=False, tied_embeddings=False,
        dropout=0.1, attention_dropout=0.1,
    ),
    data=DataConfig(reset_positions=True, reset_attention=True),
    optimizer=OptimizerConfig(lr=3e-3),
)  # fmt: skip
PALM = Config(
    model=ModelConfig(parallel_block=True, activation="swiglu", positions="rope", heads=4, kv_heads=1, bias=True),
    optimizer=OptimizerConfig(lr=3e-3),
    precision=PrecisionConfig(dtype="fp16"),
    train=TrainConfig(label_smoothing=0.1, z_loss=1e-2),
)
JOBS = {"gpt": GPT, "bert": BERT, "llama": LLAMA, "palm": PALM}


@pytest.fixture(scope="module")
def over_gloo(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Prover:
    """The GPT-like job on processes that talk over gloo, as training does."""
    return Prover(*scaled_down(GPT), pool, Path(tmp_path_factory.mktemp("gloo")))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_layout_agrees_over_gloo(cell: Cell, over_gloo: Prover) -> None:
    """The decoder in fp32 with a process for each rank."""
    for arm, _, (name, error, limit) in over_gloo.both(cell):
        assert error <= limit, f"{cell} arm {arm}: {name} is off by {error:.2e}, limit {limit:.2e}"


PAIRS = [("bert", cell) for cell in CELLS]
PAIRS += [("gpt", parse(name)) for name in "1x1x1 2x1x1 2x1x1+sp 1x2x1 1x1x2 1x1x2+zero1 1x2x2+zero1".split()]
PAIRS += [("llama", cell) for cell in [Cell(2), Cell(4, 1, 2, True, 1)]] + [("palm", Cell(2, 2))]


@pytest.mark.parametrize(("job", "cell"), PAIRS, ids=[f"{job}-{cell}" for job, cell in PAIRS])
def test_layout_agrees_with_the_oracle(job: str, cell: Cell, agree: Callable[[str, Cell, bool], None]) -> None:
    agree(job, cell, True)


@pytest.mark.parametrize("instrument", ["fifo", "delay"])
@pytest.mark.parametrize("cell", [Cell(2, 2, 2, True, 1), random.Random(SEED).choice(WIDE)], ids=str)
def test_order_and_timing_of_messages_do_not_matter(
    cell: Cell, instrument: str, provers: Callable[[str], Prover]
) -> None:
    """Under NCCL's strict queues, late results and poison in whatever is read too early."""
    _, (name, error, limit) = provers("gpt").layout(cell, instrument)
    assert error <= limit, f"{cell} under {instrument}: {name} is off by {error:.2e}; {SEED=}"


def test_uneven_stages(tmp_path: Path) -> None:
    config, vocab_size = scaled_down(replace(GPT, parallel=replace(GPT.parallel, schedule="gpipe")))
    config = replace(config, parallel=replace(config.parallel, layers_per_stage=[1, 3, 1]))
    _, (name, error, limit) = Prover(config, vocab_size, None, tmp_path).layout(Cell(pipeline=3))
    assert error <= limit, name


SCHEDULED = (
    "1x4x1", "1x4x1+gpipe", "1x2x2+zero1", "1x2x1+interleaved:2", "2x2x1+sp+interleaved:2", "1x2x2+zero1+interleaved:2",
    "1x4x1+zb-h1", "2x2x2+sp+zero1+zb-h1", "1x2x1+zb-v:2", "2x2x2+sp+zero1+zb-v:2", "1x1x1+zb-v:2",
)  # fmt: skip


@pytest.mark.parametrize("layout", SCHEDULED)
def test_schedules_agree_and_hold_what_the_simulator_predicts(
    layout: str, provers: Callable[[str], Prover]
) -> None:
    cell = parse(layout)
    report, (name, error, limit) = provers("gpt").layout(cell, "fifo" if cell.pipeline > 1 else "")
    assert error <= limit, f"{layout}: {name} is off by {error:.2e}"
    microbatches = provers("gpt").config.train.global_batch // cell.data
    made = plans(cell.schedule or "1f1b", cell.pipeline, cell.chunks, microbatches)
    per_rank = [report.in_flight[rank] for rank in range(0, cell.world, cell.world // cell.pipeline)]
    assert tuple(per_rank) == simulate(made).in_flight


NIGHTLY = pytest.mark.nightly
ZERO = [
    ("gpt", "1x1x2+zero2+offload", "fifo"), ("gpt", "1x2x2+zero3", "delay"), ("bert", "2x1x2+sp+zero3", "fifo"),
    ("gpt", "1x2x2+zero2+interleaved:2", "fifo"), ("gpt", "1x2x2+zero3+zb-h1", "fifo"),
    ("llama", "1x1x2+ring:2+zero3+offload-parameters", "delay"), ("gpt", "1x2x2+zero2+zb-v:2", "delay"),
    ("gpt", "2x2x2+sp+zero3+interleaved:2+offload", "fifo"),
    *(pytest.param(*case, marks=NIGHTLY) for case in (
        ("gpt", "1x1x1+zero3+offload-parameters", ""), ("gpt", "1x1x2+zero1+offload", "fifo"),
        ("gpt", "1x1x4+zero2", ""), ("gpt", "1x1x4+zero3", "fifo"), ("bert", "1x2x2+zero3+offload", "delay"),
        ("llama", "4x1x2+sp+zero2", "fifo"),
        ("palm", "4x1x2+zero3", "fifo"), ("llama", "2x1x2+ring:2+sp+zero3", "delay"),
        ("gpt", "2x1x2+ulysses:2+sp+zero2", "fifo"), ("gpt", "1x2x2+ulysses:2+zero3+zb-h1", "fifo"),
        ("llama", "1x2x2+ring:2+zero2+interleaved:2", "delay"), ("bert", "2x2x2+sp+zero2", "delay"),
        ("palm", "2x2x2+sp+zero3+offload-parameters", "fifo"), ("gpt", "2x2x2+sp+zero3+zb-v:2", "delay"),
        ("gpt", "2x2x2+sp+zero2+zb-h1+offload", "fifo"), ("gpt", "1x4x2+zero3", "fifo"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("job", "layout", "instrument"), ZERO)
def test_zero_and_offload_agree(
    job: str, layout: str, instrument: str, provers: Callable[[str], Prover]
) -> None:
    """Sharded gradients and weights under every other axis; arm A under strict queues, where late is poison."""
    prover, cell = provers(job), parse(layout)
    for _, (name, error, limit) in (prover.layout(cell, instrument), prover.numerics(cell)):
        assert error <= limit, f"{job} {layout}: {name} is off by {error:.2e}, limit {limit:.2e}"


CONTEXT = [
    ("gpt", "1x1x1+ring:2"), ("gpt", "1x1x1+ulysses:2"), ("bert", "1x1x1+ring:4"), ("llama", "1x1x1+ring:2"),
    ("llama", "1x1x1+ulysses:2"), ("llama", "2x1x1+ring:2+sp"), ("gpt", "1x2x2+ring:2+zero1+zb-v:2"),
]  # fmt: skip


@pytest.mark.parametrize(("job", "layout"), CONTEXT)
def test_context_parallel_agrees(job: str, layout: str, provers: Callable[[str], Prover]) -> None:
    """Causal, full and document masks, GQA, dropout, resets: the sequence may be cut anywhere."""
    for arm, _, (name, error, limit) in provers(job).both(parse(layout)):
        assert error <= limit, f"{job} {layout} arm {arm}: {name} is off by {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("layout", ["2x1x1+ring:2+sp", "1x1x1+ulysses:2"])
def test_context_parallel_under_strict_queues(layout: str, provers: Callable[[str], Prover]) -> None:
    _, (name, error, limit) = provers("llama").layout(parse(layout), "delay")
    assert error <= limit, f"{layout}: {name} is off by {error:.2e}"


@pytest.mark.parametrize("layout", ["1x1x1", "2x2x1+sp", "1x2x1+zb-h1", "1x2x2+zero3"])
def test_recompute_changes_no_bit(layout: str, provers: Callable[[str], Prover]) -> None:
    """With dropout on: masks are drawn again, not remembered."""
    prover = provers("llama")
    kept = prover.layout(parse(layout))[0]
    for policy, layers in (("full", 0), ("full", 1), ("selective", 0)):
        parallel = replace(prover.config.parallel, recompute=policy, recompute_layers=layers)
        again = prover.layout(parse(layout), config=replace(prover.config, parallel=parallel))[0]
        assert again.digests == kept.digests, (policy, layers)
