"""Predicted against measured steps of megapre's own engine on this CPU, for two small models in many layouts.

``python benchmarks/planner/cpu.py [--rounds 3] [--only J1]`` runs every layout and, after each of its steps, the
kernels of a profile (``benchmarks/gemm.py``) on the same ranks, and prints predicted and measured CPU seconds of a
rank's step: what the rank itself does, so that other work on a shared machine does not count. Waiting in a pipeline's
bubble is left out of both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from megapre.config.check import check
from megapre.config.load import from_dict
from megapre.config.schema import Config
from megapre.data.loader import Counts
from megapre.planner import constants as fitted
from megapre.planner import hardware
from megapre.planner.job import from_config
from megapre.planner.timing import predict
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.training.engine import build
from megapre.verify.pool import RankPool
from megapre.verify.trace import _microbatches

sys.path.insert(0, str(Path(__file__).parents[1]))
import collectives
import gemm

GPT = {"layers": 6, "hidden": 384, "heads": 6, "sequence": 256, "vocab_size": 50304}
LLAMA = {
    "layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn_hidden": 1408, "sequence": 1024, "vocab_size": 32000,
    "norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "bias": False, "tied_embeddings": False,
}  # fmt: skip
JOBS = {"J1": (GPT, 16, 16), "J2": (LLAMA, 8, 4)}
"""Model, global batch, microbatch."""
LAYOUTS = (
    ("J1", "bf16", {}, {}), ("J1", "fp32", {}, {}), ("J1", "bf16", {}, {"microbatch": 4}),
    ("J1", "bf16", {"recompute": "full"}, {}), ("J1", "bf16", {"data": 2}, {"microbatch": 8}),
    ("J1", "bf16", {"tensor": 2}, {}), ("J1", "bf16", {"pipeline": 2}, {"microbatch": 4}),
    ("J1", "bf16", {"data": 2, "zero": 1}, {"microbatch": 8}),
    ("J2", "bf16", {}, {}), ("J2", "bf16", {}, {"microbatch": 2}), ("J2", "bf16", {"recompute": "full"}, {}),
    ("J2", "bf16", {"data": 2, "zero": 1}, {}), ("J2", "bf16", {"tensor": 2}, {}),
    ("J2", "bf16", {"pipeline": 2}, {"microbatch": 2}),
)  # fmt: skip


def config_of(job: str, dtype: str, parallel: dict[str, object], train: dict[str, int]) -> Config:
    """The job file of a layout."""
    model, batch, micro = JOBS[job]
    tables = {
        "model": model, "parallel": {"data": 1} | parallel, "precision": {"dtype": dtype},
        "train": {"global_batch": batch, "microbatch": micro, "threads": 1} | train,
    }  # fmt: skip
    return check(from_dict(tables))


def measure(ranks: Ranks, config: Config, rounds: int) -> tuple[float, gemm.Times]:
    """Median CPU seconds of a step on this rank, the first left out, and those of the kernels, in turn with steps."""
    torch.manual_seed(ranks.rank)
    with connected(config, ranks) as (grid, device):
        engine = build(config, grid, device, config.model.vocab_size)
        vocab = config.model.vocab_size
        micro = [replace(m, tokens=torch.randint(vocab, m.tokens.shape), targets=torch.randint(vocab, m.targets.shape))
                 for m in _microbatches(config)]  # fmt: skip
        targets = config.train.global_batch * config.model.sequence
        times, kernels = [], []
        for step in range(rounds + 1):
            start = time.process_time()
            engine.step(micro, Counts(targets), step, 1e-4)
            times.append(time.process_time() - start)
            kernels.append(gemm.time_kernels(ranks, (config.precision.dtype,), 1))
    return statistics.median(times[1:]), gemm.together(kernels[1:])


def compare(
    pool: RankPool, folder: Path, links: tuple[float, float, float],
    layout: tuple[str, str, dict[str, object], dict[str, int]], rounds: int,
) -> tuple[float, float]:  # fmt: skip
    """(measured, predicted) CPU seconds."""
    job, dtype, parallel, train = layout
    config = config_of(job, dtype, parallel, train)
    grid = config.parallel
    world = grid.tensor * grid.pipeline * grid.data
    steps, kernels = zip(*pool.run(world, measure, config, rounds, timeout=900))
    path = folder / f"{dtype}.toml"
    path.write_text(gemm.profile(gemm.figures(gemm.together(kernels)), dtype, links))
    time_ = predict(from_config(config, hardware.load(str(path)), config.model.vocab_size), fitted.load())
    return max(steps), time_.step - time_.bubble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="layouts of this job alone")
    args = parser.parse_args()
    links = collectives.measure()
    print(f"messages: {links[0]:.2f} GB/s, {1e6 * links[2]:.0f} us\n")
    print("job   format layout                                    measured, CPU-s  predicted  error")
    errors = []
    with tempfile.TemporaryDirectory() as folder, RankPool(2) as pool:
        for layout in LAYOUTS:
            job, dtype, parallel, train = layout
            if args.only not in job:
                continue
            measured, predicted = compare(pool, Path(folder), links, layout, args.rounds)
            errors.append(predicted / measured - 1)
            told = " ".join(f"{k}={v}" for k, v in {**parallel, **train}.items()) or "one rank"
            print(f"{job:5} {dtype:6} {told:42} {measured:14.2f} {predicted:10.2f} {errors[-1]:+7.1%}", flush=True)
    size = [abs(error) for error in errors]
    print(f"\n{len(size)} layouts: median {statistics.median(size):.1%}, largest {max(size):.1%}")


if __name__ == "__main__":
    main()
