"""torch.compile takes a whole block as one graph: no kernel, mask, bias or main gradient breaks it."""

from __future__ import annotations

import pytest
import torch

from megapre.config.schema import Config, ModelConfig
from megapre.parallel.grid import single
from megapre.training.engine import build
from megapre.verify.cells import Cell, batches, scaled_down

LLAMA = dict(norm="rmsnorm", activation="swiglu", positions="rope", bias=False)
MODELS = {
    "gpt": ModelConfig(dropout=0.1),
    "llama": ModelConfig(**LLAMA),
    "llama-dropout": ModelConfig(**LLAMA, dropout=0.1, attention_dropout=0.1),
    "palm": ModelConfig(parallel_block=True, activation="swiglu", positions="rope"),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_block_is_one_graph(name: str, backend: str) -> None:
    """Value, gradient of the input and all main gradients are those of the block as it is."""
    config, vocab_size = scaled_down(Config(model=MODELS[name]))
    config = Cell().apply(config)
    engine = build(config, single(), torch.device("cpu"), vocab_size)
    context = engine.model.context(batches(config, vocab_size, 1)[0][0], seed=1, step=3, training=True)
    block = engine.model.layers[1]
    mains = [parameter.main_grad for parameter in block.parameters()]
    x = torch.randn(config.model.sequence, 1, config.model.hidden)
    found = []
    torch._dynamo.reset()
    for function in (block, torch.compile(block, fullgraph=True, backend=backend)):
        for main in mains:
            main.zero_()
        leaf = x.clone().requires_grad_()
        (y,) = function(context, leaf)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(main.clone() for main in mains)])
    for plain, compiled in zip(*found):
        assert torch.equal(plain, compiled)
    assert all(tensor.any() for tensor in found[0])
