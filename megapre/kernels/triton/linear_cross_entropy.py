"""The output layer and its cross-entropy by chunks, local parts in Triton, products by torch (cuBLAS).

The contract is that of ``megapre/kernels/linear_cross_entropy.py``. On a rank that holds the whole vocabulary a chunk's
statistics and gradient are one launch. A chunk has ``GPU_ROWS`` rows: W is read twice and dW read and written once a
chunk, 14 GB in all at 8192 rows of 4096 features and 128,256 entries, where chunks of 256 rows take 148.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapre.kernels import cross_entropy as local
from megapre.kernels import linear_cross_entropy as whole
from megapre.kernels.linear_cross_entropy import Exchange, alone
from megapre.kernels.triton.cross_entropy import gradient_triton_, statistics_triton, whole_triton_


def linear_ce_triton(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    valid: int,
    *,
    main_grad: Tensor | None,
    exchange: Exchange = alone,
    smoothing: float = 0.0,
    vocab: int = 0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Row losses [n] and the gradient of x [n, h]; that of the weight is added to ``main_grad`` fp32 [v, h]."""
    whole.check(x, weight, targets, scale, valid, main_grad)
    options = {"smoothing": smoothing, "vocab": vocab, "z_loss": z_loss}
    local.check_smoothing(smoothing, vocab)
    x, weight = x.detach(), weight.detach()  # products into given memory are not for autograd
    n = x.shape[0]
    losses = torch.empty(n, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if main_grad is not None else x[:0]
    buffer = x.new_empty((min(whole.GPU_ROWS, n), weight.shape[0]))
    at_once = exchange is alone and main_grad is not None and vocab in (0, valid)
    for start in range(0, n, whole.GPU_ROWS):
        piece = slice(start, min(start + whole.GPU_ROWS, n))
        logits = buffer[: piece.stop - start]
        torch.mm(x[piece], weight.t(), out=logits)
        if at_once:
            lse, target, level = whole_triton_(
                logits, targets[piece], scale[piece], valid, smoothing=smoothing, z_loss=z_loss
            )
        else:
            lse, target, level = exchange(*statistics_triton(logits, targets[piece], valid))
            if main_grad is not None:
                gradient_triton_(logits, targets[piece], lse, scale[piece], valid, **options)  # type: ignore[arg-type]
        found = local.losses(lse, target, level, **options)  # type: ignore[arg-type]
        losses[piece] = torch.where(scale[piece] == 0, 0.0, found)
        if main_grad is not None:
            whole.add_products(dx[piece], main_grad, [(weight, logits)], x[piece], Tensor.add_)
    return losses, dx
