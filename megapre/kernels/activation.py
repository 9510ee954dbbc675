"""GELU in its tanh form (arXiv 1606.08415) and SwiGLU (arXiv 2002.05202).

gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); swiglu([gate, up]) = gate sigmoid(gate) up.
Computed in fp32 (fp64 for fp64 input), returned in the type of the input. Every version saves its input alone.
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


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f], as the formula is written; the gate is the first half."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def gelu_torch(x: Tensor) -> Tensor:
    """GELU by ``torch.nn.functional.gelu``."""
    return F.gelu(x, approximate="tanh")


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f] by torch's silu, with silu computed again in the backward pass."""
    return _SwiGLU.apply(gate_up)


def gelu_cpp(x: Tensor) -> Tensor:
    """GELU in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _GeluCpp.apply(x)


def swiglu_cpp(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f] in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    return _SwiGLUCpp.apply(gate_up)


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
        rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        ctx.save_for_backward(rows)
        ctx.shape = gate_up.shape
        return torch.ops.megapre.swiglu_forward(rows).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        (rows,) = ctx.saved_tensors
        flat = grad.reshape(rows.shape[0], rows.shape[1] // 2).contiguous()
        return torch.ops.megapre.swiglu_backward(flat, rows).view(ctx.shape)


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
