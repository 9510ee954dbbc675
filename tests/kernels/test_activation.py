import math

import pytest
import torch

from megapre.kernels import activation
from tests.kernels.tolerances import TOLERANCE, compare, load, versions

SHAPES = [(3, 5, 64), (1, 2), (7, 34), (0, 6), (2, 2002), (40_000, 2)]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def geglu(x):
    gate, up = x.chunk(2, -1)
    return gelu(gate) * up


def gelu_exact(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


FORMULAS = {
    "gelu": gelu, "gelu_exact": gelu_exact, "relu": lambda x: (x + x.abs()) / 2, "swiglu": swiglu, "geglu": geglu
}  # fmt: skip
PLAIN = ("gelu", "gelu_exact", "relu")
ROWS = [version for op in FORMULAS for version in versions(op)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", ROWS, ids=lambda v: f"{v.op}-{v.name}")
def test_value_and_gradients(version, shape, dtype):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    compare(function, FORMULAS[version.op], [x], TOLERANCE[dtype])
    strided = x.repeat_interleave(2, dim=0)[::2]
    # torch's vector and scalar paths differ in the last place; ours do not.
    slack = 0.0 if version.name == "cpp" else TOLERANCE[dtype]
    torch.testing.assert_close(function(strided), function(x), rtol=2 * slack, atol=slack)


@pytest.mark.parametrize("version", ROWS, ids=lambda v: f"{v.op}-{v.name}")
def test_extremes(version):
    function = load(version, torch.float32)
    x = torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4, float("nan")]).requires_grad_()
    expected, slope = torch.tensor([0, 0, 0, 0, 90.0, 1e4]), torch.tensor([0, 0, 0.5, 0.5, 1, 1])
    if version.op == "relu":
        slope = torch.tensor([0.0, 0, 0, 0, 1, 1])
    y = function(x) if version.op in PLAIN else function(torch.stack([x, torch.ones_like(x)], -1)).squeeze(-1)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(y[:-1], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:-1], slope, rtol=1e-6, atol=1e-6)
    assert y[-1].isnan() and (grad[-1].isnan() or version.op == "relu")


def test_gradcheck_and_what_is_saved():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for function in (
        activation.gelu_reference, activation.swiglu_reference, activation.swiglu_torch, activation.geglu_reference,
        activation.gelu_exact_reference, activation.relu_reference,
    ):  # fmt: skip
        assert torch.autograd.gradcheck(function, (x,))
    for function in (activation.swiglu_torch, activation.swiglu_cpp, activation.gelu_cpp, activation.geglu_cpp):
        saved = []
        y = torch.randn(4, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):  # noqa: B023
            function(y)
        assert sum(t.numel() for t in saved) == y.numel()


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 1), (7, 17), (0, 6), (130, 33), (1, 4099)])
@pytest.mark.parametrize("version", versions("bias_gelu"), ids=lambda v: v.name)
def test_bias_gelu(version, shape, dtype, bias_dtype):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    if dtype == torch.float64 and bias_dtype:
        return
    g = torch.Generator().manual_seed(1)
    x, bias = torch.randn(shape, generator=g).to(dtype), torch.randn(shape[-1:], generator=g).to(bias_dtype or dtype)
    compare(function, lambda x, b: gelu(x + b), [x, bias], TOLERANCE[dtype])
    strided = x.repeat_interleave(2, dim=0)[::2]
    torch.testing.assert_close(function(strided, bias), function(x, bias))
