"""Model FLOPs, peaks and rates."""

import random
from dataclasses import replace
from math import prod

import pytest

from megapre.config.schema import Config, ModelConfig, MonitorConfig
from megapre.models import spec
from megapre.monitor import throughput
from megapre.monitor.throughput import Throughput, data_sheet_peak, flops_per_token, peak_tflops

J1 = ModelConfig(layers=6, hidden=384, heads=6, sequence=256)
J2 = ModelConfig(layers=8, hidden=512, heads=8, kv_heads=4, ffn_hidden=1408, sequence=1024, activation="swiglu")


def test_the_two_standard_jobs() -> None:
    """750 and 2171 GFLOP a step, worked out by hand."""
    assert 16 * 256 * flops_per_token(J1, 50304) / 1e9 == pytest.approx(750, abs=0.5)
    assert 8 * 1024 * flops_per_token(J2, 32000) / 1e9 == pytest.approx(2171, abs=0.5)


def test_against_a_count_of_every_multiplication() -> None:
    """The same figure from the list of GEMM shapes of one sequence, for random shapes."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for _ in range(50):
        heads = draw.choice([2, 4, 8])
        model = ModelConfig(
            architecture=draw.choice(["decoder", "encoder"]),
            layers=draw.randint(1, 5),
            heads=heads,
            hidden=heads * draw.choice([8, 16]),
            kv_heads=draw.choice([0, 1, 2]),
            ffn_hidden=draw.choice([0, 40]),
            sequence=draw.choice([16, 33]),
            activation=draw.choice(["gelu", "swiglu"]),
        )
        vocab, s, h, d = draw.randint(10, 99), model.sequence, model.hidden, model.head_dim
        kv = d * model.n_kv_heads
        gemms = [(s, h, h), (s, h, kv), (s, h, kv), (s, h, h)]
        gemms += [(s, h, model.n_ffn)] * (2 if model.activation == "swiglu" else 1) + [(s, model.n_ffn, h)]
        linear = model.layers * sum(2 * m * k * n for m, k, n in gemms) + 2 * s * h * vocab
        attention = model.layers * model.heads * (2 * s * s * d) * 2 / (2 if model.architecture == "decoder" else 1)
        assert flops_per_token(model, vocab) * s == pytest.approx(3 * (linear + attention)), seed


def test_an_encoder_and_cross_attention_count_with_their_own_lengths() -> None:
    """Against the sum over the tensors of the spec, each times the tokens it meets, and the scores written out."""
    model = ModelConfig(
        architecture="encoder_decoder", layers=3, encoder_layers=2, hidden=24, heads=4, kv_heads=2, sequence=10,
        source_sequence=14, activation="geglu", bias=False, norm="rmsnorm", positions="none", tied_embeddings=False,
    )  # fmt: skip
    linear = 0
    for tensor in spec.tensors(model, 50):
        if len(tensor.shape) == 2 and tensor.name != "embedding.tokens.weight":
            of_source = "encoder." in tensor.name or ".cross.k" in tensor.name or ".cross.v" in tensor.name
            linear += 2 * prod(tensor.shape) * (14 if of_source else 10)
    scores = 4 * 24 * (2 * 14 * 14 + 3 * 10 * 10 / 2 + 3 * 10 * 14)
    assert flops_per_token(model, 50) * 10 == pytest.approx(3 * (linear + scores))


def test_a_generator_counts_beside_the_discriminator() -> None:
    """Against the sum over the tensors of the spec, each times the tokens it meets, and the scores written out."""
    model = ModelConfig(
        architecture="replaced_token", layers=3, generator_layers=2, hidden=24, heads=4, generator_hidden=12,
        sequence=10, positions="none", tied_embeddings=False,
    )  # fmt: skip
    blocks = [t for t in spec.tensors(model, 50) if len(t.shape) == 2 and "blocks." in t.name]
    assert sum("generator." in t.name for t in blocks) == 2 * 6
    linear = sum(2 * prod(t.shape) * 10 for t in blocks) + 2 * 24 * 50 * 10
    scores = 4 * 10 * 10 * (3 * 24 + 2 * 12)
    assert flops_per_token(model, 50) * 10 == pytest.approx(3 * (linear + scores))


def test_only_experts_that_work_on_a_token_count() -> None:
    """Mixtral 8x7B: 12.9 billion of 46.7 billion parameters are active."""
    mixtral = ModelConfig(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336, activation="swiglu", experts=8,
        experts_per_token=2, sequence=1,
    )  # fmt: skip
    attention_scores = 12.0 * 32 * 4096 * 0.5
    weights = (flops_per_token(mixtral, 32000) - attention_scores) / 6
    assert weights / 1e9 == pytest.approx(12.88 - 0.131, abs=0.01)  # the embedding is a look-up
    sparse = replace(mixtral, moe_every=2, moe_dense_first=4)
    dense, all_sparse = flops_per_token(replace(mixtral, experts=0), 32000), flops_per_token(mixtral, 32000)
    share = sum(sparse.has_experts(layer) for layer in range(1, 33)) / 32
    assert share == 14 / 32
    assert flops_per_token(sparse, 32000) == pytest.approx(share * all_sparse + (1 - share) * dense)
    shared = flops_per_token(replace(mixtral, shared_experts=1), 32000) - all_sparse
    assert shared == 6 * 32 * 3 * 4096 * 14336


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA GH200 480GB", "bf16", 990),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", 0),
        ("Tesla T4", "fp16", 65),
        ("Something New", "bf16", 0),
    ],
)
def test_peaks_of_known_devices(name: str, dtype: str, peak: float) -> None:
    assert data_sheet_peak(name, dtype) == peak


def test_a_configured_peak_comes_first_and_a_cpu_is_measured() -> None:
    assert peak_tflops(Config(monitor=MonitorConfig(peak_tflops=3.5)), "cuda") == 3.5
    assert 1e-4 < peak_tflops(Config(), "cpu") < 1e3


class Clock:
    """A `time.monotonic` that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "monotonic", lambda: self.now)


def meter(warmup: int, world: int = 2) -> Throughput:
    config = Config(model=J1, monitor=MonitorConfig(warmup_steps=warmup, peak_tflops=1.0))
    config = replace(config, train=replace(config.train, global_batch=16))
    return Throughput(config, 50304, world, "cpu")


def run(meter: Throughput, clock: Clock, seconds: float) -> None:
    meter.begin()
    clock.now += seconds
    meter.end()


def test_rates_leave_out_warm_up_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rates = meter(warmup=2)
    for seconds in (50.0, 20.0, 2.0):
        run(rates, clock, seconds)
        assert rates.rates() == {}
    with rates.pause():
        clock.now += 1000.0
    run(rates, clock, 4.0)
    assert rates.rates()["step_ms"] == pytest.approx(2000)
    run(rates, clock, 1.0)
    run(rates, clock, 1.0)
    found = rates.rates()
    assert found["step_ms"] == pytest.approx(2500)
    assert found["tokens_per_s"] == pytest.approx(16 * 256 / 2.5)
    assert found["tflops"] == pytest.approx(0.750 / 2.5 / 2, rel=1e-3)
    assert found["mfu"] == pytest.approx(found["tflops"])
    assert rates.rates() == {}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_late_results_and_checkpoints_do_not_bend_the_rate(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The trainer's loop of 2 s steps: results a step late, all of them before a checkpoint every fourth step."""
    clock = Clock(monkeypatch)
    rates = meter(warmup=2)
    ready: list[float] = []
    seen = []

    def log(step: int) -> None:
        clock.now = max(clock.now, ready[step])
        rates.end()
        seen.extend(rates.rates().items())

    late = None
    for step in range(16):
        start = max(clock.now, ready[-1] if ready else 0.0)
        ready.append(start + 2.0)
        clock.now = ready[-1] if device == "cpu" else clock.now + 0.1
        if late is not None:
            log(late)
        rates.begin()
        late = step
        if step % 4 == 3:
            log(late)
            late = None
            with rates.pause():
                clock.now += 50.0
    found = [value for key, value in seen if key == "step_ms"]
    assert len(found) == 13
    # On a GPU a drained queue costs the dispatch of one step, 0.1 s, and the loop catches up on it.
    assert found == pytest.approx([2000.0] * 13, abs=1e-6 if device == "cpu" else 101)
