"""Local parts of the vocabulary-parallel cross-entropy; the exchange between them is in ``megapre/parallel``.

A rank holds logits [n, v], columns of the vocabulary of which the first ``valid`` are real. With m = max_j l_j and
e = sum_j exp(l_j - m) over all ranks, lse = m + log(e), and for V real columns over all ranks, smoothing s
(arXiv 1512.00567) and z-loss z (arXiv 2204.02311)

    loss = lse - (1 - s) l_target - s/V sum_j l_j + z lse^2
    d loss / d l_j = exp(l_j - lse) (1 + 2 z lse) - (1 - s) [j = target] - s/V.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Logits widened to fp32 at a time: the reference never makes an fp32 copy of all of them."""

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def statistics_reference(logits: Tensor, targets: Tensor, valid: int) -> Statistics:
    """Row statistics of logits [n, v] for local targets int64 [n]; a target outside [0, valid) is not ours.

    Returns max [n] over real columns (-inf when there are none), sum of exp(logit - max) [n], the target's logit
    [n] (0 where not ours) and the sum of the real logits [n], in fp32 (fp64 for fp64 logits).
    """
    kept = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    maximum, total, picked, level = (torch.zeros(rows, dtype=kept, device=logits.device) for _ in range(4))
    if valid == 0:
        return maximum.fill_(-torch.inf), total, picked, level
    for piece in _pieces(rows, logits.shape[1]):
        wide = logits[piece, :valid].to(kept)
        top = wide.amax(1)
        maximum[piece] = top
        # A row of -inf alone has no largest finite logit to subtract; its sum is 0, not NaN.
        total[piece] = torch.exp(wide - torch.where(top == -torch.inf, 0.0, top).unsqueeze(1)).sum(1)
        ours, column = _ours(targets[piece], valid)
        picked[piece] = torch.where(ours, wide.gather(1, column.unsqueeze(1)).squeeze(1), 0.0)
        level[piece] = wide.sum(1)
    return maximum, total, picked, level


def gradient_reference_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: Tensor,
    valid: int,
    *,
    smoothing: float = 0.0,
    vocab: int = 0,
    z_loss: float = 0.0,
) -> Tensor:
    """Replace logits [n, v] by their loss's gradient x scale, pad columns by 0; lse and scale are [n].

    lse and scale: fp32 (fp64 for fp64 logits); a row of scale 0 (an ignored target) becomes exact zeros whatever it
    holds. ``vocab``: real columns over all ranks, needed with ``smoothing``. Returns the same tensor. Raises
    ValueError for smoothing without a vocabulary.
    """
    share = check_smoothing(smoothing, vocab)
    for piece in _pieces(*logits.shape):
        slope = 1.0 + 2.0 * z_loss * lse[piece]
        change = torch.exp(logits[piece, :valid].to(lse.dtype) - lse[piece].unsqueeze(1)) * slope.unsqueeze(1) - share
        if valid:
            ours, column = _ours(targets[piece], valid)
            change.scatter_add_(1, column.unsqueeze(1), (smoothing - 1.0) * ours.to(lse.dtype).unsqueeze(1))
        factor = scale[piece].unsqueeze(1)
        logits[piece, :valid] = torch.where(factor == 0, 0.0, change * factor).to(logits.dtype)
    logits[:, valid:] = 0
    return logits


def check_smoothing(smoothing: float, vocab: int) -> float:
    """smoothing / vocab. Raises ValueError when smoothing is not in [0, 1) or there is no vocabulary to share it."""
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label smoothing {smoothing} must be in [0, 1)")
    if smoothing and vocab < 1:
        raise ValueError(f"label smoothing {smoothing} needs the number of real vocabulary entries, not {vocab}")
    return smoothing / vocab if smoothing else 0.0


def losses(
    lse: Tensor, target: Tensor, level: Tensor, *, smoothing: float = 0.0, vocab: int = 0, z_loss: float = 0.0
) -> Tensor:
    """Row losses [n] from the statistics of all ranks; ``level`` is the sum of the real logits."""
    share = check_smoothing(smoothing, vocab)
    loss = lse - (1.0 - smoothing) * target
    if share:  # a masked logit of -inf would turn 0 x -inf into NaN
        loss = loss - share * level
    return loss + z_loss * lse.square() if z_loss else loss


def statistics_cpp(logits: Tensor, targets: Tensor, valid: int) -> Statistics:
    """``statistics_reference`` in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    maximum, total, picked, level = torch.ops.megapre.cross_entropy_statistics(rows, targets, valid).unbind(0)
    return maximum, total, picked, level


def gradient_cpp_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: Tensor,
    valid: int,
    *,
    smoothing: float = 0.0,
    vocab: int = 0,
    z_loss: float = 0.0,
) -> Tensor:
    """``gradient_reference_`` in C++ (``csrc/cpu/kernels.cpp``); CPU, fp32 or bf16."""
    check_smoothing(smoothing, vocab)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    torch.ops.megapre.cross_entropy_gradient_(rows, targets, lse, scale, valid, smoothing, vocab, z_loss)
    return logits if rows is logits else logits.copy_(rows)


def _pieces(rows: int, columns: int) -> list[slice]:
    height = max(1, CHUNK // max(1, columns))
    return [slice(start, start + height) for start in range(0, rows, height)]


def _ours(targets: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    return (targets >= 0) & (targets < valid), targets.clamp(0, valid - 1)
