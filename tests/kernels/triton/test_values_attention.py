from dataclasses import replace

import pytest
import torch

from megapre.kernels.mask import CAUSAL, Mask
from megapre.kernels.triton.attention import attention_triton
from tests.kernels.attention_cases import MASKS, causal, draw, dropout_of, formula
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
    s, cut = 130, 67
    q, k, v = (x.to(device) for x in draw(s, s, 1, 2, 1, 32, torch.bfloat16))
    numbers = (torch.arange(s, device=device) >= cut).long().unsqueeze(1)
    results = []
    for change in (False, True):
        x = [y.clone() for y in (q, k, v)]
        for y in x:
            if change:
                y[:cut] = y[:cut] * 3 + 1
        x = [y.requires_grad_() for y in x]
        out = attention_triton(*x, mask=Mask(causal=True, documents=(numbers, numbers)))
        results.append([out[cut:].detach(), *(g[cut:] for g in torch.autograd.grad(out, x, torch.ones_like(out)))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_halves_of_the_keys_are_the_whole(device):
    q, k, v = (x.to(device) for x in draw(66, 66, 1, 2, 1, 32, torch.float32))
    out, lse = formula(q.double(), k.double(), v.double(), causal(66, 66, 1))
    parts = [
        attention_triton.forward(q, k[cut], v[cut], mask=CAUSAL.part(slice(0, 66), cut))
        for cut in (slice(0, 40), slice(40, 66))
    ]
    together = torch.logaddexp(parts[0][1], parts[1][1])
    assert error(together, lse) < 1e-6
    whole = sum(torch.exp(l - together).permute(2, 0, 1).unsqueeze(-1) * o for o, l in parts)
    assert error(whole, out) < 2e-6
