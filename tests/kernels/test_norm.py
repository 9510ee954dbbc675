import pytest
import torch

from tests.kernels.tolerances import TOLERANCE, compare, error, load, versions

EPS = 1e-5
SHAPES = [(3, 5, 64), (1, 1), (7, 17), (0, 33), (2, 1000), (130, 63), (1, 4099)]
ROWS = [(op, v) for op in ("layer_norm", "rms_norm") for v in versions(op)]


def layer(x, w, b=None):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    return y if b is None else y + b


def rms(x, w):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w


def inputs(shape, dtype, weight_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 3 + 0.5
    w, b = torch.randn(shape[-1:], generator=g) + 1, torch.randn(shape[-1:], generator=g)
    return [x.to(dtype), w.to(weight_dtype or dtype), b.to(weight_dtype or dtype)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op, version", ROWS, ids=lambda v: getattr(v, "name", v))
def test_value_and_gradients(op, version, shape, dtype):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    x, w, b = inputs(shape, dtype)
    tail, formula = ([], rms) if op == "rms_norm" else ([b], layer)
    exact = formula(x.double(), w.double(), *(t.double() for t in tail))
    assert error(function(x, w, *tail, EPS), exact) <= TOLERANCE[dtype]
    if shape[-1] == 1:
        return  # the gradient of a row of one feature is pure cancellation
    # torch's bf16 LayerNorm sums the weight's gradient over rows in bf16; no such slack for ours.
    tolerance = TOLERANCE[dtype] * (10.0 if version.name == "torch" and dtype == torch.bfloat16 else 1.0)
    if op == "rms_norm":
        compare(lambda x, w: function(x, w, EPS), rms, [x, w], tolerance)
    else:
        compare(lambda x, w, b: function(x, w, b, EPS), layer, [x, w, b], tolerance)
        compare(lambda x, w: function(x, w, None, EPS), layer, [x, w], tolerance)


@pytest.mark.parametrize("op, version", ROWS, ids=lambda v: getattr(v, "name", v))
def test_non_contiguous_input_and_gradient(op, version):
    function = load(version, torch.float32)
    assert function is not None
    x, w, b = inputs((6, 5, 31), torch.float32)
    tail = () if op == "rms_norm" else (b,)
    plain = x.clone().requires_grad_()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    grad = torch.randn(5, 6, 31).transpose(0, 1)
    y, y0 = function(strided, w, *tail, EPS), function(plain, w, *tail, EPS)
    y.backward(grad)
    y0.backward(grad.contiguous())
    assert torch.equal(y, y0) and torch.equal(strided.grad, plain.grad)


def test_fp32_weight_with_bf16_rows():
    x, w, b = inputs((9, 65), torch.bfloat16, torch.float32)
    for op, version in ROWS:
        function = load(version, torch.bfloat16)
        if function is None or version.name == "torch":
            continue
        if op == "rms_norm":
            compare(lambda x, w: function(x, w, EPS), rms, [x, w], TOLERANCE[torch.bfloat16])  # noqa: B023
        else:
            compare(lambda x, w, b: function(x, w, b, EPS), layer, [x, w, b], TOLERANCE[torch.bfloat16])  # noqa: B023


def test_a_large_mean_does_not_cancel():
    x, w, b = inputs((4, 256), torch.float32)
    x = x * 1e-2 + 100.0
    for version in versions("layer_norm"):
        function = load(version, torch.float32)
        # Mean 100, deviation 0.03: x itself is known to 4e-6 / 0.03, and the mean to about as much.
        if version.name != "torch":
            assert error(function(x, w, b, EPS), layer(x.double(), w.double(), b.double())) < 5e-4


@pytest.mark.parametrize("op, version", ROWS, ids=lambda v: getattr(v, "name", v))
def test_nan_and_infinity_stay_in_their_row(op, version):
    function = load(version, torch.float32)
    x, w, b = inputs((3, 40), torch.float32)
    x[1, 7] = float("nan")
    y = function(x, w, *([] if op == "rms_norm" else [b]), EPS)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


def test_sums_do_not_depend_on_threads():
    x, w, b = inputs((1000, 48), torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for op, version in ROWS:
            if version.name == "cpp":
                ours = w.clone().requires_grad_()
                tail = () if op == "rms_norm" else (b,)
                load(version, torch.float32)(x, ours, *tail, EPS).square().sum().backward()
                results.append(ours.grad)
    torch.set_num_threads(before)
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:]))


def test_gradcheck_of_the_references():
    x, w, b = (t.requires_grad_() for t in inputs((3, 7), torch.float64))
    from megapre.kernels import norm

    assert torch.autograd.gradcheck(lambda x, w, b: norm.layer_norm_reference(x, w, b, EPS), (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w: norm.rms_norm_reference(x, w, EPS), (x, w))
