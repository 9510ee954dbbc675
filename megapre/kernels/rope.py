"""Rotary positions (arXiv 2104.09864), half-split as in Llama: feature i turns with feature i + dim/2.

(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) with angle = position x theta^(-2i/dim).
"""

from __future__ import annotations

import torch
from torch import Tensor


def tables(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [seq, batch, dim/2] of int64 ``positions`` [seq, batch] for a model of type ``dtype``.

    The angles are fp64: a bf16 position or frequency is already off by radians at position 1000. The tables are fp32,
    or fp64 when ``dtype`` is. Raises ValueError when ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"RoPE needs an even head dimension, not {dim}: change model.hidden or model.heads")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.double().unsqueeze(-1) * theta ** (-exponents)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(kept), angles.sin().to(kept)


def apply_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [seq, batch, heads, dim] by tables [seq, batch, dim/2]; computed in the tables' type."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
