"""Every CUDA kernel on the device against its fp64 reference: ``pytest -m gpu``.

Written for the first machine with a GPU and not yet executed on one. The cases are those that pass on the SIMT machine.
"""

import pytest
import torch

from megapre.kernels import cuda
from tests.kernels.simt import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(cuda.unavailable()), reason=cuda.unavailable() or "-"),
]


@pytest.mark.parametrize("name", {**cases.SHORT, **cases.LONG})
def test_case(name):
    cases.check({**cases.SHORT, **cases.LONG}[name], "cuda")


# Sizes that the SIMT machine is too slow for: more rows than blocks, real widths and vocabularies.
LARGE = {
    "rms-4096": (cases.norm, False, 4096, torch.bfloat16, 8192),
    "layer-8192": (cases.norm, True, 8192, torch.bfloat16, 2048),
    "add-rms-4096": (cases.add_norm, False, 4096, torch.bfloat16, 4096),
    "rope-llama": (cases.rope, 32, 8, 128, torch.bfloat16, False, (2048, 2)),
    "swiglu-14336": (cases.swiglu, 14336, torch.bfloat16, 4096),
    "loss-50304": (cases.cross_entropy, 50304, 50257, torch.bfloat16, 2048, 0.1, 1e-4, True),
    "loss-128256": (cases.cross_entropy, 128256, 128256, torch.bfloat16, 1024, 0.0, 1e-4, True),
    "adamw-16m": (cases.adamw, (1 << 24) + 3, torch.bfloat16, False, True),
    "square-sum-64m": (cases.square_sum, 1 << 26, torch.float32),
    "keep-mask": (cases.keep_mask, 4096, 2048, 4),
}


@pytest.mark.parametrize("name", LARGE)
def test_large(name):
    cases.check(LARGE[name], "cuda")


def test_runs_agree_bit_for_bit():
    x, w, grad = (cases.draw(*shape, device="cuda") for shape in ((4096, 2048), (2048,), (4096, 2048)))
    rstd = torch.rand(4096, device="cuda")
    first, second = (cuda.norm_backward(grad, x, w, None, rstd) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(cuda.square_sum(x.flatten()), cuda.square_sum(x.flatten()))


def test_nothing_waits_for_the_host():
    flat = [torch.randn(1 << 20, device="cuda") for _ in range(3)] + [torch.rand(1 << 20, device="cuda")]
    numbers = [torch.tensor(x, device="cuda") for x in (1e-3, 1.0, 2.0, 0.0)]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = cuda.square_sum(flat[1], numbers[3])
        cuda.adamw_(
            *flat, None, lr=numbers[0], step=numbers[1], beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            divisor=norm.sqrt(), skip=numbers[3],
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode(before)
