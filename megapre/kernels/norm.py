"""LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467) over the last dimension.

LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight.
Statistics are fp32 (fp64 for fp64 input) whatever the type of x; y has the type of x.

Every version: x [..., h], weight and bias [h] -> [..., h]; gradients of x, weight and bias through autograd.
``add_*``: x, residual [..., h] -> (y, h) with h = x + residual, rounded to the type of x, and y = norm(h): the sum is
needed twice, by the norm and by the next residual. Backward: dx = dresidual = (gradient of the norm) + dh.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm as the formula is written."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * _wide(weight)
    return (y if bias is None else y + _wide(bias)).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as the formula is written."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(h), h) for h = x + residual."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h), h) for h = x + residual."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_layer_norm_reference`` by torch's sum and ``layer_norm``."""
    total = x + residual
    return layer_norm_torch(total, weight, bias, eps), total


def add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm_reference`` by torch's sum and ``rms_norm``."""
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm by ``torch.nn.functional.layer_norm``."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm by ``torch.nn.functional.rms_norm``."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def layer_norm_cpp(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _LayerNorm.apply(x, weight, bias, eps)


def rms_norm_cpp(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _RMSNorm.apply(x, weight, eps)


def add_layer_norm_cpp(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_layer_norm_reference`` in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _AddLayerNorm.apply(x, residual, weight, bias, eps)


def add_rms_norm_cpp(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm_reference`` in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _AddRMSNorm.apply(x, residual, weight, eps)


class _LayerNorm(torch.autograd.Function):
    """Saves x and two numbers a row; the weight's gradient is summed in fp32, then cast."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, statistics = torch.ops.megapre.layer_norm_forward(rows, weight, bias, eps)
        ctx.save_for_backward(rows, weight, statistics)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        rows, weight, statistics = ctx.saved_tensors
        flat = grad.reshape(rows.shape).contiguous()
        grad_x, sums = torch.ops.megapre.layer_norm_backward(flat, rows, weight, statistics)
        grad_bias = None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)
        return grad_x.view(grad.shape), sums[0].to(weight.dtype), grad_bias, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, statistics = torch.ops.megapre.rms_norm_forward(rows, weight, eps)
        ctx.save_for_backward(rows, weight, statistics)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        rows, weight, statistics = ctx.saved_tensors
        flat = grad.reshape(rows.shape).contiguous()
        grad_x, sums = torch.ops.megapre.rms_norm_backward(flat, rows, weight, statistics)
        return grad_x.view(grad.shape), sums[0].to(weight.dtype), None


class _AddLayerNorm(torch.autograd.Function):
    """Saves h and two numbers a row; x and residual get the same gradient."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):  # type: ignore[no-untyped-def]
        rows, beside = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, residual))
        y, total, statistics = torch.ops.megapre.add_layer_norm_forward(rows, beside, weight, bias, eps)
        ctx.save_for_backward(total, weight, statistics)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx, grad, grad_total):  # type: ignore[no-untyped-def, override]
        total, weight, statistics = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total, None, None, None
        flat, along = _rows(grad, total), _rows(grad_total, total)
        grad_x, sums = torch.ops.megapre.layer_norm_backward(flat, total, weight, statistics, along)
        grad_bias = None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)
        grad_x = grad_x.view(grad.shape)
        return grad_x, grad_x, sums[0].to(weight.dtype), grad_bias, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):  # type: ignore[no-untyped-def]
        rows, beside = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, residual))
        y, total, statistics = torch.ops.megapre.add_rms_norm_forward(rows, beside, weight, eps)
        ctx.save_for_backward(total, weight, statistics)
        ctx.set_materialize_grads(False)
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx, grad, grad_total):  # type: ignore[no-untyped-def, override]
        total, weight, statistics = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total, None, None
        flat, along = _rows(grad, total), _rows(grad_total, total)
        grad_x, sums = torch.ops.megapre.rms_norm_backward(flat, total, weight, statistics, along)
        grad_x = grad_x.view(grad.shape)
        return grad_x, grad_x, sums[0].to(weight.dtype), None


def _rows(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else grad.reshape(like.shape).contiguous()
