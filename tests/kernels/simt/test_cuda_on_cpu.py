"""The CUDA sources, unchanged, on the SIMT machine: values and gradients in every fiber order."""

import random

import pytest
import torch

from tests.kernels import attention_cases
from tests.kernels.simt import cases


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", cases.SHORT)
def test_short_list_in_every_order(simt, name, order):
    seed = random.SystemRandom().randrange(1000)
    print("seed", seed)
    simt.configure(order, early=order == "reverse", seed=seed)
    cases.check(cases.SHORT[name])


@pytest.mark.parametrize("name", cases.LONG)
def test_long_list(simt, name):
    cases.check(cases.LONG[name])


@pytest.mark.nightly
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", {**cases.SHORT, **cases.LONG})
def test_everything_in_every_order(simt, name, order, early):
    for seed in (1, 2, 3) if order == "random" else (0,):
        simt.configure(order, early=early, seed=seed)
        cases.check({**cases.SHORT, **cases.LONG}[name])


def test_attention_keeps_its_relations(simt):
    """Bit for bit between documents; masks that mean the same; two steps of a ring are one."""
    from megapre.kernels.cuda_attention import attention_cuda

    tolerance = 2.2 * cases.TOLERANCE[torch.bfloat16]
    attention_cases.check_documents(attention_cuda, torch.bfloat16, s=150, d=32)
    attention_cases.check_same_masks(attention_cuda, torch.bfloat16, "cpu", tolerance, s=70)
    attention_cases.check_two_steps(attention_cuda, torch.bfloat16, "cpu", tolerance)


def test_one_block_takes_all_keys(simt, monkeypatch):
    from megapre.kernels import cuda_attention

    monkeypatch.setattr(cuda_attention, "MOST_SPLITS", 1)
    cases.check(cases.LONG["attention-whole"])


def test_a_device_with_less_shared_memory_takes_the_two_passes(simt):
    simt.configure(limit=64 << 10)
    cases.check(cases.SHORT["loss-shared"])


def test_runs_agree_bit_for_bit(simt):
    from megapre.kernels import cuda

    x, w, grad = cases.draw(9, 264), cases.draw(264), cases.draw(9, 264, seed=1)
    rstd = torch.rand(9)
    results = []
    for order in ("forward", "reverse", "random"):
        simt.configure(order, seed=5)
        results.append((*cuda.norm_backward(grad, x, w, None, rstd)[:2], cuda.square_sum(x.flatten())))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_bad_input_is_refused(simt):
    from megapre.kernels import cuda

    with pytest.raises(ValueError, match=r"not torch\.float64"):
        cuda.swiglu_forward(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="rows lie in one piece"):
        cuda.cross_entropy_statistics(torch.zeros(4, 3).t(), torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="whole heads"):
        q = torch.zeros(2, 1, 3, 8).transpose(2, 3)
        cuda.rope(q, q, torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), interleaved=False, inverse=False)
    with pytest.raises(ValueError, match="fp32 lr"):
        flat = torch.zeros(4)
        cuda.adamw_(
            flat, flat, flat, flat, None, lr=torch.tensor(0.1, dtype=torch.float64), beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0, step=1,
        )  # fmt: skip
