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


@pytest.mark.parametrize("rows", (421, 709))  # two and three slabs of rows, the last one ragged
def test_threads_do_not_change_a_bit_of_slabs(rows):
    generator = torch.Generator().manual_seed(rows)
    apart, x = (torch.randn(rows, n, generator=generator).bfloat16() for n in (99, 2048))
    dy, kept, found = apart[:, 1:97], torch.get_num_threads(), []
    function = load(versions("weight_gradient_")[0], torch.bfloat16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            main = torch.ones(96, 2048)
            function(main, dy, x)
            found.append(main)
    finally:
        torch.set_num_threads(kept)
    assert error(found[0] - 1, dy.double().t() @ x.double()) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
