"""What ``benchmarks/gemm.py`` and ``collectives.py`` time, and what they write."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import collectives, gemm
from megapre.config.check import ConfigError
from megapre.config.schema import KernelsConfig
from megapre.kernels.registry import choose
from megapre.parallel.comm import Axis, Done
from megapre.planner import hardware


def test_a_profile_of_measurements_is_read_back(tmp_path: Path) -> None:
    seconds = {"adamw": 0.01}
    for name in gemm.DTYPES:
        seconds |= {("gemm", name): 0.1, ("bytes", name): 0.05}
        seconds |= {("head", name, inputs): inputs / 1000 for inputs, _ in gemm.HEADS}
        seconds |= {("attention", name, length): length / 1e4 for length in gemm.LENGTHS}
    found = gemm.figures({key: [value, value, 100.0] for key, value in seconds.items()})
    path = tmp_path / "mine.toml"
    path.write_text(gemm.profile(found, "bf16", (4.5, 1.5, 1e-4)))
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


def test_every_operation_is_timed_on_every_axis_and_its_result_held_to_the_truth() -> None:
    command = [sys.executable, collectives.__file__, "--parallel", "tensor=2", "data=2", "--rounds", "1"]
    done = subprocess.run([*command, "--sizes", "4K", "6"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:2] == "| "]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    assert [row[:3] for row in rows] == [[a, "2", op] for a in ("tensor", "data") for op in collectives.OPERATIONS]
    assert all(float(cell) >= 0 for row in rows for cell in row[3:])


def test_a_wrong_result_has_no_speed() -> None:
    result, alone = torch.ones(4), Axis("alone")
    assert collectives.timed(collectives.Case(Done, result, torch.ones(4)), alone, torch.device("cpu"), 3) is not None
    assert collectives.timed(collectives.Case(Done, result, torch.ones(4)), alone, torch.device("cpu"), 3) is None
    sizes = [1 << 12, 1 << 20]
    name = ("data", 4, "all-reduce")
    text = collectives.table({(*name, 1 << 12): 1e-4, (*name, 1 << 20): None}, sizes)
    assert text[0] == "| axis | ranks | operation | us at 4 KiB | GB/s at 4 KiB | GB/s at 1 MiB |"
    assert text[2] == "| data | 4 | all-reduce | 100 | 0.0614 | wrong |", "1.5 x 4096 bytes in 100 us"


@pytest.mark.parametrize(("settings", "part"), [(["tensor"], "takes axis=ranks"), (["tensr=2"], "tensor")])
def test_a_layout_that_is_none_is_refused(settings: list[str], part: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=part):
        collectives.layout(settings)
    assert collectives.layout(["tensor=2", "context=2", "pipeline=2", "expert=2"]).parallel.expert == 2
