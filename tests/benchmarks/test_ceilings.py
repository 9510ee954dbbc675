"""What ``benchmarks/gemm.py`` times, and the profile that it writes."""

from pathlib import Path

import pytest
import torch

from benchmarks import gemm
from megapre.config.schema import KernelsConfig
from megapre.kernels.registry import choose
from megapre.planner import hardware


def test_a_profile_of_measurements_is_read_back(tmp_path: Path) -> None:
    seconds = {"adamw": 0.01}
    for name in gemm.DTYPES:
        seconds |= {("gemm", name): 0.1, ("bytes", name): 0.05}
        seconds |= {("head", name, inputs): inputs / 1000 for inputs, _ in gemm.HEADS}
        seconds |= {("attention", name, length): length / 1e4 for length in gemm.LENGTHS}
    found = gemm.figures({key: [value, value, 100.0] for key, value in seconds.items()})
    path = tmp_path / "mine.toml"
    path.write_text(gemm.profile(found, "bf16", (1.5, 1e-4)))
    device = hardware.load(str(path))
    for inputs, outputs in gemm.HEADS:  # three products of all rows
        flops = 6.0 * gemm.TOKENS * inputs * outputs
        assert device.head_rate("fp32", inputs) == pytest.approx(flops / (inputs / 1000), rel=1e-3)
    products = sum(6.0 * gemm.TOKENS * inputs * outputs for inputs, outputs in gemm.SIZES)
    assert device.best["bf16"] == pytest.approx(products / 0.1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layers_that_are_timed_do_all_three_products(dtype: torch.dtype) -> None:
    kernels = choose(KernelsConfig(), torch.device("cpu"), dtype)
    layer = gemm.linear(kernels, dtype, 32, 64)
    x, dy = torch.randn(8, 32, dtype=dtype, requires_grad=True), torch.randn(8, 64, dtype=dtype)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    weight = layer.weight.detach()
    wanted = [(y, x @ weight.T), (dx, dy @ weight), (layer.weight.main_grad, dy.float().T @ x.float())]
    for found, truth in wanted:
        assert (found.float() - truth.float()).norm() < 0.01 * truth.float().norm()
