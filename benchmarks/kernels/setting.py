"""What a case of the benchmarks is, and the setting that it runs in: device, versions, other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megapre.config.schema import KernelsConfig
from megapre.kernels import registry

CPU, BF16 = torch.device("cpu"), torch.bfloat16
EXACT = registry.choose(KernelsConfig(), CPU, torch.float64)
EPS = 1e-5


@dataclass(frozen=True)
class Setting:
    """Where cases run, and whose kernels they compare beside torch's eager and compiled ops."""

    device: torch.device
    kernels: dict[str, registry.Kernels]
    """Arm -> versions."""
    others: dict[str, dict[str, Callable]] = field(default_factory=dict)
    """Case -> arm -> a function of the case's inputs: other libraries' kernels (autograd functions)."""

    def draw(self, *shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
        """Normal values, the same on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(self.device)

    def integers(self, most: int, *shape: int) -> Tensor:
        """Numbers below ``most``."""
        return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(2)).to(self.device)


def on_cpu() -> Setting:
    """What ``auto`` picks on this machine, as the arm ``megapre``."""
    return Setting(CPU, {"megapre": registry.choose(KernelsConfig(), CPU, BF16)})


@dataclass
class Case:
    """One op at one shape."""

    shape: str
    arms: dict[str, Callable[[], list[Tensor]]]
    """Arm -> forward + backward; returns values and gradients. The compiled arm compiles on its first call."""
    exact: Callable[[], list[Tensor]]
    """The same results in fp64."""
    tolerance: float = 8e-3
    """Largest error ||y - y0|| / ||y0|| of a tensor: two roundings to bf16 and what eager's own roundings cost."""
    restore: Callable[[], None] = lambda: None
    """Puts back what an arm overwrites."""

    def errors(self) -> dict[str, float]:
        """Largest relative error of each arm over its results."""
        exact = self.exact()
        found = {}
        for arm, function in self.arms.items():
            self.restore()
            results = [x.detach().double() for x in function()]
            assert len(results) == len(exact)
            pairs = [(a, b.detach().double()) for a, b in zip(results, exact)]
            found[arm] = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
        self.restore()
        return found


def differentiable(
    on: Setting, name: str, shape: str, inputs: list[Tensor], ours: Callable, eager: Callable,
    exact: Callable | None = None,
) -> Case:  # fmt: skip
    """A case of autograd functions of ``inputs``: value and all gradients; results and gradients are fresh memory.

    ``ours`` takes the versions before the inputs.
    """

    def run(function: Callable, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        y = function(*tensors)
        y = y if isinstance(y, tuple) else (y,)
        return [*y, *torch.autograd.grad(y, tensors, grads)]

    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        y = eager(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator).to(t.dtype).to(t.device)
        for t in (y if isinstance(y, tuple) else (y,))
    ]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    arms: dict[str, Callable] = {arm: partial(ours, kernels) for arm, kernels in on.kernels.items()}
    arms |= on.others.get(name, {}) | {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    return Case(
        shape,
        {arm: lambda f=f: run(f, leaves, grads) for arm, f in arms.items()},  # type: ignore[misc]
        lambda: run(exact or eager, wide, [g.double() for g in grads]),
    )


def copy(to: Tensor, source: Tensor) -> None:
    """Overwrite ``to``."""
    with torch.no_grad():
        to.copy_(source)


def zero(x: Tensor) -> None:
    """Set to 0."""
    x.zero_()
