"""Generation through a KV cache computes what a whole forward pass computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megapre.checkpoint import store
from megapre.cli import main
from megapre.config.schema import Config, ModelConfig
from megapre.data.loader import Microbatch
from megapre.evaluation.generate import _forward, continuation, sample
from megapre.models.context import KVCache
from megapre.parallel.grid import single
from megapre.training.engine import Engine, build
from megapre.verify import oracle
from megapre.verify.cells import parse, scaled_down
from megapre.verify.pool import RankPool
from tests.training.jobs import corpus, job, logical, run

LLAMA = ModelConfig(norm="rmsnorm", activation="swiglu", positions="rope", heads=4, kv_heads=2, bias=False)


def made(model: ModelConfig) -> tuple[Config, Engine]:
    config, vocab_size = scaled_down(Config(model=model))
    config = replace(config, parallel=replace(config.parallel, data=1))
    return config, build(config, single(), torch.device("cpu"), vocab_size)


MOE = replace(LLAMA, experts=8, experts_per_token=2, capacity_factor=1.0, shared_experts=1, router_bias=True)


MODELS = {
    "gpt2": ModelConfig(), "llama": LLAMA, "moe": MOE, "qwen3-window": replace(LLAMA, qk_norm=True, window=5),
    "alibi": ModelConfig(positions="alibi"), "t5": ModelConfig(positions="t5"),
    "transformer-xl": ModelConfig(positions="transformer_xl", kv_heads=2),
    "post": ModelConfig(positions="sinusoidal", norm_placement="post", share_layers=True),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_cache_changes_nothing(model: ModelConfig) -> None:
    _, engine = made(model)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    with torch.no_grad():
        cache = KVCache()
        for position, token in enumerate(ids):
            stepwise = _forward(engine, [token], cache, False)
            cache.length += 1
            whole = _forward(engine, ids[: position + 1], KVCache(), False)
            torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-4)


def test_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    assert sample(logits, 0, 0, 1.0, generator) == 1
    assert {sample(logits, 1.0, 2, 1.0, generator) for _ in range(200)} == {1, 2}
    assert {sample(logits, 1.0, 0, 0.5, generator) for _ in range(200)} == {1}  # p(1) is 0.64
    drawn = torch.bincount(torch.tensor([sample(logits, 1.0, 0, 1.0, generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(drawn / 4000, logits.softmax(0), rtol=0, atol=0.03)


def test_the_same_seed_gives_the_same_text_and_long_prompts_are_refused() -> None:
    config, engine = made(ModelConfig())
    options = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 4}
    first = list(continuation(config, engine, [1, 2], 8, **options))
    assert first == list(continuation(config, engine, [1, 2], 8, **options))
    assert first != list(continuation(config, engine, [1, 2], 8, **{**options, "seed": 5}))
    with pytest.raises(ValueError, match=r"do not fit model\.sequence = 16"):
        list(continuation(config, engine, [1] * 10, 7, **options))


def test_generates_from_a_checkpoint_of_another_layout(
    pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy text is what the oracle would say with the checkpoint's weights."""
    cell = parse("2x2x1+sp")
    config = job(corpus(tmp_path / "text"), tmp_path / "run", cell, steps=10, interval=0)
    assert pool.run(cell.world, run, config) == [0] * cell.world
    path = tmp_path / "run" / "checkpoints" / store.step_name(10)
    shapes = store.names(path)
    weights = {
        name.removeprefix("weight/"): value.double().view(shapes[name][0])
        for name, value in logical(path).items()
        if name.startswith("weight/")
    }
    ids = [7, 8, 9]
    for _ in range(4):
        column = torch.tensor(ids).unsqueeze(1)
        places = torch.arange(len(ids)).unsqueeze(1)
        m = Microbatch(column, column, torch.ones(column.shape), places, None, torch.zeros(1, dtype=torch.int64))
        ids.append(int(oracle.logits(config, weights, m)[-1, 0].argmax()))
    capsys.readouterr()
    assert main(["generate", str(path), "--prompt", "7 8 9", "--tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == " ".join(map(str, ids))
