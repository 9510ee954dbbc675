"""How fast a run is: tokens/s, TFLOP/s per device and MFU (model FLOPs utilisation, PaLM, arXiv 2204.02311)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from megapre.config.schema import Config, ModelConfig
from megapre.monitor import hardware

PEAKS = {
    # Dense tensor-core TFLOP/s (fp32: CUDA cores) as printed in NVIDIA's data sheets, without sparsity.
    # The first whose words all stand in the device's name counts, so longer names stand first.
    "B200": {"bf16": 2250.0, "fp16": 2250.0},  # HGX B200 data sheet: 36 PF sparse bf16 for 8
    "GH200": {"bf16": 990.0, "fp16": 990.0, "fp32": 67.0, "fp64": 34.0},  # GH200 data sheet
    "H200": {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0, "fp64": 34.0},  # H200 data sheet, SXM
    "H100 NVL": {"bf16": 835.0, "fp16": 835.0, "fp32": 60.0, "fp64": 30.0},  # H100 data sheet
    "H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "fp32": 51.0, "fp64": 26.0},  # H100 data sheet
    "H100": {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0, "fp64": 34.0},  # H100 data sheet, SXM
    "A100": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5, "fp64": 9.7},  # A100 data sheet
    "L40S": {"bf16": 362.0, "fp16": 362.0, "fp32": 91.6},  # L40S data sheet
    "L4": {"bf16": 121.0, "fp16": 121.0, "fp32": 30.3},  # L4 data sheet, half the sparse figure
    "A10": {"bf16": 125.0, "fp16": 125.0, "fp32": 31.2},  # A10 data sheet
    "V100 SXM2": {"fp16": 125.0, "fp32": 15.7, "fp64": 7.8},  # V100 data sheet
    "T4": {"fp16": 65.0, "fp32": 8.1},  # T4 data sheet
}


def flops_per_token(model: ModelConfig, vocab: int) -> float:
    """Model FLOPs per token, forward and backward: ``6 N + 12 layers x heads x head size x keys``.

    N counts the weights of matrices that a token is multiplied by (attention, MLP or router and the experts that work
    on it, and the output layer; an embedding is a look-up). Each costs 2 FLOPs forward and 4 backward. Attention
    scores and their use cost ``4 x heads x head size`` a layer forward for each key that a query reads: on average
    sequence / 2 in causal attention, all in full attention, fewer with a window; half as much again
    where queries also meet keys of distances (``transformer_xl``). Recomputation is not counted.
    Formula: arXiv 2104.04473 and PaLM's appendix B. With an encoder beside the decoder all is counted per token of the
    decoder: source / sequence tokens of the encoder, and cross-attention. A generator and its output layer count too.
    """
    output = 6.0 * model.n_embedding * vocab
    if model.architecture == "two_stream":  # the query stream has all but keys and values
        keys = 2 * model.hidden * model.n_kv_heads * model.head_dim
        return 2 * _stack(model) - 6.0 * model.layers * keys + output
    if model.generator_layers:
        return _stack(model.generator) + _stack(model.discriminator) + output
    if not model.encoder_layers:
        return _stack(model) + output
    share, width = model.source_sequence / model.sequence, model.heads * model.head_dim
    encoder = replace(model, architecture="encoder", layers=model.encoder_layers, sequence=model.source_sequence)
    cross = 2 * model.hidden * (width + model.n_kv_heads * model.head_dim * share)
    cross_attention = model.layers * (6.0 * cross + 12.0 * width * model.source_sequence)
    return share * _stack(encoder) + _stack(replace(model, architecture="decoder")) + cross_attention + output


def _stack(model: ModelConfig) -> float:
    """Model FLOPs of the blocks per token that they work on."""
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.n_kv_heads)
    matrices = 3 if model.gated else 2
    active = (model.experts_per_token + model.shared_experts) * model.n_expert_hidden
    mlp, moe = matrices * model.hidden * model.n_ffn, model.hidden * (matrices * active + model.experts)
    sparse = sum(model.has_experts(layer) for layer in range(1, model.layers + 1))
    weights = model.layers * attention + (model.layers - sparse) * mlp + sparse * moe
    reach = min(model.window or model.sequence, model.sequence)  # a query's keys lie in a window
    if model.architecture == "decoder":
        read = reach - reach * reach / (2 * model.sequence)
    else:
        read = model.sequence - max(0, model.sequence - reach) ** 2 / model.sequence
    products = 3 if model.positions == "transformer_xl" else 2  # queries meet keys of distances too
    return 6.0 * weights + 6.0 * products * model.layers * model.heads * model.head_dim * read


def peak_tflops(config: Config, device_type: str) -> float:
    """Peak of one device for the job's dtype in TFLOP/s; 0 when it is not known.

    In this order: ``monitor.peak_tflops``, the data sheet of a known GPU, a short GEMM on a CPU.
    """
    dtype = config.precision.dtype
    if config.monitor.peak_tflops:
        return config.monitor.peak_tflops
    if device_type == "cpu":
        return hardware.measure_peak(dtype)
    return data_sheet_peak(hardware.device_name(), dtype)


def data_sheet_peak(name: str, dtype: str) -> float:
    """Dense peak of the GPU called ``name`` in TFLOP/s, from `PEAKS`; 0 when it is not listed."""
    words = set(name.replace("-", " ").split())
    for known, peaks in PEAKS.items():
        if words.issuperset(known.split()):
            return peaks.get(dtype, 0.0)
    return 0.0


class Throughput:
    """Rates of a run, without its first ``monitor.warmup_steps`` steps, validations and checkpoints.

    A step's time is that between two calls of `begin`, which the loop makes at the same point of each turn: a loop
    that reads a device's results a step late, and all of them before a checkpoint, sees results in bursts.
    """

    def __init__(self, config: Config, vocab_size: int, world_size: int, device_type: str) -> None:
        self._warmup = config.monitor.warmup_steps
        self._batch, self._length = config.train.global_batch, config.model.sequence
        self._flops = self._length * flops_per_token(config.model, vocab_size) / world_size
        self._peak = peak_tflops(config, device_type) * 1e12
        self._begun = 0
        self._samples = 0
        self._last = 0.0
        self._paused = 0.0
        self._closed = (0, 0.0, 0)
        self._mark: tuple[int, float, int] | None = None

    def begin(self, samples: int = 0) -> None:
        """A step's turn of the loop; ``samples`` of its batch (0: the full batch)."""
        self._begun += 1
        self._samples += samples or self._batch
        self._last = time.monotonic() - self._paused
        if self._begun == self._warmup + 1:
            self._mark = (self._begun, self._last, self._samples)

    def end(self) -> None:
        """A step's result is there: `rates` covers the turns up to now."""
        self._closed = (self._begun, self._last, self._samples)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what happens inside: validation, a checkpoint."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def rates(self) -> dict[str, float]:
        """``step_ms``, ``tokens_per_s``, ``tflops`` per device and ``mfu`` (0 to 1) since the last call.

        Empty while there is nothing to tell; ``mfu`` is absent when the peak is not known.
        """
        if self._mark is None or self._closed[0] <= self._mark[0] or self._closed[1] <= self._mark[1]:
            return {}
        seconds = (self._closed[1] - self._mark[1]) / (self._closed[0] - self._mark[0])
        rate = (self._closed[2] - self._mark[2]) / (self._closed[1] - self._mark[1])
        self._mark = self._closed
        found = {
            "step_ms": seconds * 1e3,
            "tokens_per_s": self._length * rate,
            "tflops": self._flops * rate / 1e12,
        }
        return found | ({"mfu": self._flops * rate / self._peak} if self._peak else {})
