"""GELU in its tanh and erf forms (arXiv 1606.08415), ReLU, SwiGLU and GeGLU (arXiv 2002.05202), bias + GELU.

gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); gelu_exact(x) = x/2 (1 + erf(x / sqrt(2)));
swiglu([gate, up]) = gate sigmoid(gate) up;
geglu([gate, up]) = gelu(gate) up; bias_gelu(x, bias) = gelu(x + bias), the sum not rounded in between.
Computed in fp32 (fp64 for fp64 input), returned in the type of the input. Fast versions save their inputs alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gelu_reference(x: Tensor) -> Tensor:
    """GELU of any shape, as the formula is written."""
    wide = _wide(x)
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)


def gelu_exact_reference(x: Tensor) -> Tensor:
    """GELU by the error function, of any shape, as the formula is written."""
    wide = _wide(x)
    return (0.5 * wide * (1.0 + torch.erf(wide / math.sqrt(2.0)))).to(x.dtype)


def relu_reference(x: Tensor) -> Tensor:
    """max(x, 0), whose gradient at 0 is 0."""
    return torch.where(x <= 0, 0, x)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f], as the formula is written; the gate is the first half."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def geglu_reference(gate_up: Tensor) -> Tensor:
    """GeGLU [..., 2f] -> [..., f], as the formula is written; the gate is the first half."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (gelu_reference(gate) * up).to(gate_up.dtype)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) for x [..., f], bias [f]."""
    return gelu_reference(_wide(x) + _wide(bias)).to(x.dtype)


def gelu_torch(x: Tensor) -> Tensor:
    """GELU by ``torch.nn.functional.gelu``."""
    return F.gelu(x, approximate="tanh")


def gelu_exact_torch(x: Tensor) -> Tensor:
    """GELU by the error function, by ``torch.nn.functional.gelu``."""
    return F.gelu(x)


def relu_torch(x: Tensor) -> Tensor:
    """ReLU by torch, which saves its result alone."""
    return F.relu(x)


def geglu_torch(gate_up: Tensor) -> Tensor:
    """GeGLU [..., 2f] -> [..., f] by torch's gelu, in fp32."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def bias_gelu_torch(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) by torch's gelu, in fp32."""
    return F.gelu(_wide(x) + _wide(bias), approximate="tanh").to(x.dtype)


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f] by torch's silu, with silu computed again in the backward pass."""
    return _SwiGLU.apply(gate_up)


def gelu_cpp(x: Tensor) -> Tensor:
    """GELU in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _GeluCpp.apply(x)


def swiglu_cpp(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f] in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _SwiGLUCpp.apply(gate_up)


def geglu_cpp(gate_up: Tensor) -> Tensor:
    """GeGLU [..., 2f] -> [..., f] in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _GeGLUCpp.apply(gate_up)


def bias_gelu_cpp(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16. The bias's gradient is summed in fp32."""
    return _BiasGeluCpp.apply(x, bias)


class _GeluCpp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.contiguous()
        ctx.save_for_backward(x)
        return torch.ops.megapre.gelu_forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return torch.ops.megapre.gelu_backward(grad.contiguous(), *ctx.saved_tensors)


class _SwiGLUCpp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _glu_forward(ctx, gate_up, torch.ops.megapre.swiglu_forward)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return _glu_backward(ctx, grad, torch.ops.megapre.swiglu_backward)


class _GeGLUCpp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _glu_forward(ctx, gate_up, torch.ops.megapre.geglu_forward)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return _glu_backward(ctx, grad, torch.ops.megapre.geglu_backward)


def _glu_forward(ctx, gate_up: Tensor, function) -> Tensor:  # type: ignore[no-untyped-def]
    rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    ctx.save_for_backward(rows)
    ctx.shape = gate_up.shape
    return function(rows).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _glu_backward(ctx, grad: Tensor, function) -> Tensor:  # type: ignore[no-untyped-def]
    (rows,) = ctx.saved_tensors
    flat = grad.reshape(rows.shape[0], rows.shape[1] // 2).contiguous()
    return function(flat, rows).view(ctx.shape)


class _BiasGeluCpp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows, bias)
        return torch.ops.megapre.bias_gelu_forward(rows, bias).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        rows, bias = ctx.saved_tensors
        grad_x, sums = torch.ops.megapre.bias_gelu_backward(grad.reshape(rows.shape).contiguous(), rows, bias)
        return grad_x.view(grad.shape), sums.to(bias.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate_up)
        gate, up = _wide(gate_up).chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        (gate_up,) = ctx.saved_tensors
        gate, up = _wide(gate_up).chunk(2, dim=-1)
        wide = _wide(grad)
        halves = [torch.ops.aten.silu_backward(wide * up, gate), wide * F.silu(gate)]
        return torch.cat([half.to(gate_up.dtype) for half in halves], dim=-1)
