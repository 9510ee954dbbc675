"""AdamW (arXiv 1711.05101) over flat shards, and the sum of squares behind clipping and the overflow check.

g = gradient / divisor; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
w = w (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps); the model's copy of w is written in the same
pass. Nothing is read on the host: lr, step, divisor and skip may be 0-d tensors on the device. A non-finite
``square_sum`` of the gradients is the overflow check, and its root the norm that clipping reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = Tensor | float


def adamw_reference_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model: Tensor | None,
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Scalar,
    divisor: Scalar = 1.0,
    skip: Scalar = 0.0,
) -> None:
    """Update flat fp32 (or fp64) ``master``, ``exp_avg`` and ``exp_avg_sq`` [n]; nothing changes where skip is 1.

    ``model``: the same weights in the model's type, or None where they are ``master`` itself. ``step`` counts from 1
    and includes this update. ``divisor``: loss scale x clip factor. ``gradient`` is only read. Raises ValueError for
    lengths that differ.
    """
    check(master, gradient, exp_avg, exp_avg_sq, model)
    wide, device = master.dtype, master.device
    rate, count, scale = (torch.as_tensor(s, dtype=wide, device=device) for s in (lr, step, divisor))
    kept = torch.as_tensor(skip, device=device) != 0
    g = gradient.to(wide) / scale
    m = beta1 * exp_avg + (1.0 - beta1) * g
    v = beta2 * exp_avg_sq + (1.0 - beta2) * g * g
    corrected = torch.sqrt(v / (1.0 - beta2**count)) + eps
    w = master * (1.0 - rate * weight_decay) - rate * (m / (1.0 - beta1**count)) / corrected
    for old, new in ((master, w), (exp_avg, m), (exp_avg_sq, v)):
        old.copy_(torch.where(kept, old, new))
    if model is not None:
        model.copy_(torch.where(kept, model, master.to(model.dtype)))


def adamw_torch_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model: Tensor | None,
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Scalar,
    divisor: Scalar = 1.0,
    skip: Scalar = 0.0,
) -> None:
    """``adamw_reference_`` by torch's fused AdamW, then one copy. The gradient is left divided by ``divisor``."""
    check(master, gradient, exp_avg, exp_avg_sq, model)
    count, scale, found = (
        torch.as_tensor(s, dtype=torch.float32, device=master.device) for s in (step, divisor, skip)
    )
    torch._fused_adamw_(
        [master], [gradient], [exp_avg], [exp_avg_sq], [], [count], lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, grad_scale=scale, found_inf=found,
    )  # fmt: skip
    if model is not None:
        model.copy_(torch.where(found != 0, model, master.to(model.dtype)))


def adamw_cpp_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model: Tensor | None,
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Scalar,
    divisor: Scalar = 1.0,
    skip: Scalar = 0.0,
) -> None:
    """``adamw_reference_`` in one C++ pass; CPU, fp32 shards, a copy in fp32 or bf16."""
    check(master, gradient, exp_avg, exp_avg_sq, model)
    rate, count, scale, kept = (torch.as_tensor(s) for s in (lr, step, divisor, skip))
    torch.ops.megapre.adamw_(
        master, gradient, exp_avg, exp_avg_sq, model, rate, beta1, beta2, eps, weight_decay, count, scale, kept
    )


def square_sum_cpp(flat: Tensor) -> Tensor:
    """``square_sum_reference`` in C++; CPU, fp32 or bf16. Summed in fp64: the same bits for any number of threads."""
    return torch.ops.megapre.square_sum(flat)


def square_sum_reference(flat: Tensor) -> Tensor:
    """Sum of the squares of all elements: 0-d, fp32 (fp64 for fp64); non-finite when an element is."""
    return (flat if flat.dtype == torch.float64 else flat.float()).square().sum()


def square_sum_torch(flat: Tensor) -> Tensor:
    """``square_sum_reference`` by torch's norm, without a temporary of squares."""
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(flat, dtype=wide).square()


def check(master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor | None) -> None:
    """Raises ValueError in one sentence for lengths that differ."""
    tensors = [master, gradient, exp_avg, exp_avg_sq, *([] if model is None else [model])]
    if len({tuple(t.shape) for t in tensors}) > 1:
        raise ValueError(f"adamw: all shards must be of one length, not {[list(t.shape) for t in tensors]}")
