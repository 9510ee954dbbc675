"""NVIDIA apex, where it is installed: one more version of norms and AdamW. Found at run time, never depended upon.

The project called apex on PyPI is another one, so it is looked for by its attributes. Written against apex' published
interface and tested with a double of it; never run on a GPU here.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from megapre.kernels.optimizer import Scalar


@functools.cache
def missing(module: str, *names: str) -> str:
    """Why ``names`` of an apex ``module`` cannot be used, or ""."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"needs NVIDIA apex with its CUDA extensions (not the apex of PyPI): {error}"
    absent = [name for name in names if not hasattr(found, name)]
    return f"needs NVIDIA apex: the {module} that is installed has no {' and no '.join(absent)}" if absent else ""


def missing_norms() -> str:
    """Why apex' norms cannot be used, or ""."""
    names = ("fused_layer_norm_affine", "fused_rms_norm_affine")
    return missing("apex.normalization.fused_layer_norm", *names) or missing("fused_layer_norm_cuda")


def missing_adam() -> str:
    """Why apex' Adam cannot be used, or ""."""
    return missing("amp_C", "multi_tensor_adam_capturable")


def layer_norm_apex(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [..., h] by apex' ``FusedLayerNorm``."""
    weight = weight.to(x.dtype)
    shift = torch.zeros_like(weight) if bias is None else bias.to(x.dtype)
    return _norms().fused_layer_norm_affine(x, weight, shift, (x.shape[-1],), eps)


def rms_norm_apex(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., h] by apex' ``FusedRMSNorm``."""
    return _norms().fused_rms_norm_affine(x, weight.to(x.dtype), (x.shape[-1],), eps)


def adamw_apex_(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor | None, *, lr: Scalar,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Scalar, divisor: Scalar = 1.0,
    skip: Scalar = 0.0,
) -> None:  # fmt: skip
    """``adamw_reference_`` by the kernel of apex' ``FusedAdam``, then one copy; the gradient is left divided.

    The kernel reads learning rate, step, 1/divisor and its flag on the device: no host wait.
    """

    def number(value: Scalar, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(value, device=master.device).to(dtype).reshape(1)

    skipped = number(skip, torch.int32)
    importlib.import_module("amp_C").multi_tensor_adam_capturable(
        CHUNK, skipped, [[gradient], [master], [exp_avg], [exp_avg_sq]], number(lr), beta1, beta2, eps,
        number(step, torch.int32), DECOUPLED, CORRECTED, weight_decay, number(divisor).reciprocal(),
    )  # fmt: skip
    if model is not None:
        model.copy_(torch.where(skipped != 0, model, master.to(model.dtype)))


CHUNK, DECOUPLED, CORRECTED = 65536, 1, 1
"""apex' elements a block, and its numbers for decoupled decay and bias correction."""


def _norms() -> Any:
    return importlib.import_module("apex.normalization.fused_layer_norm")
