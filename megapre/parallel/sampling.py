"""Drawing tokens from the softmax of an output layer whose vocabulary is sharded (ELECTRA's generator)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.parallel.comm import Axis
from megapre.parallel.tensor import Linear, gather

ELEMENTS = 1 << 22
"""Logits of this rank that exist at once."""


@torch.no_grad()
def sample(output: Linear, x: Tensor, uniforms: Tensor, vocab_size: int) -> Tensor:
    """Ids int64 [seq, batch]: the first of ``vocab_size`` tokens whose cumulative probability exceeds the number.

    ``x`` [seq or seq/t, batch, features]; ``uniforms`` fp64 [seq, batch] in [0, 1), equal on every tensor rank, as the
    ids are. One number a token, whatever the vocabulary, makes the draw independent of how this is cut (Gumbel's needs
    one for each logit); cumulative sums in fp64 do not swallow rare tokens. No gradient passes.
    """
    axis, width = output.axis, output.weight.shape[0]
    rows = (gather(x, axis) if output.sequence else x).flatten(0, -2)
    valid = max(0, min(width, vocab_size - axis.rank * width))
    ids = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    step = max(1, ELEMENTS // width)
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        logits = F.linear(rows[piece], output.weight, output.bias)
        logits[:, valid:] = -torch.inf
        ids[piece] = _first_above(logits, uniforms.flatten()[piece], axis)
    return ids.clamp_(max=vocab_size - 1).view(uniforms.shape)


def _first_above(logits: Tensor, uniforms: Tensor, axis: Axis) -> Tensor:
    """Columns, over all ranks, whose cumulative probability is at most the row's uniform number: [rows]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.amax(-1).to(wide)
    axis.all_reduce(largest, "max").wait()
    sums = (logits.to(wide) - largest.unsqueeze(-1)).exp_().cumsum(-1, dtype=torch.float64)
    totals = gather(sums[:, -1].unsqueeze(0), axis)  # [ranks, rows]
    ends = totals.cumsum(0)
    before = ends[axis.rank] - totals[axis.rank]
    count = (sums <= (uniforms * ends[-1] - before).unsqueeze(-1)).sum(-1)
    axis.all_reduce(count).wait()
    return count
