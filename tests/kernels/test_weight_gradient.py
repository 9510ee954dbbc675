import pytest
import torch

from tests.kernels.tolerances import TOLERANCE, error, load, versions

SHAPES = [(5, 3, 8), (64, 33, 70), (1, 1, 1), (130, 96, 31), (7, 40, 1), (0, 4, 3), (71, 64, 96), (300, 32, 2048)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("version", versions("weight_gradient_"), ids=lambda v: v.name)
def test_value(version, shape, dtype):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    rows, out, width = shape
    generator = torch.Generator().manual_seed(rows)
    dy, x = (torch.randn(rows, n, generator=generator).to(dtype) for n in (out, width))
    main = torch.ones(out, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for _ in range(2):  # it adds
        function(main, dy, x)
    assert error(main - 1, 2 * dy.double().t() @ x.double()) <= 2 * TOLERANCE[dtype]
    apart = torch.ones(out, 2 * width, dtype=main.dtype)[:, ::2]
    for _ in range(2):
        function(apart, dy, x)
    assert error(apart, main) <= TOLERANCE[dtype]
