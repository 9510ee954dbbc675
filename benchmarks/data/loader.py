"""Tokens per CPU-second of the loader against what J2 training consumes: python benchmarks/data/loader.py.

J2: a GPT of 6 layers and 384 features on rows of 256 tokens. Loader and training step take turns in one process of one
thread; medians of CPU seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megapre.config.check import check
from megapre.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megapre.data.indexed import IndexedWriter, token_dtype
from megapre.data.loader import Loader
from megapre.data.sidecar import TokenizerRecord
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.training.engine import build

VOCAB, ROUNDS = 16_384, 5


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(1)
        prefix = str(Path(folder) / "x")
        with IndexedWriter(prefix, token_dtype(VOCAB), TokenizerRecord("NullTokenizer", "0" * 64, VOCAB, 0)) as writer:
            for _ in range(2000):
                writer.add_document(rng.integers(1, VOCAB, int(rng.integers(200, 2000))))
        config = Config(
            model=ModelConfig(layers=6, hidden=384, heads=6, sequence=256, vocab_size=VOCAB),
            data=DataConfig(paths=[prefix], tokenizer_type="NullTokenizer", reset_attention=True, reset_positions=True),
            train=TrainConfig(run_dir=folder, global_batch=8, microbatch=4, threads=1, device="cpu", eval_samples=0),
        )
        config = check(replace(config), 1)
        tokens = config.train.global_batch * config.model.sequence
        loader = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1)
        loads, steps = [], []
        with connected(config, Ranks(0, 1, 0, 1, "127.0.0.1", 0)) as (grid, device):
            engine = build(config, grid, device, VOCAB)
            for step in range(ROUNDS):
                started = time.process_time()
                for ahead in range(20):
                    batch = loader.step_batch(step * 20 + ahead)
                middle = time.process_time()
                float(engine.step(batch.microbatches, batch.counts, step, 1e-4).loss)
                loads.append((middle - started) / 20)
                steps.append(time.process_time() - middle)
        load, train = statistics.median(loads), statistics.median(steps)
        print(f"loader {tokens / load / 1e6:.2f} M tokens/CPU-s, training {tokens / train / 1e6:.4f} M tokens/CPU-s")
        print(f"loader / training: {train / load:.0f} (at least 100 is wanted)")


if __name__ == "__main__":
    main()
