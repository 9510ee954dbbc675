"""The CUDA library ``megapre/_cuda.so``: plain C functions of raw pointers and a stream, called through ctypes.

Compiled by nvcc without torch's headers and tested as far as that goes; not yet executed on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"


def unavailable() -> str:
    """Why the CUDA kernels cannot be called, or ""."""
    if not LIBRARY.exists():
        return "needs megapre/_cuda.so, which is built only where nvcc is found"
    try:
        library()
    except OSError as error:
        return f"needs megapre/_cuda.so, which does not load: {error}"
    return ""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises OSError when it does not load."""
    loaded = ctypes.CDLL(str(LIBRARY))
    p, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    u = ctypes.c_uint32
    loaded.megapre_rms_norm_forward.argtypes = [p, p, p, p, i, i, f, i, p]
    loaded.megapre_rms_norm_backward.argtypes = [p, p, p, p, p, p, p, i, i, i, i, p]
    loaded.megapre_keep_mask.argtypes = [p, p, p, i, i, i, u, u, u, u, p]
    return loaded


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of contiguous x [rows, h] (fp32 or bf16): y like x, and 1/rms fp32 [rows]."""
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    wide = weight.float().contiguous()
    _call("megapre_rms_norm_forward", x, wide, y, rstd, *x.shape, eps, int(x.dtype == torch.bfloat16))
    return y, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (like x) and of the weight (fp32 [h]) from grad, x [rows, h] and 1/rms [rows]."""
    blocks = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    grad_x, partial = torch.empty_like(x), x.new_empty((blocks, x.shape[1]), dtype=torch.float32)
    grad_weight = x.new_empty(x.shape[1], dtype=torch.float32)
    wide, half = weight.float().contiguous(), int(x.dtype == torch.bfloat16)
    _call("megapre_rms_norm_backward", grad, x, wide, rstd, grad_x, partial, grad_weight, *x.shape, blocks, half)
    return grad_x, grad_weight


def keep_mask(
    key: int, step: int, site: int, positions: Tensor, samples: Tensor, features: int, limit: int
) -> Tensor:
    """Bool [P, B, features] of ``megapre.random.philox.keep_mask`` for one site."""
    kept = torch.empty((positions.numel(), samples.numel(), features), dtype=torch.bool, device=positions.device)
    _call("megapre_keep_mask", kept, positions, samples, *kept.shape, key, step & 0xFFFFFFFF, site, limit)
    return kept


def _call(name: str, *arguments: Tensor | int | float) -> None:
    raw = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(first.device):
        code = getattr(library(), name)(*raw, torch.cuda.current_stream().cuda_stream)
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")
