from dataclasses import replace

import pytest
import torch

from megapre.kernels.triton.attention import attention_triton
from tests.kernels.attention_cases import (
    MASKS,
    check_documents,
    check_same_masks,
    check_two_steps,
    draw,
    dropout_of,
    formula,
)  # fmt: skip
from tests.kernels.tolerances import TOLERANCE, compare, error

SLACK = {torch.float32: 1, torch.bfloat16: 2.2}
# A query with one key has no gradient: that of its scores is do . v - do . o.
FLOOR = 0.1


def moved(mask, device):
    pairs = {n: tuple(x.to(device) for x in getattr(mask, n)) for n in ("documents", "order") if getattr(mask, n)}
    return replace(mask, prefix=None if mask.prefix is None else mask.prefix.to(device), **pairs)


def check(name, shape, dtype, device, **options):
    asked, inputs = MASKS[name](*shape[:3]), draw(*shape, dtype)
    mask = moved(asked.mask, device)
    kept = {key: value for key, value in options.items() if value is not None}
    wide = {key: value.double() if key == "bias" else value for key, value in kept.items()}
    compare(
        lambda q, k, v: attention_triton(q, k, v, mask=mask, **kept),
        lambda q, k, v: formula(q, k, v, asked, **wide)[0],
        [x.to(device) for x in inputs],
        TOLERANCE[dtype] * SLACK[dtype],
        FLOOR,
    )


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, device):
    check(name, (65, 65, 2, 2, 1, 32), torch.bfloat16, device)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MASKS)
def test_masks_in_fp32(name, device):
    check(name, (65, 65, 2, 2, 1, 32), torch.float32, device)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 64), (130, 130, 1, 2, 1, 64), (70, 70, 1, 1, 1, 128), (33, 33, 1, 2, 2, 40)], ids=str
)
def test_shapes(shape, device):
    check("causal", shape, torch.bfloat16, device)


@pytest.mark.parametrize("shape", [(5, 70, 2, 4, 2, 32), (70, 5, 1, 2, 1, 32), (1, 130, 1, 4, 1, 64)], ids=str)
def test_cross_attention_and_decoding(shape, device):
    check("full", shape, torch.bfloat16, device)
    if shape[0] <= shape[1]:
        check("causal", shape, torch.bfloat16, device)


@pytest.mark.parametrize("name", ["causal", pytest.param("packed", marks=pytest.mark.nightly), "query_stream"])
def test_bias_and_dropout(name, device):
    bias = torch.randn(2, 129, generator=torch.Generator().manual_seed(1)).to(device)
    check(name, (65, 65, 2, 2, 1, 32), torch.bfloat16, device, bias=bias, dropout=dropout_of(2, 2))


def test_a_document_does_not_depend_on_another(device):
    check_documents(attention_triton, torch.bfloat16, str(device), 130, 32)


def test_masks_that_mean_the_same_are_the_same(device):
    check_same_masks(attention_triton, torch.float32, str(device), TOLERANCE[torch.float32], 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_steps_of_a_ring_are_one(dtype, device):
    check_two_steps(attention_triton, dtype, str(device), TOLERANCE[dtype] * SLACK[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "s", "t"), [("packed", 66, 100), ("causal", 33, 33)])
def test_gradient_of_a_learned_bias(name, s, t, dtype, device):
    asked, inputs, dropout = MASKS[name](s, t, 2), draw(s, t, 2, 2, 1, 32, dtype), dropout_of(2, 2)
    generator = torch.Generator().manual_seed(1)
    bias, grad = (torch.randn(shape, generator=generator) for shape in ((2, s + t - 1), inputs[0].shape))
    learned, exact = bias.clone().to(device).requires_grad_(), bias.double().requires_grad_()
    place = replace(dropout, samples=dropout.samples.to(device))
    options = dict(mask=moved(asked.mask, device), bias=learned, dropout=place)
    attention_triton(*(x.to(device) for x in inputs), **options).backward(grad.to(dtype).to(device))
    out = formula(*(x.double() for x in inputs), asked, exact, dropout)[0]
    out.backward(grad.to(dtype).double())
    assert error(learned.grad.cpu(), exact.grad) <= TOLERANCE[dtype] * 4  # a sum of both signs over batch and diagonal
