"""Speed of a CPU's linear layers, output layer, attention, byte-bound operations and AdamW: for a planner profile.

``python benchmarks/gemm.py [--profile FILE.toml] [--ranks 2]`` prints TFLOP/s and GB/s of one thread in CPU seconds,
medians of interleaved rounds, and with ``--profile`` writes the profile that ``megapre plan --gpu FILE.toml`` reads.
``--ranks``: so many processes do the same at once, as the ranks of a job do: they share the memory's bandwidth and the
processor's power.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megapre.config.schema import KernelsConfig
from megapre.kernels.mask import CAUSAL
from megapre.kernels.registry import Kernels, choose
from megapre.parallel.comm import Axis
from megapre.parallel.tensor import Linear
from megapre.parallel.weight_queue import WeightQueue
from megapre.resilience.ranks import Ranks
from megapre.verify.pool import RankPool

TOKENS = 4096
SIZES = ((384, 1152), (384, 1536), (1536, 384), (512, 1024), (512, 2816), (1408, 512))
"""(inputs, outputs) of the blocks of GPT-2- and Llama-like models of laptop size."""
HEADS = ((384, 50304), (512, 32000))
"""(inputs, outputs) of output layers of such models."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (256, 1024)
ROUNDS = 5


def seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def linear(kernels: Kernels, dtype: torch.dtype, inputs: int, outputs: int) -> Linear:
    """The engine's own layer, on one rank."""
    weight, queue = nn.Parameter(torch.randn(outputs, inputs, dtype=dtype)), WeightQueue()
    queue.multiply = kernels.weight_gradient_
    weight.main_grad, weight.queue = torch.zeros(outputs, inputs), queue  # type: ignore[attr-defined]
    return Linear("column", weight, None, Axis("tensor"), False)


def gemms(kernels: Kernels, dtype: torch.dtype) -> Callable[[], Any]:
    """Forward and both backward products of every size, as the engine's linear layers run them."""
    made = []
    for inputs, outputs in SIZES:
        x = torch.randn(TOKENS, inputs, dtype=dtype, requires_grad=True)
        made.append((linear(kernels, dtype, inputs, outputs), x, torch.randn(TOKENS, outputs, dtype=dtype)))

    def run() -> None:
        for layer, x, dy in made:
            torch.autograd.grad(layer(x), x, dy)

    return run


def head(kernels: Kernels, dtype: torch.dtype, inputs: int, outputs: int) -> Callable[[], Any]:
    """An output layer, its cross-entropy and the gradients of both, in one go as the engine's head makes them."""
    x, weight = torch.randn(TOKENS, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5
    targets, scale = torch.randint(outputs, (TOKENS,)), torch.full((TOKENS,), 1.0 / TOKENS)
    main = torch.zeros(outputs, inputs)
    return lambda: kernels.linear_cross_entropy(x, weight, targets, scale, outputs, main_grad=main)


def attention(kernels: Kernels, dtype: torch.dtype, length: int) -> Callable[[], Any]:
    """Causal attention, forward and backward, 8 heads of 64."""
    shape = (length, TOKENS // length, 8, 64)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype)
    return lambda: torch.autograd.grad(kernels.attention(q, k, v, mask=CAUSAL), (q, k, v), grad)


def byte_bound(kernels: Kernels, dtype: torch.dtype) -> Callable[[], Any]:
    """Norms, residual sums and SwiGLU of a block of 512 features, forward and backward."""
    x, y = (torch.randn(TOKENS, 512, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(512, dtype=dtype, requires_grad=True)
    up = torch.randn(TOKENS, 2816, dtype=dtype, requires_grad=True)

    def run() -> None:
        for _ in range(2):
            normed, total = kernels.add_rms_norm(y, x, weight, 1e-5)
            torch.autograd.backward((normed, total), (x.detach(), y.detach()))
        kernels.swiglu(up).backward(up.detach()[:, :1408])

    return run


BYTES = TOKENS * (22.0 * 512 + 6.0 * 1408 + 12.0 * 512) * 2.6
"""What ``megapre/planner/speed.py`` counts for `byte_bound`, forward and backward, for elements of 2 bytes."""


def adamw(count: int = 4_000_000) -> Callable[[], Any]:
    """One fused update."""
    tensors = [[torch.zeros(count)] for _ in range(4)]
    step = [torch.ones(())]
    return lambda: torch._fused_adamw_(
        *tensors, [], step, lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False
    )


REPEATS = 20
"""Products timed at once: what a second thread has spent is known at the system's ticks alone, some ms apart."""


def ceiling(dtype: str, threads: int = 1, rounds: int = 3) -> tuple[float, float, float]:
    """FLOP/s of wall time and of a CPU second of all products of `SIZES` together, and the latter of the fastest.

    What a step's model FLOPs are held against: products into memory that is there already, the best of ``rounds`` each.
    """
    torch.set_num_threads(threads)
    found = []
    for inputs, outputs in SIZES:
        x, w = torch.randn(TOKENS, inputs, dtype=DTYPES[dtype]), torch.randn(outputs, inputs, dtype=DTYPES[dtype])
        y = torch.mm(x, w.T)
        times = []
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(REPEATS):
                torch.mm(x, w.T, out=y)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        found.append((2.0 * y.numel() * inputs * REPEATS, min(t[0] for t in times), min(t[1] for t in times)))
    work, wall, cpu = (sum(column) for column in zip(*found))
    return work / wall, work / cpu, max(flops / seconds for flops, _, seconds in found)


Times = dict[Any, list[float]]


def time_kernels(ranks: Ranks, dtypes: Sequence[str] = tuple(DTYPES), rounds: int = ROUNDS) -> Times:
    """CPU seconds of every kernel on this rank, ``rounds`` of each, in turn."""
    torch.set_num_threads(1)
    cases: dict[Any, Callable[[], Any]] = {"adamw": adamw()}
    for name in dtypes:
        dtype = DTYPES[name]
        kernels = choose(KernelsConfig(), torch.device("cpu"), dtype)
        cases["gemm", name] = gemms(kernels, dtype)
        cases["bytes", name] = byte_bound(kernels, dtype)
        for inputs, outputs in HEADS:
            cases["head", name, inputs] = head(kernels, dtype, inputs, outputs)
        for length in LENGTHS:
            cases["attention", name, length] = attention(kernels, dtype, length)
    for run in cases.values():
        run()
    times: Times = {key: [] for key in cases}
    for _ in range(rounds):
        for key, run in cases.items():
            times[key].append(seconds(run))
    return times


def figures(times: Times) -> dict[str, Any]:
    """The rates of a profile from CPU seconds, of one rank or of several put together."""
    best = {key: statistics.median(found) for key, found in times.items()}
    names = [key[1] for key in best if key[0] == "gemm"]
    flops = sum(6.0 * TOKENS * inputs * outputs for inputs, outputs in SIZES)
    rates = {length: 3.5 * 4 * 0.5 * TOKENS * length * 512 for length in LENGTHS}
    return {
        "gemm": {name: flops / best["gemm", name] / 1e12 for name in names},
        "head": {
            name: {inputs: 6e-12 * TOKENS * inputs * outputs / best["head", name, inputs] for inputs, outputs in HEADS}
            for name in names
        },
        "attention": {
            name: {length: work / best["attention", name, length] / 1e12 for length, work in rates.items()}
            for name in names
        },
        "bytes": {name: BYTES * (2 if name == "fp32" else 1) / best["bytes", name] / 1e9 for name in names},
        "adamw": 36.0 * 4e6 / best["adamw"] / 1e9,
    }


def together(found: Sequence[Times]) -> Times:
    """The times of several ranks or passes."""
    return {key: [time for times in found for time in times[key]] for key in found[0]}


def measure(pool: RankPool, ranks: int = 1) -> dict[str, Any]:
    """Every figure of the profile that the kernels give, with ``ranks`` processes at work."""
    return figures(together(pool.run(ranks, time_kernels, timeout=600)))


def processor() -> str:
    """The CPU's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    amx = ", AMX" if any("amx_bf16" in line for line in lines) else ""
    return (named[0] if named else platform.machine()) + amx


def profile(found: dict[str, Any], dtype: str, links: tuple[float, float, float]) -> str:
    """A device profile for one number format. ``links``: GB/s of a ring within a host, between hosts, latency in s."""
    bandwidth = found["adamw"] / 0.75
    best = found["gemm"]
    rates = ", ".join(f"{name} = {rate:.4f}" for name, rate in (best | {"fp16": best.get("bf16", 0.0)}).items() if rate)
    heads = ", ".join(
        f"{name} = {{ {', '.join(f'{width} = {rate:.4f}' for width, rate in rates.items())} }}"
        for name, rates in found["head"].items()
    )
    short, long = (found["attention"][dtype][length] for length in LENGTHS)
    # share x L / (L + half) through both lengths
    half = max(0.0, LENGTHS[0] * LENGTHS[1] * (long - short) / (short * LENGTHS[1] - long * LENGTHS[0]))
    share = long * (LENGTHS[1] + half) / LENGTHS[1] / best[dtype]
    source = f"benchmarks/gemm.py on {processor()}, one thread"
    return f"""name = "{processor()}, one thread a rank"
kind = "cpu"
generation = "cpu"

[compute]
peak = {{ {rates} }}
best = {{ {rates} }}
head = {{ {heads} }}
multiprocessors = 1

[memory]
gib = 16.0
bandwidth = {bandwidth:.2f}

[attention]
flash2 = {{ share = {share:.4f}, half_length = {half:.1f}, narrow = 1.0 }}

[network]
gpus_per_node = 1024
nvlink = {links[0]:.3f}
nic = {links[1]:.3f}

[cost]
price = 0.05
watts = 20.0

[measured]
gemm_ampere = 1.0
half_k_ampere = 0.0
wave = 0.0
memory_ampere = {found["bytes"][dtype] / bandwidth:.4f}
flash_ampere = 1.0
launch_ampere = 0.0
link = 1.0
nic = 1.0
latency = {links[2]:.3g}
chunk = 0.0
tensor_overlap = 0.0
data_overlap = 0.0
shard_overlap = 0.0
hop = 1.0
jitter = 0.0
fixed = 0.0

[sources]
peak = "the best product: there is no data sheet figure for one thread"
best = "{source}: linear layers, all three products"
head = "{source}: output layer with its loss and gradients, by input features"
multiprocessors = "not used on a CPU"
gib = "assumed"
bandwidth = "{source}: AdamW"
flash2 = "{source}: causal attention of {LENGTHS[0]} and {LENGTHS[1]} tokens, {dtype}"
nvlink = "benchmarks/collectives.py on the same machine: shared memory"
nic = "benchmarks/collectives.py on the same machine: gloo"
measured = "{source}; what a CPU has no part of is 0 or 1"
price = "assumed: a cloud's core"
watts = "assumed: a server CPU's share of a core"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    with RankPool(args.ranks) as pool:
        found = measure(pool, args.ranks)
    for name in DTYPES:
        lengths = ", ".join(f"{1000 * rate:.0f} at {length}" for length, rate in found["attention"][name].items())
        widths = ", ".join(f"{1000 * rate:.0f} at {width}" for width, rate in found["head"][name].items())
        print(f"{name}: linear layers {1000 * found['gemm'][name]:.0f} GFLOP/s, output layer and loss {widths} "
              f"features, attention {lengths} tokens, byte-bound {found['bytes'][name]:.1f} GB/s")  # fmt: skip
    print(f"AdamW {found['adamw']:.1f} GB/s")
    if args.profile:
        from collectives import measure as measure_link

        args.profile.write_text(profile(found, args.dtype, measure_link()))
        print(f"wrote {args.profile}")


if __name__ == "__main__":
    main()
