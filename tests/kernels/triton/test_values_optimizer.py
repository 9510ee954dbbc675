import pytest
import torch

from megapre.kernels import optimizer as formulas
from megapre.kernels.triton import optimizer
from tests.kernels.tolerances import TOLERANCE, error
from tests.kernels.triton.values import DTYPES, draw

SIZES = [0, 1, 17, 1023, 1024, 5000]
NUMBERS = dict(lr=3e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def shards(n, device):
    master, gradient, exp_avg = (draw((n,), torch.float32, device, seed) for seed in (1, 2, 3))
    return master, gradient * 100, exp_avg, draw((n,), torch.float32, device, 4).square()


@pytest.mark.parametrize("kind", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1, 2, 1000, 1_000_000])
@pytest.mark.parametrize("n", SIZES)
def test_adamw(n, step, kind, device):
    master, gradient, exp_avg, exp_avg_sq = shards(n, device)
    wide = [t.double() for t in (master, gradient, exp_avg, exp_avg_sq)]
    model = None if kind is None else torch.full((n,), 7.0, dtype=kind, device=device)
    before = gradient.clone()
    divisor = torch.tensor(64.0, device=device)
    optimizer.adamw_triton_(master, gradient, exp_avg, exp_avg_sq, model, step=step, divisor=divisor, **NUMBERS)
    formulas.adamw_reference_(*wide, None, step=step, divisor=64.0, **NUMBERS)
    assert torch.equal(gradient, before)
    for ours, exact in zip((master, exp_avg, exp_avg_sq), (wide[0], wide[2], wide[3])):
        assert error(ours, exact) <= TOLERANCE[torch.float32]
    assert model is None or torch.equal(model, master.to(kind))


def test_scalars_on_the_device_and_a_skipped_step(device):
    on_device = {name: torch.tensor(value, device=device) for name, value in dict(lr=3e-3, step=5, divisor=2.0).items()}
    plain, scalars = shards(100, device), shards(100, device)
    numbers = {name: value for name, value in NUMBERS.items() if name != "lr"}
    for skip in (0.0, 1.0):
        before = [t.clone() for t in scalars]
        model = torch.full((100,), 7.0, dtype=torch.bfloat16, device=device)
        optimizer.adamw_triton_(*scalars, model, skip=torch.tensor(skip, device=device), **on_device, **numbers)
        if skip:
            assert all(torch.equal(a, b) for a, b in zip(before, scalars)) and (model == 7).all()
        else:
            optimizer.adamw_triton_(*plain, None, step=5, divisor=2.0, skip=0.0, **NUMBERS)
            assert all(error(a, b) < 1e-6 for a, b in zip(scalars, plain)) and (model != 7).any()
    scalars[1].fill_(float("nan"))
    optimizer.adamw_triton_(*scalars, None, skip=torch.tensor(True, device=device), **on_device, **numbers)
    assert all(t.isfinite().all() for t in (scalars[0], *scalars[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, 70_001])
def test_square_sum(n, dtype, device):
    flat = draw((n,), dtype, device, 1)
    total = optimizer.square_sum_triton(flat)
    assert total.shape == () and total.dtype == torch.float32
    assert error(total, formulas.square_sum_reference(flat.double())) <= TOLERANCE[torch.float32]
    assert torch.equal(total, optimizer.square_sum_triton(flat))
    for bad in (float("inf"), float("nan")):
        if n:
            flat[n - 1] = bad
            assert not optimizer.square_sum_triton(flat).isfinite()


def test_refusals(device):
    states = shards(8, device)
    with pytest.raises(ValueError, match="needs contiguous fp32 shards, not \\['bfloat16'"):
        optimizer.adamw_triton_(states[0].bfloat16(), *states[1:], None, step=1, **NUMBERS)
    with pytest.raises(ValueError, match="of one length"):
        optimizer.adamw_triton_(states[0][:4], *states[1:], None, step=1, **NUMBERS)
