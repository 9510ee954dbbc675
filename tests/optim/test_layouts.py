"""Every optimizer under every kind of layout, against its paper's equations on whole tensors in fp64."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from megapre.verify.cells import parse, scaled_down
from megapre.verify.run import Prover

SEED = random.SystemRandom().randrange(10**6)
LAYOUTS = ["1x1x1", "2x1x2+sp+zero1", "4x1x1+sp", "1x2x2+zero2", "2x1x2+zero3", "2x2x1+interleaved:2"]


def job(kind: str, experts: int = 0, **optimizer: object) -> tuple[Config, int]:
    """A model in which no gradient is zero but for rounding, of which Lion takes the sign and Adafactor the direction:
    that of the bias of keys is, and that of a router's row whose expert nobody chose, without a load-balance loss."""
    model = ModelConfig(
        heads=4, kv_heads=2, bias=False, norm="rmsnorm", positions="rope", activation="swiglu",
        experts=experts, experts_per_token=2, router_aux_loss=0.01 if experts else 0.0, layers=4,
    )  # fmt: skip
    lr = 0.1 if kind == "adafactor" else 3e-3
    wanted = OptimizerConfig(kind=kind, lr=lr, **optimizer)  # type: ignore[arg-type]
    return scaled_down(Config(model=model, optimizer=wanted, data=DataConfig(seed=SEED)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("truth")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["lion", "muon", "adafactor"])
def test_every_layout_updates_as_the_paper_says(kind: str, layout: str, folder: Path) -> None:
    config, vocab_size = job(kind)
    _, (name, error, limit) = Prover(config, vocab_size, None, folder).layout(parse(layout))
    assert error <= limit, f"seed {SEED}: {name} is off by {error:.1e}, more than {limit:.1e}"


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_experts_are_updated_as_the_paper_says(kind: str, folder: Path) -> None:
    config, vocab_size = job(kind, experts=4)
    prover = Prover(config, vocab_size, None, folder)
    _, (name, error, limit) = prover.layout(parse("2x1x2+sp+ep:2+etp:2+zero1"))
    assert error <= limit, f"seed {SEED}: {name} is off by {error:.1e}, more than {limit:.1e}"
