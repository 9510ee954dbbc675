"""Local parts of the vocabulary-parallel cross-entropy; the exchange between them is in ``megapre/parallel``.

A rank holds logits [n, v], columns of the vocabulary of which the first ``valid`` are real. With m = max_j l_j and
s = sum_j exp(l_j - m) over all ranks, lse = m + log(s), loss = lse - l_target and
d loss / d l_j = exp(l_j - lse) - [j = target].
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Logits widened to fp32 at a time: the reference never makes an fp32 copy of all of them."""


def statistics_reference(logits: Tensor, targets: Tensor, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row statistics of logits [n, v] for local targets int64 [n]; a target outside [0, valid) is not ours.

    Returns max [n] over real columns (-inf when there are none), sum of exp(logit - max) [n], and the target's logit
    [n] (0 where not ours), in fp32 (fp64 for fp64 logits).
    """
    kept = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    maximum, total, picked = (torch.zeros(rows, dtype=kept, device=logits.device) for _ in range(3))
    if valid == 0:
        return maximum.fill_(-torch.inf), total, picked
    for piece in _pieces(rows, logits.shape[1]):
        wide = logits[piece, :valid].to(kept)
        top = wide.amax(1)
        maximum[piece] = top
        # A row of -inf alone has no largest finite logit to subtract; its sum is 0, not NaN.
        total[piece] = torch.exp(wide - torch.where(top == -torch.inf, 0.0, top).unsqueeze(1)).sum(1)
        ours, column = _ours(targets[piece], valid)
        picked[piece] = torch.where(ours, wide.gather(1, column.unsqueeze(1)).squeeze(1), 0.0)
    return maximum, total, picked


def gradient_reference_(logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, valid: int) -> Tensor:
    """Replace logits [n, v] by (exp(logit - lse) - onehot) x scale, pad columns by 0; lse and scale are [n].

    lse and scale: fp32 (fp64 for fp64 logits). Returns the same tensor.
    """
    for piece in _pieces(*logits.shape):
        probability = torch.exp(logits[piece, :valid].to(lse.dtype) - lse[piece].unsqueeze(1))
        if valid:
            ours, column = _ours(targets[piece], valid)
            probability.scatter_add_(1, column.unsqueeze(1), -ours.to(lse.dtype).unsqueeze(1))
        logits[piece, :valid] = (probability * scale[piece].unsqueeze(1)).to(logits.dtype)
    logits[:, valid:] = 0
    return logits


def statistics_cpp(logits: Tensor, targets: Tensor, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """``statistics_reference`` in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    maximum, total, picked = torch.ops.megapre.cross_entropy_statistics(rows, targets, valid).unbind(0)
    return maximum, total, picked


def gradient_cpp_(logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, valid: int) -> Tensor:
    """``gradient_reference_`` in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    torch.ops.megapre.cross_entropy_gradient_(rows, targets, lse, scale, valid)
    return logits if rows is logits else logits.copy_(rows)


def _pieces(rows: int, columns: int) -> list[slice]:
    height = max(1, CHUNK // max(1, columns))
    return [slice(start, start + height) for start in range(0, rows, height)]


def _ours(targets: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    return (targets >= 0) & (targets < valid), targets.clamp(0, valid - 1)
