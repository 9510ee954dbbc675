import pytest
import torch

from megapre.kernels import dropout
from megapre.random import philox
from tests.kernels.tolerances import TOLERANCE, compare, load, versions

SHAPES = [(5, 2, 64), (1, 1, 1), (3, 2, 7), (0, 2, 8), (4, 1, 1027)]


def call(function, x, probability=0.3):
    positions, samples = torch.arange(x.shape[0]) + 10, torch.arange(x.shape[1]) + 2**32 - 1
    return function(x, seed=7, step=3, site=11, positions=positions, samples=samples, probability=probability)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", versions("dropout"), ids=lambda v: v.name)
def test_value_and_gradient(version, shape, dtype):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    positions, samples = torch.arange(shape[0]) + 10, torch.arange(shape[1]) + 2**32 - 1
    kept = philox.keep_mask_reference(7, 3, [11], positions, samples, 0, shape[2], 0.3)[0]
    x = torch.randn(shape).to(dtype)
    compare(lambda x: call(function, x), lambda x: x * kept / (1 - 0.3), [x], TOLERANCE[dtype])
    assert torch.equal(call(function, x, 0.0), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_is_the_reference_bit_for_bit(dtype):
    versions_ = {version.name: load(version, dtype) for version in versions("dropout")}
    x = torch.randn(9, 3, 333).to(dtype)
    x[2, 1] = float("nan")
    x[3, 1] = float("inf")
    ours, reference = call(versions_["cpp"], x), call(versions_["reference"], x)
    assert torch.equal(ours.nan_to_num(0.5), reference.nan_to_num(0.5)) and ours[2, 1].isnan().any()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(call(versions_["cpp"], strided[:2]), ours[:2])


def test_a_shard_of_the_sequence_drops_the_same_features():
    x = torch.ones(8, 2, 40)
    numbers = dict(seed=1, step=2, site=3, samples=torch.tensor([4, 5]), probability=0.5)
    for version in versions("dropout"):
        function = load(version, torch.float32)
        whole = function(x, positions=torch.arange(8), **numbers)
        assert torch.equal(function(x[4:], positions=torch.arange(4, 8), **numbers), whole[4:])


def test_no_mask_is_saved_and_a_bad_probability_is_refused():
    for function in (dropout.dropout_cpp, dropout.dropout_reference):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):  # noqa: B023
            call(function, torch.randn(4, 2, 64, requires_grad=True))
        assert sum(t.numel() for t in saved) == 4 + 2
        with pytest.raises(ValueError, match=r"model\.dropout"):
            call(function, torch.randn(4, 2, 8), 1.0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", versions("bias_dropout_residual"), ids=lambda v: v.name)
def test_bias_dropout_residual(version, shape, dtype, with_bias):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    positions, samples = torch.arange(shape[0]) + 10, torch.arange(shape[1]) + 2**32 - 1
    kept = philox.keep_mask_reference(7, 3, [11], positions, samples, 0, shape[2], 0.3)[0]
    numbers = dict(seed=7, step=3, site=11, positions=positions, samples=samples, probability=0.3)
    g = torch.Generator().manual_seed(6)
    x, residual, bias = (torch.randn(s, generator=g).to(dtype) for s in (shape, shape, shape[-1:]))
    # The bias's gradient sums dropped gradients that bf16 has rounded.
    if with_bias:
        compare(
            lambda x, r, b: function(x, b, r, **numbers), lambda x, r, b: r + (x + b) * kept / 0.7,
            [x, residual, bias], TOLERANCE[dtype],
        )  # fmt: skip
    else:
        compare(
            lambda x, r: function(x, None, r, **numbers), lambda x, r: r + x * kept / 0.7, [x, residual],
            TOLERANCE[dtype],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_dropout_residual_in_cpp_is_the_reference_bit_for_bit(dtype):
    positions, samples = torch.arange(9), torch.arange(3) + 5
    numbers = dict(seed=7, step=3, site=11, positions=positions, samples=samples, probability=0.25)
    g = torch.Generator().manual_seed(6)
    x, residual, bias = (torch.randn(s, generator=g).to(dtype) for s in ((9, 3, 333), (9, 3, 333), (333,)))
    results = [load(v, dtype)(x, bias, residual, **numbers) for v in versions("bias_dropout_residual")]
    assert all(torch.equal(results[0], other) for other in results)
    with pytest.raises(ValueError, match=r"model\.dropout"):
        load(versions("bias_dropout_residual")[0], dtype)(x, bias, residual, **{**numbers, "probability": 1.0})
