import math

import pytest
import torch

from megapre.kernels import rope
from tests.kernels.tolerances import TOLERANCE, compare, error


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = (positions.double() * theta ** (-2 * i / x.shape[-1])).unsqueeze(-1)
        out[..., i] = x[..., i] * angle.cos() - x[..., half + i] * angle.sin()
        out[..., half + i] = x[..., half + i] * angle.cos() + x[..., i] * angle.sin()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 2, 3, 8), (1, 1, 1, 2), (0, 2, 2, 4), (33, 1, 2, 6)])
def test_value_and_gradient(shape, dtype):
    positions = torch.randint(0, 100_000, shape[:2], generator=torch.Generator().manual_seed(2))
    cos, sin = rope.tables(positions, shape[-1], 10000.0, dtype)
    assert cos.shape == sin.shape == (*shape[:2], shape[-1] // 2)
    x = torch.randn(shape).to(dtype)
    compare(lambda x: rope.apply_reference(x, cos, sin), lambda x: rotate(x, positions, 10000.0), [x], TOLERANCE[dtype])


def test_tables_are_exact_at_far_positions_for_half_types():
    positions = torch.tensor([[131_071]])
    cos, _ = rope.tables(positions, 64, 10000.0, torch.bfloat16)
    exact = [math.cos(131_071 * 10000.0 ** (-2 * i / 64)) for i in range(32)]
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0], torch.tensor(exact), rtol=0, atol=1e-7)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def score(a, b):
        turned = [
            rope.apply_reference(x, *rope.tables(torch.tensor([[p]]), 16, 500_000.0, torch.float64))
            for x, p in ((q, a), (k, b))
        ]
        return (turned[0] * turned[1]).sum()

    assert error(score(900, 877), score(23, 0)) < 1e-12


def test_odd_dimension_and_gradcheck():
    with pytest.raises(ValueError, match="even head dimension, not 7"):
        rope.tables(torch.zeros(1, 1, dtype=torch.int64), 7, 1e4, torch.float32)
    cos, sin = rope.tables(torch.arange(6).view(3, 2), 4, 1e4, torch.float64)
    x = torch.randn(3, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope.apply_reference(x, cos, sin), (x,))
