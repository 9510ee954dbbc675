"""How far a kernel may be from the fp64 formula: one table for every op, by type of the activations; and the check."""

from collections.abc import Callable

import torch
from torch import Tensor

from megapre.kernels.registry import BY_NAME_ONLY, TABLE, Version, _load, usable

# Error is ||y - y0|| / ||y0|| over a tensor, so cancellation in single elements needs no slack of its own.
# fp64: references only; a few hundred roundings of 1.1e-16.
# fp32: sums of up to 1000 terms and an exp of 2 units in the last place (6e-8).
# bf16: one rounding of the output to 8 bits: 2^-9 at worst, 1.7e-3 in the mean square. torch's own fused attention
# also rounds the weights before the product with v, hence twice that.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3.5e-3}


def error(ours: Tensor, exact: Tensor, floor: float = 1e-30) -> float:
    """Relative error in the 2-norm, with an absolute floor for tensors that are zero; NaN when ours has one."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm().clamp_min(floor)) if exact.numel() else 0.0


def versions(op: str) -> list[Version]:
    """Rows of the table for one op that have a chance on this machine's CPU."""
    return [version for version in TABLE if version.op == op and version.name not in BY_NAME_ONLY]


def load(version: Version, dtype: torch.dtype) -> Callable | None:
    """The version's callable, or None where it says that it cannot run."""
    return None if usable(version, torch.device("cpu"), dtype) else _load(version)


def compare(
    function: Callable, formula: Callable, inputs: list[Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """Value and the gradient of every input of ``function`` against ``formula`` in fp64.

    ``floor``: norm of a gradient, as a share of that of the result's gradient, below which it counts as that: where
    the exact gradient is a difference of equal numbers.
    """
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, y0 = function(*ours), formula(*exact)
    assert y.shape == y0.shape and y.dtype == inputs[0].dtype
    generator = torch.Generator().manual_seed(y.numel())
    grad = torch.randn(y0.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    y.backward(grad)
    y0.backward(grad.double())
    assert error(y, y0) <= tolerance, "value"
    least = max(1e-30, floor * float(grad.double().norm()))
    for i, (a, b) in enumerate(zip(ours, exact)):
        assert a.grad.dtype == a.dtype and error(a.grad, b.grad, least) <= tolerance, f"gradient of input {i}"
