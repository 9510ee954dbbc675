"""The CUDA library ``megapre/_cuda.so``: plain C functions of raw pointers and a stream, called through ctypes.

Compiled by nvcc without torch's headers. Every kernel runs on the CPU under the SIMT tier (``csrc/simt``), where the
tests verify it, and is held to static budgets; none has yet been executed on a GPU. Types: fp32, bf16 and fp16;
other types, and tensors that are not contiguous where they must be, raise ValueError.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the element types in the C interface (``csrc/cuda/common.cuh``)."""

_P, _I, _F, _D, _L, _U = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_double, ctypes.c_int64, ctypes.c_uint32,
)  # fmt: skip
SIGNATURES = {
    "megapre_norm_forward": [*[_P] * 8, _L, _L, _F, _I, _I, _I, _P],
    "megapre_norm_backward": [*[_P] * 10, _L, _L, _L, _I, _I, _I, _P],
    "megapre_rope": [*[_P] * 6, *[_L] * 8, _I, _I, _I, _P],
    "megapre_swiglu": [_P, _P, _P, _L, _L, _I, _P],
    "megapre_cross_entropy_statistics": [_P, _P, _P, _L, _L, _L, _L, _I, _P],
    "megapre_cross_entropy_gradient": [*[_P] * 4, *[_L] * 4, _F, _F, _F, _I, _P],
    "megapre_cross_entropy_fused": [*[_P] * 4, *[_L] * 4, _F, _F, _F, _I, _P],
    "megapre_adamw": [*[_P] * 10, _L, *[_D] * 6, _I, _P],
    "megapre_square_sum": [*[_P] * 4, _L, _L, _I, _P],
    "megapre_attention": [*[_P] * 21, _F, _F, _P],
    "megapre_keep_mask": [_P, _P, _P, _L, _L, _L, _U, _U, _U, _U, _P],
}
"""Argument types of every function of the library; the last is the stream."""


def unavailable() -> str:
    """Why the CUDA kernels cannot be called, or ""."""
    if not LIBRARY.exists():
        return "needs megapre/_cuda.so, which is built only where nvcc is found"
    try:
        library()
    except OSError as error:
        return f"needs megapre/_cuda.so, which does not load: {error}"
    except AttributeError as error:
        return f"needs megapre/_cuda.so of this version, to be built again: {error}"
    return ""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises OSError when it does not load, AttributeError when it lacks a function."""
    return declare(ctypes.CDLL(str(LIBRARY)))


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' argument types set."""
    for name, arguments in SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
    return loaded


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, layer: bool, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """LayerNorm or RMSNorm of contiguous x [rows, h], of h = x + residual where there is one.

    Returns y and h like x (h is x itself without a residual), the mean (LayerNorm) and 1/sqrt(...) fp32 [rows].
    """
    y, h = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    _call(
        "megapre_norm_forward", x, residual, weight, None if bias is None else bias.to(weight.dtype), y,
        None if residual is None else h, mean, rstd, *x.shape, eps, layer, _type(x), _type(weight),
    )  # fmt: skip
    return y, h, mean if layer else None, rstd


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, *, grad_h: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (or h; like x), weight and, with a ``mean``, bias (both like weight) of ``norm_forward``.

    ``grad_h`` [rows, h] is the gradient that reaches h past the norm. At most two blocks a multiprocessor,
    one partial row each.
    """
    rows, width = x.shape
    blocks = max(1, min(rows, 2 * multiprocessors(x.device)))
    partial = x.new_empty((1 if mean is None else 2, blocks, width), dtype=torch.float32)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = None if mean is None else torch.empty_like(weight)
    _call(
        "megapre_norm_backward", grad, grad_h, x, weight, mean, rstd, grad_x, partial, grad_weight, grad_bias,
        rows, width, blocks, mean is not None, _type(x), _type(weight),
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, inverse: bool, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q [s, b, hq, d] and k [s, b, hk, d] by fp32 tables [s, b, d/2] in one launch; ``inverse``: the gradient.

    ``inplace`` writes into q and k, which may be views of one fused buffer: safe where nothing else reads them later
    (the gradient needs the tables alone). Raises ValueError when a head or a token does not lie in one piece.
    """
    for name, x in (("q", q), ("k", k)):
        whole = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
        if not whole or (x.shape[0] > 1 and x.shape[1] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
            raise ValueError(f"rope needs {name} with whole heads and evenly spaced tokens, not strides {x.stride()}")
    out = (q, k) if inplace else tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    tokens = q.shape[0] * q.shape[1]
    strides = [x.stride(1) if x.shape[1] > 1 else x.stride(0) for x in (q, k, *out)]
    _call(
        "megapre_rope", q, k, *out, cos.contiguous(), sin.contiguous(), tokens, q.shape[2], k.shape[2], q.shape[3],
        *strides, interleaved, inverse, _type(q),
    )  # fmt: skip
    return out[0], out[1]


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """SwiGLU of contiguous [rows, 2f] -> [rows, f]."""
    out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    _call("megapre_swiglu", None, gate_up, out, *out.shape, _type(gate_up))
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient [rows, 2f] of ``swiglu_forward`` from contiguous grad [rows, f]."""
    out = torch.empty_like(gate_up)
    _call("megapre_swiglu", grad, gate_up, out, *grad.shape, _type(gate_up))
    return out


def cross_entropy_statistics(logits: Tensor, targets: Tensor, valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Max, sum of exp(logit - max), the target's logit and sum of the logits [n] in fp32, of logits [n, v]."""
    out = logits.new_empty((4, logits.shape[0]), dtype=torch.float32)
    shape = (*logits.shape, _rows(logits), valid)
    _call("megapre_cross_entropy_statistics", logits, targets, out, *shape, _type(logits))
    top, total, picked, linear = out.unbind(0)
    return top, total, picked, linear


def cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, valid: int, *,
    smoothing: float = 0.0, vocab: int = 0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Replace logits [n, v] by their gradient; lse and scale (0: ignored) fp32 [n]. Returns the same tensor."""
    shape = (*logits.shape, _rows(logits), valid)
    share = smoothing / (vocab or valid) if smoothing else 0.0
    _call(
        "megapre_cross_entropy_gradient", logits, targets, lse, scale, *shape, smoothing, share, z_loss, _type(logits)
    )
    return logits


def cross_entropy_fused_(
    logits: Tensor, targets: Tensor, scale: Tensor, valid: int, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics and gradient of a whole vocabulary in one read and one write of logits [n, v].

    Returns lse, the target's logit and the sum of the logits (with smoothing; else 0), fp32 [n]. Two passes where a
    row does not fit on the chip (registers: 32768 16-bit or 16384 fp32 logits; else shared memory).
    """
    out = logits.new_zeros((3, logits.shape[0]), dtype=torch.float32)
    share = smoothing / valid if smoothing else 0.0
    code = _call(
        "megapre_cross_entropy_fused", logits, targets, scale, out, *logits.shape, _rows(logits), valid,
        smoothing, share, z_loss, _type(logits), refusal=-1,
    )  # fmt: skip
    if code == -1:
        top, total, picked, linear = cross_entropy_statistics(logits, targets, valid)
        lse = top + total.log()
        cross_entropy_gradient_(logits, targets, lse, scale, valid, smoothing=smoothing, z_loss=z_loss)
        return lse, picked, linear
    lse, picked, linear = out.unbind(0)
    return lse, picked, linear


def adamw_(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor | None, *,
    lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, step: int | Tensor,
    divisor: float | Tensor | None = None, skip: float | Tensor | None = None,
) -> None:  # fmt: skip
    """One AdamW step (arXiv 1711.05101) on flat fp32 shards, ``model`` (bf16 or fp16) getting the new weights.

    lr, step (from 1), divisor of the gradient and skip (not 0: change nothing) may be fp32 0-d tensors: no host wait.
    """
    divisor, skip = (
        torch.full((), x, device=master.device) if isinstance(x, float) else x for x in (divisor, skip)
    )
    numbers = [lr, step, divisor, skip]
    at = [x if isinstance(x, Tensor) else None for x in numbers]
    if any(x is not None and x.dtype != torch.float32 for x in at):
        raise ValueError(f"adamw needs fp32 lr, step, divisor and skip, not {[x.dtype for x in at if x is not None]}")
    constants = master.new_empty(12)
    plain = [0.0 if isinstance(x, Tensor) else float(x) for x in (lr, step)]
    _call(
        "megapre_adamw", master, gradient, exp_avg, exp_avg_sq, model, constants, *at, master.numel(), *plain,
        beta1, beta2, eps, weight_decay, 0 if model is None else _type(model),
    )  # fmt: skip


def square_sum(flat: Tensor, found_inf: Tensor | None = None) -> Tensor:
    """Sum of squares of a flat tensor, fp32 0-d; ``found_inf`` (fp32 0-d) becomes 1 where it is not finite."""
    blocks = 2 * multiprocessors(flat.device)
    partial, out = (flat.new_empty(shape, dtype=torch.float32) for shape in ((blocks,), ()))
    _call("megapre_square_sum", flat, partial, out, found_inf, flat.numel(), blocks, _type(flat))
    return out


def keep_mask(
    key: int, step: int, site: int, positions: Tensor, samples: Tensor, features: int, limit: int
) -> Tensor:
    """Bool [P, B, features] of ``megapre.random.philox.keep_mask`` for one site."""
    kept = torch.empty((positions.numel(), samples.numel(), features), dtype=torch.bool, device=positions.device)
    _call("megapre_keep_mask", kept, positions, samples, *kept.shape, key, step & 0xFFFFFFFF, site, limit)
    return kept


def _type(x: Tensor) -> int:
    if x.dtype not in TYPES:
        raise ValueError(f"the CUDA kernels handle {[str(t) for t in TYPES]}, not {x.dtype}: set precision accordingly")
    return TYPES[x.dtype]


def _rows(logits: Tensor) -> int:
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"cross-entropy needs logits whose rows lie in one piece, not strides {logits.stride()}")
    return logits.stride(0)


def _call(name: str, *arguments: Tensor | int | float | None, refusal: int = 0) -> int:
    raw = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(first.device):
        code: int = getattr(library(), name)(*raw, torch.cuda.current_stream().cuda_stream)
    if code not in (0, refusal):
        raise RuntimeError(f"{name} failed with CUDA error {code}")
    return code
