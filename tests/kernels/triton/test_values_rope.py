import pytest
import torch

from megapre.kernels import rope as formulas
from megapre.kernels.triton import rope
from tests.kernels.tolerances import TOLERANCE, error
from tests.kernels.triton.values import DTYPES, compare, draw

# seq, batch, query heads, key heads, dim
SHAPES = [(5, 2, 3, 1, 8), (1, 1, 1, 1, 2), (0, 2, 2, 2, 4), (3, 1, 5, 2, 6), (2, 2, 4, 2, 64), (2, 1, 3, 3, 80)]
NIGHTLY = [(4, 2, 32, 8, 128), (3, 2, 33, 11, 64), (33, 3, 40, 40, 256)]
GRID = SHAPES + [pytest.param(shape, marks=pytest.mark.nightly) for shape in NIGHTLY]


def angles(shape, device, first=131_072 - 40):
    seq, batch, _, _, dim = shape
    positions = torch.arange(first, first + seq).unsqueeze(1).expand(seq, batch)
    exact = formulas.tables(positions, dim, 10_000.0, torch.float64)
    return [t.to(device) for t in formulas.tables(positions, dim, 10_000.0, torch.bfloat16)], [
        t.to(device) for t in exact
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["split", "interleaved"])
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_queries_and_keys(shape, interleaved, dtype, device):
    tables, exact = angles(shape, device)
    seq, batch, heads, kv_heads, dim = shape
    q, k = draw((seq, batch, heads, dim), dtype, device, 1), draw((seq, batch, kv_heads, dim), dtype, device, 2)
    compare(
        lambda q, k: rope.rope_qk_triton(q, k, *tables, interleaved),
        lambda q, k: formulas.rope_qk_reference(q, k, *exact, interleaved),
        [q, k],
    )
    compare(
        lambda q: rope.apply_triton(q, *tables, interleaved),
        lambda q: formulas.apply_reference(q, *exact, interleaved),
        [q],
    )


@pytest.mark.parametrize("interleaved", [False, True], ids=["split", "interleaved"])
def test_in_place_in_a_fused_projection(interleaved, device):
    shape = (3, 2, 4, 2, 16)
    tables, _ = angles(shape, device, first=0)
    fused = draw((3, 2, 8, 16), torch.float32, device, 3)
    q, k, v = fused.split([4, 2, 2], dim=2)
    wanted = formulas.rope_qk_reference(q, k, *tables, interleaved)
    values = v.clone()
    found = rope.rope_qk_triton(q, k, *tables, interleaved, in_place=True)
    for ours, exact, buffer in zip(found, wanted, (q, k)):
        assert ours.data_ptr() == buffer.data_ptr() and error(ours, exact) <= TOLERANCE[torch.float32]
        assert error(buffer, exact) <= TOLERANCE[torch.float32]
    assert torch.equal(v, values)


def test_in_place_gradient(device):
    shape = (3, 2, 2, 1, 8)
    tables, _ = angles(shape, device)
    x = draw((3, 2, 3, 8), torch.float32, device, 3)
    weight = draw((8, 8), torch.float32, device, 4)
    grads = []
    for in_place in (False, True):
        w = weight.clone().requires_grad_()
        q, k = (x @ w).split([2, 1], dim=2)
        q, k = rope.rope_qk_triton(q, k, *tables, in_place=in_place)
        (q.square().sum() + 3 * k.sin().sum()).backward()
        grads.append(w.grad)
    assert torch.equal(*grads)


def test_a_shard_of_the_sequence_gets_the_rows_of_the_whole(device):
    shape = (8, 1, 2, 2, 16)
    tables, _ = angles(shape, device)
    x = draw((8, 1, 2, 16), torch.bfloat16, device, 5)
    whole = rope.apply_triton(x, *tables)
    assert torch.equal(rope.apply_triton(x[5:], *(t[5:] for t in tables)), whole[5:])
