import pytest
import torch

from megapre.kernels import norm as formulas
from megapre.kernels.triton import norm
from tests.kernels.triton.values import DTYPES, compare, draw

EPS = 1e-5
SHAPES = [(1, 1), (1, 17), (3, 5, 64), (7, 33), (0, 33), (2, 1000), (13, 63)]
# Above 8192 features a row is read by blocks of columns.
NIGHTLY = [(1, 4099), (40, 4096), (5, 8192), (300, 96), (5, 8193), (3, 20000), (0, 9000)]
GRID = SHAPES + [pytest.param(shape, marks=pytest.mark.nightly) for shape in NIGHTLY]


def inputs(shape, dtype, device, residual):
    x, w, b = (
        draw(shape, dtype, device, 1) * 3,
        draw(shape[-1:], dtype, device, 2) + 1,
        draw(shape[-1:], dtype, device, 3),
    )
    return ([x, draw(shape, dtype, device, 4)] if residual else [x]), w, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer_bias"])
def test_value_and_every_gradient(kind, residual, shape, dtype, device):
    rows, w, b = inputs(shape, dtype, device, residual)
    name = f"{'add_' if residual else ''}{'rms' if kind == 'rms' else 'layer'}_norm"
    ours, exact = getattr(norm, f"{name}_triton"), getattr(formulas, f"{name}_reference")
    # The gradient of a row of one feature is pure cancellation; with a residual dh passes through it.
    gradients = shape[-1] > 1
    if kind == "rms":
        compare(
            lambda *t: ours(*t, EPS), lambda *t: exact(*t, EPS), [*rows, w], gradients=gradients, rounded_sum=residual
        )
    elif kind == "layer":
        compare(
            lambda *t: ours(*t, None, EPS), lambda *t: exact(*t, None, EPS), [*rows, w],
            gradients=gradients, rounded_sum=residual,
        )  # fmt: skip
    else:
        compare(
            lambda *t: ours(*t, EPS),
            lambda *t: exact(*t, EPS),
            [*rows, w, b],
            gradients=gradients,
            rounded_sum=residual,
        )


def test_fp32_weights_with_bf16_rows_and_strided_input(device):
    rows, w, b = inputs((6, 5, 31), torch.bfloat16, device, False)
    x = rows[0].transpose(0, 1)
    compare(
        lambda x, w, b: norm.layer_norm_triton(x, w, b, EPS),
        lambda x, w, b: formulas.layer_norm_reference(x, w, b, EPS),
        [x, w.float(), b.float()],
    )


def test_nan_stays_in_its_row_and_a_large_mean_does_not_cancel(device):
    rows, w, b = inputs((3, 40), torch.float32, device, False)
    x = rows[0]
    x[1, 7] = float("nan")
    for y in (norm.layer_norm_triton(x, w, b, EPS), norm.rms_norm_triton(x, w, EPS)):
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()
    x = draw((4, 256), torch.float32, device, 5) * 1e-2 + 100.0
    y, y0 = (
        norm.layer_norm_triton(x, w.new_ones(256), None, EPS),
        formulas.layer_norm_reference(x.double(), w.new_ones(256).double(), None, EPS),
    )
    assert (y.double() - y0).norm() < 5e-4 * y0.norm()


def test_weight_gradients_are_the_same_bits_twice(device):
    rows, w, b = inputs((37, 48), torch.float32, device, False)
    seen = []
    for _ in range(2):
        weight = w.clone().requires_grad_()
        norm.layer_norm_triton(rows[0], weight, b, EPS).square().sum().backward()
        seen.append(weight.grad)
    assert torch.equal(*seen)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", ["rms", "layer_bias"])
def test_rows_wider_than_registers_go_by_blocks(kind, residual, device, monkeypatch):
    monkeypatch.setattr(norm, "WIDEST", 16)
    monkeypatch.setattr(norm, "COLUMNS", 32)
    for shape in ((7, 33), (2, 5, 96), (0, 33)):
        test_value_and_every_gradient(kind, residual, shape, torch.bfloat16, device)
    x = draw((4, 250), torch.float32, device, 5) * 1e-2 + 100.0
    y, y0 = norm.layer_norm_triton(x, x.new_ones(250), None, EPS), formulas.layer_norm_reference(
        x.double(), x.new_ones(250).double(), None, EPS
    )
    assert (y.double() - y0).norm() < 5e-4 * y0.norm()


def test_refusals(device):
    with pytest.raises(ValueError, match="triton norm takes fp32, bf16 and fp16, not float64"):
        norm.rms_norm_triton(torch.ones(1, 4, dtype=torch.float64, device=device), torch.ones(4, device=device), EPS)
