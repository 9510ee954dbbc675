import pytest
import torch

from megapre.kernels import dropout as formulas
from megapre.kernels.triton import dropout
from megapre.random import philox
from tests.kernels.triton.values import DTYPES, compare, draw

SHAPES = [(5, 2, 64), (1, 1, 1), (3, 2, 7), (0, 2, 8), (2, 1, 1027), (2, 3, 2050)]
# seed, step, site, first position, first sample, probability
KEYS = [
    (7, 3, 11, 10, 2**32 - 1, 0.3),
    (2**40 + 5, 2**32 - 1, 2**31 + 3, 2**31 - 1, 5, 0.999),
    (0, 0, 0, 0, 2**50, 1e-3),
]


def numbers(shape, key, device):
    seed, step, site, position, sample, probability = key
    positions, samples = torch.arange(shape[0]) + position, torch.arange(shape[1]) + sample
    return dict(seed=seed, step=step, site=site, positions=positions.to(device), samples=samples.to(device),
                probability=probability)  # fmt: skip


def in_fp64(place):
    """The formula with the mask of the definition, drawn once."""
    numbers = [place[name] for name in ("seed", "step")], [place[name].cpu() for name in ("positions", "samples")]
    probability = place["probability"]

    def function(x, bias, residual):
        kept = philox.keep_mask(*numbers[0], [place["site"]], *numbers[1], 0, x.shape[-1], probability)[0].to(x.device)
        total = x if bias is None else x + bias
        return residual + torch.where(kept, total / (1 - probability), 0.0)

    return function


@pytest.mark.parametrize("key", KEYS, ids=["common", "upper_bits", "small"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mask_is_that_of_the_definition_bit_for_bit(shape, key, device):
    place = numbers(shape, key, device)
    ours = dropout.dropout_triton(torch.ones(shape, device=device), **place) != 0
    cpu = [place[name].cpu() for name in ("positions", "samples")]
    kept = philox.keep_mask_reference(
        place["seed"], place["step"], [place["site"]], *cpu, 0, shape[2], place["probability"]
    )
    assert torch.equal(ours.cpu(), kept[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, bias, probability, dtype, device):
    place = numbers(shape, (*KEYS[0][:5], probability), device)
    x, residual, b = draw(shape, dtype, device, 1), draw(shape, dtype, device, 2), draw(shape[-1:], dtype, device, 3)
    if bias:
        compare(
            lambda x, b, r: dropout.bias_dropout_residual_triton(x, b, r, **place), in_fp64(place), [x, b, residual]
        )
    else:
        compare(
            lambda x, r: dropout.bias_dropout_residual_triton(x, None, r, **place),
            lambda x, r: in_fp64(place)(x, None, r),
            [x, residual],
        )
        compare(lambda x: dropout.dropout_triton(x, **place), lambda x: in_fp64(place)(x, None, 0.0), [x])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_reference_bit_for_bit(dtype, device):
    shape = (9, 3, 333)
    place, x = numbers(shape, KEYS[0], device), draw(shape, dtype, device, 4)
    x[2, 1] = float("nan")
    x[3, 1] = float("inf")
    ours, reference = dropout.dropout_triton(x, **place), formulas.dropout_reference(x, **place)
    assert torch.equal(ours.nan_to_num(0.5), reference.nan_to_num(0.5)) and ours[2, 1].isnan().any()


def test_a_shard_of_the_sequence_drops_the_same_features_and_no_mask_is_saved(device):
    shape = (8, 2, 40)
    place, x = numbers(shape, KEYS[0], device), torch.ones(shape, device=device)
    whole = dropout.dropout_triton(x, **place)
    part = dropout.dropout_triton(x[4:], **{**place, "positions": place["positions"][4:]})
    assert torch.equal(part, whole[4:])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        dropout.bias_dropout_residual_triton(x.requires_grad_(), x[0, 0], x, **place)
    assert sum(t.numel() for t in saved) == 8 + 2
    with pytest.raises(ValueError, match=r"model\.dropout"):
        dropout.dropout_triton(x, **{**place, "probability": 1.0})
