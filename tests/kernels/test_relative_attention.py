"""Attention with relative positions against its words in fp64, query by query and key by key."""

import math

import pytest
import torch

from megapre.kernels import relative_attention
from megapre.kernels.mask import FULL
from tests.kernels.attention_cases import MASKS, draw, dropout_of, formula, full
from tests.kernels.tolerances import TOLERANCE, compare

VERSIONS = (relative_attention.relative_attention_torch, relative_attention.relative_attention_reference)
FLOOR = 0.1
"""A query with one key has no gradient."""
# s, t, b, query heads, key heads, d
SHAPES = [(1, 1, 1, 1, 1, 32), (33, 33, 2, 4, 2, 20)]


@pytest.fixture(autouse=True, params=[7, 128], ids=lambda rows: f"rows:{rows}")
def rows(request, monkeypatch):
    """Blocks that cut the queries, the last one short, and one block."""
    monkeypatch.setattr(relative_attention, "ROWS", request.param)


def inputs_of(shape, dtype, seed=5):
    """q, k, v, the query that meets distances, their keys, what another segment adds; and the segments."""
    (s, t, b, heads, _, d), generator = shape, torch.Generator().manual_seed(seed)
    extra = [torch.randn(n, generator=generator).to(dtype) for n in ((s, b, heads, d), (s + t - 1, heads, d))]
    other = torch.randn(s, b, heads, generator=generator).to(dtype)
    segments = tuple(torch.randint(2, (n, b), generator=generator) for n in (s, t))
    return [*draw(*shape, dtype), *extra, other], segments


def exact(asked, segments, dropout=None):
    """The formula, in whose scores every pair looks its own distance up."""

    def out(q, k, v, asking, keys, other=None):
        (s, b, heads, d), t = q.shape, k.shape[0]
        rows = []
        for n in range(b):
            for i in range(s):
                near = torch.stack([(asking[i, n] * keys[j - i + s - 1]).sum(-1) for j in range(t)], -1)
                if other is not None:
                    near = near + other[i, n][:, None] * (segments[0][i, n] != segments[1][:, n])
                rows.append(near / math.sqrt(d))
        more = torch.stack(rows).view(b, s, heads, t).transpose(1, 2)
        return formula(q, k, v, asked, None, dropout, more)[0]

    return out


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("version", VERSIONS, ids=("torch", "reference"))
def test_value_and_every_gradient(version, name):
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            inputs, segments = inputs_of(shape, dtype)
            asked = MASKS[name](*shape[:3])
            compare(
                lambda *x: version(*x, segments, mask=asked.mask),  # noqa: B023
                exact(asked, segments), inputs, TOLERANCE[dtype] * 2.2, FLOOR,
            )  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS, ids=("torch", "reference"))
@pytest.mark.parametrize("name", ["window", "query_stream", "nothing"])
def test_dropout(version, name):
    shape = (17, 17, 2, 4, 2, 12)
    (inputs, segments), asked, dropout = inputs_of(shape, torch.float32), MASKS[name](17, 17, 2), dropout_of(4, 2)
    compare(
        lambda *x: version(*x, segments, mask=asked.mask, dropout=dropout), exact(asked, segments, dropout), inputs,
        TOLERANCE[torch.float32], FLOOR,
    )  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS, ids=("torch", "reference"))
@pytest.mark.parametrize("shape", [(5, 23, 2, 4, 2, 8), (23, 5, 1, 2, 1, 8), (1, 9, 2, 4, 1, 8)], ids=str)
def test_other_lengths_and_no_segments(version, shape):
    inputs, _ = inputs_of(shape, torch.float32)
    compare(
        lambda *x: version(*x, mask=FULL), exact(full(*shape[:3]), None), inputs[:5], TOLERANCE[torch.float32], FLOOR
    )


def test_gradcheck():
    inputs, segments = inputs_of((3, 4, 1, 2, 1, 2), torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    for version in VERSIONS:
        assert torch.autograd.gradcheck(lambda *x: version(*x, segments, mask=FULL), inputs)  # noqa: B023


def test_memory_grows_with_the_length():
    """Nothing that is kept for backward has the size of the scores; the reference keeps those."""
    kept = {}
    for version, name in zip(VERSIONS, ("torch", "reference")):
        for s in (64, 128):
            inputs, segments = inputs_of((s, s, 1, 2, 2, 8), torch.float32)
            held = {}

            def pack(x):
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # noqa: B023
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = version(*(x.requires_grad_() for x in inputs), segments, mask=FULL)
            kept[name, s] = sum(held.values()) + out.nbytes
    assert kept["torch", 128] < 2.5 * kept["torch", 64] and kept["reference", 128] > 3 * kept["reference", 64]
