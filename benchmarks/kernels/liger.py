"""Liger-Kernel's Triton kernels as cases of ``triton_static``: its functions as they are, at the shapes of our cases.

``pip install --no-deps liger-kernel==0.8.5`` where the benchmark runs; without it the table has no peer's column.
"""
# mypy: ignore-errors

from __future__ import annotations

import importlib.util

import torch
from torch import zeros

HALF = torch.bfloat16


def missing() -> str:
    """Why there is nothing to compare with, or ""."""
    return "" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def calls() -> dict[str, tuple]:
    """Our case's name -> (call, elements of a program or of a turn of its loops, whether loops alone count)."""
    return {**_norms(), **_losses(), **_gated(), **_rotations()}


def _norms() -> dict[str, tuple]:
    from liger_kernel.ops import fused_add_rms_norm as added
    from liger_kernel.ops import layer_norm, rms_norm

    x, w, s = zeros(4096, 4096, dtype=HALF), zeros(4096, dtype=HALF), zeros(4096)
    rms = (x, w, s, 0.0, 0, 4096, 8)
    return {
        "RMSNorm forward": (lambda: rms_norm.rms_norm_forward(x, w, 1e-5, 0.0, "llama", None), 4096, False),
        "RMSNorm backward": (lambda: rms_norm.rms_norm_backward(x, *rms, False, None), 4096, True),
        "RMSNorm + residual forward": (
            lambda: added.fused_add_rms_norm_forward(x, x, w, 1e-5, 0.0, "llama"), 4096, False),
        "RMSNorm + residual backward": (
            lambda: added.fused_add_rms_norm_backward(x, x, *rms, 3, False), 4096, True),
        "LayerNorm forward": (lambda: layer_norm.layer_norm_forward(x, w, w, 1e-5), 4096, False),
        "LayerNorm backward": (lambda: layer_norm.layer_norm_backward(x, x, w, w, s, s), 4096, True),
    }  # fmt: skip


def _losses() -> dict[str, tuple]:
    from liger_kernel.ops import cross_entropy

    def call(columns: int) -> tuple:
        logits = zeros(4, columns, dtype=HALF).requires_grad_()
        targets = zeros(4, dtype=torch.int64)
        plain = (None, -100, 0.0, 0.0, "mean", None, False)
        return lambda: cross_entropy.cross_entropy_forward(logits, targets, *plain), 32768, True

    return {f"cross-entropy, whole, {columns}": call(columns) for columns in (32000, 50304)}


def _gated() -> dict[str, tuple]:
    from liger_kernel.ops import geglu, swiglu

    a, found = zeros(8, 14336, dtype=HALF), {}
    for name, module in (("SwiGLU", swiglu), ("GeGLU", geglu)):
        there, back = (getattr(module, f"{name.lower()}_{way}") for way in ("forward", "backward"))
        found[f"{name} forward"] = (lambda there=there: there(a, a), 14336, False)
        found[f"{name} backward"] = (lambda back=back: back(a, a, a), 14336, False)
    return found


def _rotations() -> dict[str, tuple]:
    from liger_kernel.ops import rope

    def call(heads: int, keys: int, dim: int) -> tuple:
        q, k, t = zeros(2, heads, 8, dim, dtype=HALF), zeros(2, keys, 8, dim, dtype=HALF), zeros(1, 8, dim)
        return lambda: rope.rope_forward(q, k, t, t), (heads + keys) * dim, False

    return {f"RoPE q, k, d = {dim}": call(heads, keys, dim) for heads, keys, dim in ((32, 8, 128), (16, 16, 64))}
