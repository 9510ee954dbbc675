"""The compiled libraries: fake versions and schemas of every op."""

import pytest
import torch

from megapre.kernels.attention import Problem, arguments
from megapre.kernels.mask import Mask
from megapre.random import native


def tiles(targets):
    """The products of AMX; on a processor without it there is nothing to call."""
    x, dy, weight = (torch.randn(n, 32).bfloat16() for n in (6, 6, 64))
    logits, main = torch.zeros(64, 32).bfloat16(), torch.zeros(64, 32)
    lse, scale = torch.rand(6), torch.rand(6)
    return {
        "head_logits": (x, weight, targets, 60, True, logits),
        "head_gradient_": (x, weight, targets, torch.rand(1, 4, 6), lse, scale, 60, 0.1, 60, 0.0, logits, main,
                           torch.empty_like(x)),
        "add_product_": (torch.zeros(32, 32), dy, x),
    }


def cases():
    q, k = torch.randn(5, 2, 4, 8), torch.randn(5, 2, 2, 8)
    asked = arguments(q, k, Problem(Mask(causal=True), torch.randn(4, 9), None, 0.5))
    x, w, grad = torch.randn(6, 10), torch.randn(10), torch.randn(6, 10)
    targets, positions, samples = torch.tensor([0, 1, 2, 3, -1, 9]), torch.arange(6), torch.arange(2)
    ops, scalar = torch.ops.megapre, torch.tensor(2.0)
    return {
        "layer_norm_forward": (x, w, w, 1e-5),
        "layer_norm_backward": (grad, x, w, torch.rand(2, 6)),
        "rms_norm_forward": (x.bfloat16(), w, 1e-5),
        "rms_norm_backward": (grad, x, w, torch.rand(1, 6)),
        "cross_entropy_statistics": (x, targets, 9),
        "cross_entropy_gradient_": (x.clone(), targets, torch.rand(6), torch.rand(6), 9),
        "add_layer_norm_forward": (x, grad, w, None, 1e-5),
        "add_rms_norm_forward": (x.bfloat16(), grad.bfloat16(), w, 1e-5),
        "bias_gelu_forward": (x, w),
        "bias_gelu_backward": (grad, x, w),
        "geglu_forward": (x,),
        "geglu_backward": (torch.randn(6, 5), x),
        "bias_dropout_residual": (torch.randn(6, 2, 9), torch.randn(9), torch.randn(6, 2, 9), 5, 1, 7, positions,
                                  samples, 0.25),
        "rope": ([torch.randn(3, 2, 4, 6), torch.randn(3, 2, 1, 6)], torch.rand(3, 2, 3), torch.rand(3, 2, 3), True,
                 False),
        "rope_": ([torch.randn(3, 2, 4, 6)], torch.rand(3, 2, 3), torch.rand(3, 2, 3), False, True),
        "adamw_": (*(torch.rand(9) for _ in range(4)), torch.zeros(9, dtype=torch.bfloat16), scalar, 0.9, 0.95, 1e-8,
                   0.1, scalar, scalar, torch.tensor(0.0)),
        "accumulate_": (torch.rand(6, 10), x.bfloat16()),
        "square_sum": (x,),
        "gelu_forward": (x,),
        "gelu_backward": (grad, x),
        "swiglu_forward": (x,),
        "swiglu_backward": (torch.randn(6, 5), x),
        "philox_normal_": (torch.empty(3, 2), [1, 2, 3, 4], [6, 4], [1, 1]),
        "keep_mask": (5, 1, [7, 8], positions, samples, 3, 11, 0.25),
        "dropout": (torch.randn(6, 2, 9), 5, 1, 7, positions, samples, 0.25),
        "moe_top_k": (torch.randn(4, 6), 2),
        "moe_combine": (torch.randn(5, 6), torch.rand(3, 2), torch.tensor([[0, 1], [5, 2], [3, 4]])),
        "moe_spread": (torch.randn(3, 6), torch.randn(5, 6), torch.rand(3, 2), torch.tensor([[0, 1], [5, 2], [3, 4]])),
        "grouped_mm": (x, torch.randn(2, 7, 10), [2, 4]),
        "grouped_dw_": (torch.zeros(2, 7, 10), torch.randn(6, 7), x, [2, 4]),
        **tiles(targets),
        "attention_forward": (q, k, k, *asked),
        "attention_backward": (q, q, k, k, torch.rand(2, 4, 5), torch.rand(2, 4, 5), *asked),
        "attention_delta": (q, q),
    }, ops


@pytest.mark.skipif(bool(native.load()), reason=native.load())
@pytest.mark.parametrize("name", native.FAKES)
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)
    arguments, ops = cases()
    if name in tiles(arguments["cross_entropy_statistics"][1]) and not ops.has_tiles():
        pytest.skip("this processor has no AMX tiles")
    torch.library.opcheck(getattr(ops, name).default, arguments[name])


@pytest.mark.skipif(bool(native.load()), reason=native.load())
def test_bad_shapes_are_refused():
    ops = torch.ops.megapre
    for call in (
        lambda: ops.rms_norm_forward(torch.randn(3, 4), torch.randn(5), 1e-5),
        lambda: ops.rms_norm_forward(torch.randn(4, 3).t(), torch.randn(4), 1e-5),
        lambda: ops.rms_norm_forward(torch.randn(3, 4).double(), torch.randn(4), 1e-5),
        lambda: ops.cross_entropy_statistics(torch.randn(3, 4), torch.zeros(2, dtype=torch.int64), 4),
        lambda: ops.cross_entropy_statistics(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), 5),
        lambda: ops.dropout(torch.randn(3, 4, 5), 1, 1, 1, torch.arange(3), torch.arange(5), 0.1),
        lambda: ops.add_rms_norm_forward(torch.randn(3, 4), torch.randn(4, 4), torch.randn(4), 1e-5),
        lambda: ops.bias_gelu_forward(torch.randn(3, 4), torch.randn(3)),
        lambda: ops.geglu_forward(torch.randn(3, 5)),
        lambda: ops.rope([torch.randn(3, 4, 2, 6)], torch.rand(3, 4, 2), torch.rand(3, 4, 2), False, False),
        lambda: ops.accumulate_(torch.randn(4, 4), torch.randn(4, 3)),
        lambda: ops.square_sum(torch.randn(4, 4).t()),
        lambda: ops.moe_top_k(torch.randn(3, 4), 5),
        lambda: ops.moe_combine(torch.randn(3, 4), torch.rand(2, 1), torch.zeros(3, 1, dtype=torch.int64)),
        lambda: ops.moe_spread(torch.randn(2, 4), torch.randn(3, 5), torch.rand(2, 1), torch.zeros(2, 1).long()),
        lambda: ops.grouped_mm(torch.randn(6, 4), torch.randn(2, 3, 4), [2, 3]),
        lambda: ops.grouped_mm(torch.randn(6, 4), torch.randn(2, 3, 4), [-1, 7]),
        lambda: ops.grouped_dw_(torch.zeros(2, 3, 4).bfloat16(), torch.randn(6, 3), torch.randn(6, 4), [2, 4]),
    ):
        with pytest.raises(ValueError):
            call()
