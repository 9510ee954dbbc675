"""The CUDA kernels as differentiable functions, with the signatures of the op files (``norm.py``, ``rope.py``, ...).

Formulas stand in those files. Not yet executed on a GPU; value and gradients are verified under the SIMT tier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapre.kernels import cuda
from megapre.kernels import linear_cross_entropy as whole


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [..., h]."""
    return _Norm.apply(x, None, weight, bias, eps, True)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., h]."""
    return _Norm.apply(x, None, weight, None, eps, False)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(h), h) of h = x + residual [..., h], in one pass."""
    return _Norm.apply(x, residual, weight, bias, eps, True)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h), h) of h = x + residual [..., h], in one pass."""
    return _Norm.apply(x, residual, weight, None, eps, False)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q [s, b, hq, d] and k [s, b, hk, d] by fp32 tables [s, b, d/2] in one launch.

    ``in_place``: in their own memory, and backward in that of their gradients; the caller promises that nothing else
    reads the four.
    """
    return _Rope.apply(q, k, cos, sin, interleaved, in_place)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x [s, b, heads, d] by fp32 tables [s, b, d/2]."""
    return _Rope.apply(x, x[:, :, :0], cos, sin, interleaved, False)[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f]."""
    return _SwiGLU.apply(gate_up)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, valid: int, *, main_grad: Tensor | None,
    exchange: whole.Exchange = whole.alone, **options: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Row losses [n] and the gradient of x [n, h]; that of the weight is added to ``main_grad`` fp32 [v, h].

    Products by cuBLAS, chunk by chunk; a whole vocabulary's statistics and gradient are one kernel.
    """
    parts = (cuda.cross_entropy_statistics, cuda.cross_entropy_gradient_)
    return whole.chunked(
        *parts, x, weight, targets, scale, valid, main_grad, exchange, options, whole_=cuda.cross_entropy_fused_
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _Norm(torch.autograd.Function):
    """Saves h and one or two numbers a row."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, layer):  # type: ignore[no-untyped-def]
        more = None if residual is None else _rows(residual)
        y, h, mean, rstd = cuda.norm_forward(_rows(x), weight.contiguous(), bias, eps, layer=layer, residual=more)
        ctx.save_for_backward(h, weight, mean, rstd)
        ctx.residual, ctx.bias_dtype = residual is not None, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y.view(x.shape), h.view(x.shape) if residual is not None else None

    @staticmethod
    def backward(ctx, grad, grad_h):  # type: ignore[no-untyped-def]
        h, weight, mean, rstd = ctx.saved_tensors
        shape = (grad if grad is not None else grad_h).shape
        grad = torch.zeros_like(h) if grad is None else _rows(grad)
        grad_h = None if grad_h is None else _rows(grad_h)
        grad_x, grad_weight, grad_bias = cuda.norm_backward(grad, h, weight.contiguous(), mean, rstd, grad_h=grad_h)
        grad_x = grad_x.view(shape)
        grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_x if ctx.residual else None, grad_weight, grad_bias, None, None


class _Rope(torch.autograd.Function):
    """Saves the tables; the gradient is turned back by the same kernel."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved, in_place):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.in_place = interleaved, in_place
        q, k = cuda.rope(_heads(q), _heads(k), cos, sin, interleaved=interleaved, inverse=False, inplace=in_place)
        # Aliases of the inputs, not the inputs: the promise above stands in for autograd's version counter.
        return q.detach(), k.detach()

    @staticmethod
    def backward(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
        turned = cuda.rope(
            _heads(grad_q), _heads(grad_k), *ctx.saved_tensors, interleaved=ctx.interleaved, inverse=True,
            inplace=ctx.in_place,
        )  # fmt: skip
        return *turned, None, None, None, None


def _heads(x: Tensor) -> Tensor:
    """x [s, b, heads, d] as the kernel reads it: whole heads, evenly spaced tokens."""
    s, b, heads, d = x.shape
    whole = x.stride(3) == 1 and (heads == 1 or x.stride(2) == d)
    return x if whole and (s == 1 or b == 1 or x.stride(0) == b * x.stride(1)) else x.contiguous()


class _SwiGLU(torch.autograd.Function):
    """Saves its input alone."""

    @staticmethod
    def forward(ctx, gate_up):  # type: ignore[no-untyped-def]
        rows = _rows(gate_up)
        ctx.save_for_backward(rows)
        return cuda.swiglu_forward(rows).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        return cuda.swiglu_backward(_rows(grad), rows).view(*grad.shape[:-1], rows.shape[-1])
