import pytest
import torch

from megapre.kernels import activation as formulas
from megapre.kernels.triton import activation
from tests.kernels.triton.values import DTYPES, compare, draw

SHAPES = [(3, 5, 64), (1, 2), (7, 34), (0, 6), (2, 2002), (40, 2)]
NIGHTLY = [(3, 2 * 11008), (301, 66), (2, 9000)]
GRID = SHAPES + [pytest.param(shape, marks=pytest.mark.nightly) for shape in NIGHTLY]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("op", ["gelu", "swiglu", "geglu"])
def test_value_and_gradient(op, shape, dtype, device):
    x = draw(shape, torch.float32, device, 1).mul(3).to(dtype)
    compare(getattr(activation, f"{op}_triton"), getattr(formulas, f"{op}_reference"), [x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_bias_gelu(shape, dtype, device):
    x, bias = draw(shape, torch.float32, device, 1).mul(3).to(dtype), draw(shape[-1:], dtype, device, 2)
    compare(activation.bias_gelu_triton, formulas.bias_gelu_reference, [x, bias])


@pytest.mark.parametrize("op", ["gelu", "swiglu", "geglu"])
def test_extremes(op, device):
    x = torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4, float("nan")], device=device).requires_grad_()
    expected = torch.tensor([0, 0, 0, 0, 90.0, 1e4], device=device)
    slope = torch.tensor([0, 0, 0.5, 0.5, 1, 1], device=device)
    function = getattr(activation, f"{op}_triton")
    y = function(x) if op == "gelu" else function(torch.stack([x, torch.ones_like(x)], -1)).squeeze(-1)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(y[:-1], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:-1], slope, rtol=1e-6, atol=1e-6)
    assert y[-1].isnan() and grad[-1].isnan()
