import math

import pytest
import torch

from megapre.kernels import rope
from tests.kernels.tolerances import TOLERANCE, compare, error, load, versions

SHAPES = [(5, 2, 3, 8), (1, 1, 1, 2), (0, 2, 2, 4), (33, 1, 2, 6), (3, 2, 2, 70), (2, 1, 1, 64)]


def rotate(x, positions, theta, interleaved=False):
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        angle = (positions.double() * theta ** (-2 * i / x.shape[-1])).unsqueeze(-1)
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", versions("rope"), ids=lambda v: v.name)
def test_value_and_gradient(version, shape, dtype, interleaved):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    # Positions of a context-parallel rank start anywhere.
    positions = torch.randint(0, 131_073, shape[:2], generator=torch.Generator().manual_seed(2))
    cos, sin = rope.tables(positions, shape[-1], 10000.0, dtype)
    assert cos.shape == sin.shape == (*shape[:2], shape[-1] // 2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    def exact(x):
        return rotate(x, positions, 10000.0, interleaved)

    # An angle of 131,072 radians is itself known to 1.5e-11 in fp64.
    compare(lambda x: function(x, cos, sin, interleaved), exact, [x], max(TOLERANCE[dtype], 3e-11))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", versions("rope_qk"), ids=lambda v: v.name)
def test_q_and_k_as_slices_of_one_buffer(version, dtype, interleaved, in_place):
    function = load(version, dtype)
    g = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(7, 3, 9, 10, generator=g).to(dtype) for _ in range(2))
    positions = torch.randint(0, 1000, (7, 3), generator=g)
    cos, sin = rope.tables(positions, 10, 10000.0, dtype)
    results = []
    for make in (lambda t: t * 1.0, lambda t: t.double()):
        leaf = x.clone().requires_grad_()
        whole = make(leaf)
        q, k, v = whole[:, :, :5], whole[:, :, 5:7], whole[:, :, 7:]
        if whole.dtype == dtype:
            turned = function(q, k, cos, sin, interleaved, in_place)
            assert (turned[0].data_ptr() == q.data_ptr()) == (in_place and version.name == "cpp")
        else:
            turned = [rotate(t, positions, 10000.0, interleaved) for t in (q, k)]
        y = torch.cat([*turned, v], 2)
        y.backward(grad.clone().to(y.dtype))
        results.append((y, leaf.grad))
    assert all(error(a, b) <= TOLERANCE[dtype] for a, b in zip(*results))


def test_in_place_over_something_saved_is_refused_by_torch():
    (version,) = [v for v in versions("rope_qk") if v.name == "cpp"]
    function = load(version, torch.float32)
    cos, sin = rope.tables(torch.arange(6).view(3, 2), 4, 1e4, torch.float32)
    x = torch.randn(3, 2, 3, 4, requires_grad=True)
    q, k = torch.exp(x).split([2, 1], dim=2)  # exp keeps its result for the backward pass
    turned = function(q, k, cos, sin, False, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(t.sum() for t in turned).backward()
    with torch.inference_mode():
        function(torch.randn(3, 2, 2, 4), torch.randn(3, 2, 1, 4), cos, sin, False, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_against_fp64(dtype):
    positions = torch.tensor([[0], [1], [4095], [65_537], [131_071], [131_072]])
    cos, sin = rope.tables(positions, 128, 500_000.0, dtype)
    x = torch.randn(6, 1, 2, 128, generator=torch.Generator().manual_seed(5)).to(dtype)
    exact = rotate(x.double(), positions, 500_000.0)
    for version in versions("rope"):
        y = load(version, dtype)(x, cos, sin)
        assert all(error(y[i], exact[i]) <= TOLERANCE[dtype] for i in range(6))
        # Turned in fp32 and rounded once: products of bf16 would change a quarter of the elements.
        assert dtype != torch.bfloat16 or (y == exact.to(dtype)).double().mean() > 0.99


def test_bad_shapes_in_one_sentence():
    (version,) = [v for v in versions("rope") if v.name == "cpp"]
    function = load(version, torch.float32)
    cos, sin = rope.tables(torch.zeros(3, 2, dtype=torch.int64), 4, 1e4, torch.float32)
    with pytest.raises(ValueError, match=r"rope: tables \[3, 2, 2\] do not fit x \[3, 2, 1, 6\]"):
        function(torch.randn(3, 2, 1, 6), cos, sin)


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
