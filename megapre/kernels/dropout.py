"""Dropout whose mask is a pure function of what it drops (``megapre/random/philox.py``): y = x keep / (1 - p).

bias_dropout_residual: y = residual + (x + bias) keep / (1 - p), computed in fp32 (fp64 for fp64) and rounded once.

No mask is saved: the backward pass draws it again, and it is the same op on the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapre.kernels import cuda
from megapre.random import philox


def dropout_reference(
    x: Tensor, *, seed: int, step: int, site: int, positions: Tensor, samples: Tensor, probability: float
) -> Tensor:
    """Drop features of x [P, B, h] for positions int64 [P] and samples int64 [B], mask in torch arithmetic."""
    return _Dropout.apply(x, _draw_reference, seed, step, site, positions, samples, probability)


def bias_dropout_residual_reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    seed: int,
    step: int,
    site: int,
    positions: Tensor,
    samples: Tensor,
    probability: float,
) -> Tensor:
    """residual + dropout(x + bias) for x, residual [P, B, h] and bias [h] or None, as the formula is written."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    if probability:
        total = dropout_reference(
            total, seed=seed, step=step, site=site, positions=positions, samples=samples, probability=probability
        )
    return (residual.to(wide) + total).to(x.dtype)


def dropout_cpp(
    x: Tensor, *, seed: int, step: int, site: int, positions: Tensor, samples: Tensor, probability: float
) -> Tensor:
    """Drop features of x [P, B, h], mask and product in one C++ pass (``csrc/cpu/philox.cpp``); CPU, fp32 or bf16."""
    return _Dropout.apply(x, _draw_cpp, seed, step, site, positions, samples, probability)


def bias_dropout_residual_cpp(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    seed: int,
    step: int,
    site: int,
    positions: Tensor,
    samples: Tensor,
    probability: float,
) -> Tensor:
    """``bias_dropout_residual_reference`` in one C++ pass; CPU, fp32 or bf16. Saves positions and samples alone."""
    return _BiasDropoutResidual.apply(x, bias, residual, seed, step, site, positions, samples, probability)


def dropout_cuda(
    x: Tensor, *, seed: int, step: int, site: int, positions: Tensor, samples: Tensor, probability: float
) -> Tensor:
    """Drop features of x [P, B, h], mask in one CUDA kernel (``csrc/cuda/dropout.cu``). Not yet executed on a GPU."""
    return _Dropout.apply(x, _draw_cuda, seed, step, site, positions, samples, probability)


def _draw_reference(
    x: Tensor, seed: int, step: int, site: int, positions: Tensor, samples: Tensor, probability: float
) -> Tensor:
    kept = philox.keep_mask_reference(seed, step, [site], positions, samples, 0, x.shape[-1], probability)[0]
    return _scale(x, kept, probability)


def _draw_cpp(
    x: Tensor, seed: int, step: int, site: int, positions: Tensor, samples: Tensor, probability: float
) -> Tensor:
    philox.threshold(probability)
    return torch.ops.megapre.dropout(x.contiguous(), philox.mix(seed), step, site, positions, samples, probability)


def _draw_cuda(
    x: Tensor, seed: int, step: int, site: int, positions: Tensor, samples: Tensor, probability: float
) -> Tensor:
    limit = philox.threshold(probability)
    kept = cuda.keep_mask(philox.mix(seed), step, site, positions, samples, x.shape[-1], limit)
    return _scale(x, kept, probability)


def _scale(x: Tensor, kept: Tensor, probability: float) -> Tensor:
    return torch.where(kept, x * (1.0 / (1.0 - probability)), 0.0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, draw, seed, step, site, positions, samples, probability):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(positions, samples)
        ctx.draw, ctx.numbers, ctx.probability = draw, (seed, step, site), probability
        return draw(x, seed, step, site, positions, samples, probability)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dropped = ctx.draw(grad, *ctx.numbers, *ctx.saved_tensors, ctx.probability)
        return dropped, None, None, None, None, None, None, None


class _BiasDropoutResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, seed, step, site, positions, samples, probability):  # type: ignore[no-untyped-def]
        philox.threshold(probability)
        ctx.save_for_backward(positions, samples)
        ctx.numbers, ctx.probability = (seed, step, site), probability
        ctx.bias_dtype = None if bias is None else bias.dtype
        numbers = (philox.mix(seed), step, site, positions, samples, probability)
        return torch.ops.megapre.bias_dropout_residual(x.contiguous(), bias, residual.contiguous(), *numbers)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dropped = _draw_cpp(grad, *ctx.numbers, *ctx.saved_tensors, ctx.probability) if ctx.probability else grad
        grad_bias = None
        if ctx.bias_dtype is not None:
            grad_bias = dropped.sum((0, 1), dtype=torch.float32).to(ctx.bias_dtype)
        return dropped, grad_bias, grad, None, None, None, None, None, None
