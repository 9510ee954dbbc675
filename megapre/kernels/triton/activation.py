"""SwiGLU, GeGLU, GELU and bias + GELU in Triton; formulas in ``megapre/kernels/activation.py``.

GELU in its tanh form is x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3), one exp2 and one reciprocal, where the
tanh of libdevice takes a hundred instructions. Every pass reads its inputs and writes its outputs once: an element of
2 bytes of the output costs 6 B forward and 10 B backward for the gated ones, 4 B and 6 B for GELU.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapre.kernels.triton import launch

BLOCK = 4096
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ROOT: tl.constexpr = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):
    # 1 / y as rsqrt(y)^2: a division guards against denormals with four more instructions, and y is at least 1.
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def _gate(x, GELU: tl.constexpr):
    """The sigmoid that x is multiplied with: of x itself, or of 2u."""
    if GELU:
        x *= 2.0 * ROOT + (2.0 * ROOT * CUBIC) * x * x
    return _sigmoid(x)


@triton.jit
def _slope(x, sigmoid, GELU: tl.constexpr):
    """d (x sigmoid) / dx."""
    rise = x * sigmoid * (1.0 - sigmoid)
    if GELU:
        rise *= 2.0 * ROOT + (6.0 * ROOT * CUBIC) * x * x
    return sigmoid + rise


@triton.jit
def _gated_forward(gate_up, out, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    skip = row * width
    gate_up += 2 * skip
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + skip + column, (gate * _gate(gate, GELU) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(grad, gate_up, out, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    skip = row * width
    gate_up += 2 * skip
    out += 2 * skip
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + width + column, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(grad + skip + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _gate(gate, GELU)
    tl.store(out + width + column, (above * gate * sigmoid).to(out.dtype.element_ty), mask=inside)
    tl.store(out + column, (above * up * _slope(gate, sigmoid, GELU)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_forward(x, bias, out, width, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        wide += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (wide * _gate(wide, True)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(grad, x, bias, out, partial, rows, width, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows of a block of columns, with the bias's gradient over them."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(program, rows, programs):
        row = tl.cast(index, tl.int64)
        wide = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            wide += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        below = above * _slope(wide, _gate(wide, True), True)
        tl.store(out + row * width + column, below.to(out.dtype.element_ty), mask=inside)
        total += below
    if BIAS:
        tl.store(partial + program * width + column, total, mask=inside)


def gated_forward(gate_up: Tensor, gelu: bool) -> Tensor:
    """SwiGLU, or GeGLU, of contiguous [rows, 2f] -> [rows, f]."""
    launch.check("activation", gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    if out.numel():
        block, grid = _tiles(rows, width)
        with launch.on(out):
            _gated_forward[grid](gate_up, out, width, GELU=gelu, BLOCK=block, num_warps=launch.warps(block))
    return out


def gated_backward(grad: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    """Gradient of contiguous gate_up [rows, 2f] from that of the output [rows, f]."""
    rows, width = grad.shape
    out = torch.empty_like(gate_up)
    if out.numel():
        block, grid = _tiles(rows, width, BLOCK // 2)
        with launch.on(out):
            _gated_backward[grid](grad, gate_up, out, width, GELU=gelu, BLOCK=block, num_warps=launch.warps(block, 8))
    return out


def gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x + bias) of contiguous x [rows, f]."""
    launch.check("activation", x, bias)
    out = torch.empty_like(x)
    if out.numel():
        block, grid = _tiles(*x.shape)
        with launch.on(x):
            _gelu_forward[grid](
                x, x if bias is None else bias, out, x.shape[1], BIAS=bias is not None, BLOCK=block,
                num_warps=launch.warps(block),
            )  # fmt: skip
    return out


def gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of contiguous x [rows, f] and, fp32 [f], of the bias."""
    rows, width = x.shape
    out = torch.empty_like(x)
    if not out.numel():
        return out, None if bias is None else x.new_zeros(width, dtype=torch.float32)
    block = min(2048, max(16, launch.power_of_two(width)))
    tiles = triton.cdiv(width, block)
    programs = rows if bias is None else min(rows, max(1, triton.cdiv(4 * launch.residents(x), tiles)))
    partial = x.new_empty((1, programs if bias is not None else 0, width), dtype=torch.float32)
    with launch.on(x):
        _gelu_backward[(tiles, programs)](
            grad, x, x if bias is None else bias, out, partial, rows, width, BIAS=bias is not None, BLOCK=block,
            num_warps=launch.warps(block),
        )  # fmt: skip
    return out, None if bias is None else launch.column_sum(partial)[0]


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """SwiGLU [..., 2f] -> [..., f] in Triton; CUDA, fp32, bf16 or fp16."""
    return _Gated.apply(gate_up, False)


def geglu_triton(gate_up: Tensor) -> Tensor:
    """GeGLU [..., 2f] -> [..., f] in Triton; CUDA, fp32, bf16 or fp16."""
    return _Gated.apply(gate_up, True)


def gelu_triton(x: Tensor) -> Tensor:
    """GELU of any shape in Triton; CUDA, fp32, bf16 or fp16."""
    return _Gelu.apply(x, None)


def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) for x [..., f], bias [f] in Triton; CUDA, fp32, bf16 or fp16."""
    return _Gelu.apply(x, bias)


def _tiles(rows: int, width: int, most: int = BLOCK) -> tuple[int, tuple[int, int]]:
    block = min(most, max(16, launch.power_of_two(width)))
    return block, (rows, triton.cdiv(width, block))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, gelu):
        rows = launch.flat_rows(gate_up)
        ctx.save_for_backward(rows)
        ctx.gelu, ctx.shape = gelu, gate_up.shape
        return gated_forward(rows, gelu).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return gated_backward(launch.flat_rows(grad), rows, ctx.gelu).view(ctx.shape), None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        rows = launch.flat_rows(x)
        ctx.save_for_backward(rows, bias)
        return gelu_forward(rows, bias).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, bias = ctx.saved_tensors
        dx, dbias = gelu_backward(launch.flat_rows(grad), rows, bias)
        return dx.view(grad.shape), None if bias is None else dbias.to(bias.dtype)
