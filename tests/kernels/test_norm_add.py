"""Norms of a residual sum: two results, and gradients that arrive through either or both."""

import pytest
import torch

from tests.kernels.tolerances import TOLERANCE, error, load, versions

EPS = 1e-5
SHAPES = [(3, 5, 64), (7, 17), (0, 33), (2, 1000), (130, 63), (1, 4099)]
ROWS = [(op, v) for op in ("add_layer_norm", "add_rms_norm") for v in versions(op)]


def formula(op, x, residual, w, b):
    h = x + residual
    centred = h - h.mean(-1, keepdim=True) if op == "add_layer_norm" else h
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    return (y if b is None else y + b), h


def inputs(shape, dtype):
    g = torch.Generator().manual_seed(shape[-1])
    # Halves of the type: their sum is exact, so h needs no tolerance of its own and y sees the formula's h.
    x, residual = ((torch.randn(shape, generator=g) * 8).round() / 4 for _ in range(2))
    w, b = torch.randn(shape[-1:], generator=g) + 1, torch.randn(shape[-1:], generator=g)
    return [t.to(dtype) for t in (x, residual, w, b)]


@pytest.mark.parametrize("used", ["both", "norm", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op, version", ROWS, ids=lambda v: getattr(v, "name", v))
def test_values_and_gradients(op, version, shape, dtype, used):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    tensors = inputs(shape, dtype)
    if op == "add_rms_norm":
        tensors.pop()
    ours, exact = ([t.clone().to(d).requires_grad_() for t in tensors] for d in (dtype, torch.float64))
    bias = ours[3:] if op == "add_layer_norm" else []
    results = function(*ours[:3], *bias, EPS)
    wanted = formula(op, *exact[:3], exact[3] if bias else None)
    assert torch.equal(results[1].double(), wanted[1])
    assert results[0].dtype == dtype and error(results[0], wanted[0]) <= TOLERANCE[dtype]
    picked = {"both": (0, 1), "norm": (0,), "sum": (1,)}[used]
    g = torch.Generator().manual_seed(3)
    grads = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in picked]
    torch.autograd.backward([results[i] for i in picked], grads)
    torch.autograd.backward([wanted[i] for i in picked], [t.double() for t in grads])
    # Composed versions round the gradient twice; torch's bf16 LayerNorm sums over rows in bf16.
    slack = 1.0 if version.name == "cpp" else 10.0 if dtype == torch.bfloat16 else 2.0
    for a, b in zip(ours, exact):
        if b.grad is not None:
            assert error(a.grad, b.grad) <= slack * TOLERANCE[dtype]
        else:
            assert a.grad is None or not a.grad.any()
    if dtype != torch.float64 and version.name == "cpp":
        assert torch.equal(ours[0].grad, ours[1].grad)


@pytest.mark.parametrize("op, version", ROWS, ids=lambda v: getattr(v, "name", v))
def test_strided_inputs_and_gradients(op, version):
    function = load(version, torch.float32)
    x, residual, w, b = inputs((6, 5, 31), torch.float32)
    tail = (b, EPS) if op == "add_layer_norm" else (EPS,)
    plain, strided = (t.requires_grad_() for t in (x.clone(), x.transpose(0, 1).contiguous().transpose(0, 1)))
    grads = [torch.randn(5, 6, 31).transpose(0, 1), torch.ones(1, 1, 1).expand(6, 5, 31)]
    results = [function(t, residual, w, *tail) for t in (plain, strided)]
    for result in results:
        torch.autograd.backward(result, grads)
    assert all(torch.equal(a, b) for a, b in zip(*results)) and torch.equal(plain.grad, strided.grad)


def test_gradcheck_of_the_references():
    from megapre.kernels import norm

    x, residual, w, b = (t.requires_grad_() for t in inputs((3, 7), torch.float64))
    assert torch.autograd.gradcheck(lambda *t: norm.add_layer_norm_reference(*t, EPS), (x, residual, w, b))
    assert torch.autograd.gradcheck(lambda *t: norm.add_rms_norm_reference(*t, EPS), (x, residual, w))


def test_results_do_not_depend_on_threads_or_on_the_run():
    x, residual, w, b = inputs((1000, 48), torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results = []
        for op, version in ROWS:
            if version.name == "cpp":
                ours = [t.clone().requires_grad_() for t in (x, residual, w)]
                y, h = load(version, torch.bfloat16)(*ours, *([b] if op == "add_layer_norm" else []), EPS)
                torch.autograd.backward((y, h), (x, residual))
                results += [y, h, *(t.grad for t in ours)]
        found.append(results)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found))
