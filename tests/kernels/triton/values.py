"""Inputs and the comparison with the fp64 formula, for the value tests of this folder."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.tolerances import TOLERANCE, error

DTYPES = (torch.float32, torch.bfloat16)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def compare(
    function: Callable, formula: Callable, inputs: list[Tensor], *, gradients: bool = True, rounded_sum: bool = False
) -> None:
    """Every output, and the gradient of every input, of ``function`` against ``formula`` in fp64.

    ``rounded_sum``: the second output is a sum rounded to the type of the input on its way; its first use is then
    compared with the formula of that rounded sum, so that the table of tolerances holds without slack.
    """
    dtype = inputs[0].dtype
    tolerance = TOLERANCE[dtype]
    ours = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    if rounded_sum and inputs[0].dtype != torch.float64:
        total = (inputs[0].float() + inputs[1].float()).to(dtype).double()
        exact = [total.requires_grad_(), torch.zeros_like(total).requires_grad_(), *exact[2:]]
    outputs, outputs0 = _tuple(function(*ours)), _tuple(formula(*exact))
    above = []
    for i, (y, y0) in enumerate(zip(outputs, outputs0)):
        assert y.shape == y0.shape and y.dtype == dtype
        assert error(y, y0) <= tolerance, f"output {i}: {error(y, y0)}"
        generator = torch.Generator().manual_seed(y.numel() + i)
        above.append(torch.randn(y0.shape, generator=generator, dtype=torch.float64).to(dtype).to(y.device))
    if not gradients:
        return
    torch.autograd.backward(outputs, above)
    torch.autograd.backward(outputs0, [g.double() for g in above])
    for i, (a, b) in enumerate(zip(ours, exact)):
        assert a.grad is not None and a.grad.dtype == a.dtype
        assert error(a.grad, b.grad) <= tolerance, f"gradient of input {i}: {error(a.grad, b.grad)}"


def _tuple(x) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
