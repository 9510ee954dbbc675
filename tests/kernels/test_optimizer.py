import pytest
import torch

from tests.kernels.tolerances import TOLERANCE, error, load, versions

OPTIONS = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
MODELS = [None, torch.float32, torch.bfloat16]


def state(n, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    master, gradient, average, square = (torch.randn(n, generator=g).to(dtype) for _ in range(4))
    return master, gradient, 0.1 * average, 0.01 * square.square()


def exact(master, gradient, average, square, step, divisor, lr, beta1, beta2, eps, weight_decay):
    w, g, m, v = (t.double() for t in (master, gradient, average, square))
    g = g / divisor
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    w = w - lr * weight_decay * w
    return w - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps), m, v


@pytest.mark.parametrize("model_dtype", MODELS)
@pytest.mark.parametrize("n", [0, 1, 3, 17, 1003, 40_000])
@pytest.mark.parametrize("step, divisor", [(1, 1.0), (7, 512.0)])
@pytest.mark.parametrize("version", versions("adamw_"), ids=lambda v: v.name)
def test_one_step(version, n, step, divisor, model_dtype):
    function = load(version, model_dtype or torch.float32)
    master, gradient, average, square = state(n)
    gradient *= divisor
    before = gradient.clone()
    wanted = exact(master, gradient, average, square, step, divisor, **OPTIONS)
    model = None if model_dtype is None else torch.full((n,), float("nan"), dtype=model_dtype)
    for scalar in (float, torch.tensor):
        tensors = [t.clone() for t in (master, before, average, square)]
        copy = None if model is None else model.clone()
        function(*tensors, copy, **OPTIONS, step=scalar(float(step)), divisor=scalar(divisor), skip=scalar(0.0))
        for ours, want in zip((tensors[0], tensors[2], tensors[3]), wanted):
            assert error(ours, want) <= TOLERANCE[torch.float32]
        assert copy is None or torch.equal(copy, tensors[0].to(copy.dtype))
        assert version.name == "torch" or torch.equal(tensors[1], before)


@pytest.mark.parametrize("version", versions("adamw_"), ids=lambda v: v.name)
def test_a_skipped_step_changes_nothing(version):
    function = load(version, torch.bfloat16)
    tensors = list(state(1003))
    tensors[1][5], tensors[1][6] = float("inf"), float("nan")
    model = tensors[0].bfloat16()
    before = [t.clone() for t in (tensors[0], *tensors[2:], model)]
    function(*tensors, model, **OPTIONS, step=torch.tensor(0.0), divisor=torch.tensor(2.0), skip=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, (tensors[0], *tensors[2:], model)))


def test_tensor_learning_rate_and_slices():
    wanted = None
    for version in versions("adamw_"):
        function = load(version, torch.float32)
        master, gradient, average, square = (torch.cat([torch.zeros(3), t]) for t in state(101))
        function(
            master[3:], gradient[3:], average[3:], square[3:], None, **{**OPTIONS, "lr": torch.tensor(1e-2)},
            step=torch.tensor(2.0), divisor=torch.tensor(1.0), skip=torch.tensor(0.0),
        )  # fmt: skip
        assert (master[:3] == 0).all()
        wanted = master if wanted is None else wanted
        torch.testing.assert_close(master, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("version", versions("adamw_"), ids=lambda v: v.name)
def test_lengths_are_checked_in_one_sentence(version):
    function = load(version, torch.float32)
    tensors = list(state(10))
    with pytest.raises(ValueError, match="adamw: all shards must be of one length"):
        function(*tensors, torch.zeros(9), **OPTIONS, step=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 17, 4097, 200_001])
@pytest.mark.parametrize("version", versions("square_sum"), ids=lambda v: v.name)
def test_square_sum(version, n, dtype):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    x = (torch.randn(n, generator=torch.Generator().manual_seed(n)) + 0.5).to(dtype)
    total = function(x)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert total.shape == () and total.dtype == kept
    assert error(total, x.double().square().sum()) <= (5 if version.name != "cpp" else 1) * TOLERANCE[kept]
    for bad in (float("inf"), float("nan")):
        if n:
            y = x.clone()
            y[-1] = bad
            assert not function(y).isfinite()


def test_square_sum_does_not_depend_on_threads():
    (version,) = [v for v in versions("square_sum") if v.name == "cpp"]
    function, x = load(version, torch.float32), torch.randn(300_000)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(function(x))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_ten_steps_stay_with_fp64():
    for version in versions("adamw_"):
        function = load(version, torch.bfloat16)
        master, _, average, square = state(501)
        average.zero_(), square.zero_()
        wanted = [t.double() for t in (master, average, square)]
        model = torch.empty(501, dtype=torch.bfloat16)
        for step in range(1, 11):
            g = torch.randn(501, generator=torch.Generator().manual_seed(step))
            wanted = list(exact(wanted[0], g, wanted[1], wanted[2], step, 1.0, **OPTIONS))
            function(master, g, average, square, model, **OPTIONS, step=torch.tensor(float(step)))
        assert error(master, wanted[0]) <= TOLERANCE[torch.float32]
