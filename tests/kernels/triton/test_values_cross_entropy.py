import pytest
import torch

from megapre.kernels import cross_entropy as formulas
from megapre.kernels import linear_cross_entropy as whole
from megapre.kernels.triton import cross_entropy, linear_cross_entropy
from tests.kernels.tolerances import TOLERANCE, error
from tests.kernels.triton.values import DTYPES, draw

INF = float("inf")
# rows, columns, valid
SHAPES = [(5, 64, 64), (1, 1, 1), (3, 17, 13), (0, 33, 33), (4, 1003, 1000), (2, 40, 0), (2, 9000, 8999)]
NIGHTLY = [(2, 33000, 32999), (3, 50304, 50257), (130, 65, 64)]
GRID = SHAPES + [pytest.param(shape, marks=pytest.mark.nightly) for shape in NIGHTLY]
OPTIONS = [dict(), dict(smoothing=0.1, z_loss=1e-2)]


def inputs(shape, dtype, device):
    rows, columns, valid = shape
    logits = draw((rows, columns), torch.float32, device, rows).mul(4).to(dtype)
    logits[:, valid:] = float("nan")  # a pad column must not be read
    targets = torch.randint(
        -(valid // 4) - 1, valid + valid // 4 + 1, (rows,), generator=torch.Generator().manual_seed(9)
    )
    return logits, targets.to(device)


def exact_gradient(logits, targets, lse, scale, valid, **options):
    return formulas.gradient_reference_(logits.double(), targets, lse.double(), scale.double(), valid, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothed"])
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_statistics_and_gradient(shape, options, dtype, device):
    (rows, _, valid), (logits, targets) = shape, inputs(shape, dtype, device)
    found = cross_entropy.statistics_triton(logits, targets, valid)
    exact = formulas.statistics_reference(logits.double(), targets, valid)
    for ours, wanted, name in zip(found, exact, ("max", "total", "picked", "level")):
        assert ours.dtype == torch.float32
        size = logits[:, :valid].double().abs().sum(1).clamp_min(1) if name == "level" else wanted.abs().clamp_min(1)
        same = (ours == wanted) | ((ours - wanted).abs() <= TOLERANCE[torch.float32] * size)
        assert same.all(), name
    lse = torch.logsumexp(logits[:, :valid].double(), 1).add(1.5).float() if valid else torch.zeros(rows, device=device)
    scale = torch.linspace(0, 2, rows, device=device)
    options = {**options, "vocab": max(1, valid + 7)}
    wanted = exact_gradient(logits, targets, lse, scale, valid, **options)
    result = cross_entropy.gradient_triton_(logits, targets, lse, scale, valid, **options)
    assert result is logits and (result[:, valid:] == 0).all() and (rows == 0 or (result[0] == 0).all())
    assert error(result, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothed"])
@pytest.mark.parametrize("limit", [32768, 512], ids=["registers", "loop"])
@pytest.mark.parametrize("shape", [s for s in GRID if not (isinstance(s, tuple) and s[2] == 0)], ids=str)
def test_whole_vocabulary_at_once(shape, limit, options, dtype, device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "IN_REGISTERS", limit)
    (rows, _, valid), (logits, targets) = shape, inputs(shape, dtype, device)
    exact_lse = torch.logsumexp(logits[:, :valid].double(), 1)
    wide = logits.double()
    scale = torch.linspace(0, 2, rows, device=device)
    lse, picked, level = cross_entropy.whole_triton_(logits, targets, scale, valid, **options)
    assert error(lse, exact_lse) <= TOLERANCE[torch.float32]
    ours = (targets >= 0) & (targets < valid)
    wanted = torch.where(ours, wide.gather(1, targets.clamp(0, valid - 1).unsqueeze(1)).squeeze(1), 0.0)
    assert torch.equal(picked.double(), wanted)
    if options:
        assert ((level - wide[:, :valid].sum(1)).abs() <= 2e-6 * wide[:, :valid].abs().sum(1)).all()
    wanted = exact_gradient(wide, targets, exact_lse, scale, valid, vocab=valid, **options)
    assert (logits[:, valid:] == 0).all() and (rows == 0 or (logits[0] == 0).all())
    assert error(logits, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype, device):
    logits = torch.zeros(7, 40, dtype=dtype, device=device)
    logits[0, 1:] = -INF
    logits[1, :20] = -INF
    logits[2] = -INF
    logits[3, 5] = float("nan")
    logits[4, 5] = INF
    logits[5] = -1e4
    logits[6] = 1e4
    targets = torch.zeros(7, dtype=torch.int64, device=device)
    maximum, total, _, _ = cross_entropy.statistics_triton(logits, targets, 40)
    assert total[0] == 1 and total[1] == 20 and total[5] == 40 and total[6] == 40
    assert maximum[2] == -INF and total[2] == 0
    assert total[3].isnan() and total[4].isnan()
    for at_once in (False, True):
        ours, scale = logits.clone(), torch.ones(7, device=device)
        scale[2:5] = 0  # an ignored row may hold anything
        if at_once:
            cross_entropy.whole_triton_(ours, targets, scale, 40)
        else:
            lse = torch.logsumexp(logits.double(), 1).float()
            cross_entropy.gradient_triton_(ours, targets, lse, scale, 40)
        assert (ours[2:5] == 0).all() and ours[0, 0] == 0 and (ours[0, 1:] == 0).all()
        assert (ours[1, :20] == torch.tensor([-1.0] + [0.0] * 19, device=device)).all()
        assert ours.isfinite().all() and abs(float(ours[6].float().sum())) < 1e-2


def test_strided_logits_and_far_targets(device):
    logits = draw((4, 64), torch.float32, device, 1)
    targets = torch.tensor([0, 2**40, -(2**40), 31], device=device)
    ours = logits[:, :48]  # rows with a gap between them
    lse, scale = torch.logsumexp(ours, 1), torch.ones(4, device=device)
    wanted = exact_gradient(ours, targets, lse, scale, 32)
    cross_entropy.gradient_triton_(ours, targets, lse, scale, 32)
    assert error(ours, wanted) <= TOLERANCE[torch.float32]
    turned = draw((64, 4), torch.float32, device, 1).t()
    statistics = cross_entropy.statistics_triton(turned, targets, 32)
    assert torch.equal(statistics[0], turned[:, :32].amax(1))
    assert cross_entropy.gradient_triton_(turned, targets, statistics[0], scale, 32) is turned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothed"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_linear_cross_entropy(shared, options, dtype, device, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy.whole, "GPU_ROWS", 4)
    n, h, v, valid = 11, 24, 50, 45
    x, weight = draw((n, h), dtype, device, 1), draw((v, h), dtype, device, 2)
    weight.requires_grad_()
    targets = torch.randint(0, valid, (n,), generator=torch.Generator().manual_seed(3)).to(device)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(4)).to(device)
    scale[3] = 0
    exchange = (lambda *s: whole.alone(*s)) if shared else whole.alone
    before = torch.ones(v, h, device=device)
    results = []
    for function, kind in (
        (linear_cross_entropy.linear_ce_triton, torch.float32),
        (whole.linear_ce_reference, torch.float64),
    ):
        main_grad = before.to(kind, copy=True)
        wide = kind == torch.float64
        losses, dx = function(
            x.double() if wide else x, weight.double() if wide else weight, targets, scale.to(kind), valid,
            main_grad=main_grad, exchange=exchange, vocab=valid, **options,
        )  # fmt: skip
        results.append((losses, dx, main_grad - 1))
        forward_only = function(
            x.double() if wide else x, weight.double() if wide else weight, targets, scale.to(kind), valid,
            main_grad=None, exchange=exchange, vocab=valid, **options,
        )  # fmt: skip
        assert torch.allclose(forward_only[0], losses, rtol=1e-5) and not forward_only[1].numel()
    for ours, wanted, name in zip(*results, ("losses", "dx", "main_grad")):
        # bf16 logits are rounded once and their gradients once: three roundings on the way to dx.
        assert error(ours, wanted) <= TOLERANCE[dtype] * 3, name


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_running_maximum_moves_over_many_blocks(order, device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", 64)
    monkeypatch.setattr(cross_entropy, "IN_REGISTERS", 64)
    logits = draw((3, 700), torch.float32, device, 6) + torch.linspace(-30, 30, 700, device=device)
    logits = logits if order == "rising" else logits.flip(1)
    targets, scale = torch.tensor([0, 350, 699], device=device), torch.ones(3, device=device)
    maximum, total, _, _ = cross_entropy.statistics_triton(logits, targets, 700)
    exact = torch.logsumexp(logits.double(), 1)
    assert error(maximum.double() + total.double().log(), exact) <= TOLERANCE[torch.float32]
    wanted = exact_gradient(logits, targets, exact, scale, 700)
    lse, _, _ = cross_entropy.whole_triton_(logits, targets, scale, 700)
    assert error(lse, exact) <= TOLERANCE[torch.float32] and error(logits, wanted) <= TOLERANCE[torch.float32]
