"""Attention whose scores know how far a key is from its query, as Transformer-XL and XLNet have it.

p_ij = softmax over visible j of scale (q_i . k_j + a_i . r_(j - i) + [segments of i and j differ] g_i): a is the query
with another bias than q has, r one key for each distance and head (arXiv 1901.02860, equation 5), g what a key in
another segment of text adds (arXiv 1906.08237, section 2.5; a key in the same segment adds a number that is the same
for all keys of a query, which a softmax takes out). Masks, grouped heads and dropout are those of ``attention.py``.

The term of distances depends on the query, so it is no bias by distance: no version of ``attention`` can add it. Here
it is one product of [rows, d] by [rows + keys, d] for every block of rows, whose rows are then shifted.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.kernels.attention import (
    AttentionDropout,
    Halves,
    Problem,
    backward_of,
    delta_of,
    grouped,
    narrow,
    problem_of,
    scores_of,
    weighted,
)
from megapre.kernels.mask import Mask

ROWS = 128
"""Queries whose scores exist at one time."""


def relative_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asking: Tensor,
    keys: Tensor,
    other: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    *,
    mask: Mask,
    dropout: AttentionDropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of q [s, b, hq, d] over k, v [t, b, hkv, d] -> [s, b, hq, d], in torch operations.

    ``asking`` [s, b, hq, d] meets ``keys`` [s + t - 1, hq, d] by distance: for query i and key j that is entry
    s - 1 - i + j, as in a bias. ``other`` [s, b, hq] is added, before the scale, for keys in another segment;
    ``segments`` are integers [s, b] of the queries and [t, b] of the keys. ``scale`` defaults to 1 / sqrt(d).
    """
    problem = problem_of(q, k, v, mask, dropout=dropout, scale=scale)
    s, t = q.shape[0], k.shape[0]
    along = grouped(asking, k) @ _by_group(keys, k).transpose(-1, -2)  # [b, kv heads, group, s, distances]
    place = (s - 1 - torch.arange(s, device=q.device)).unsqueeze(1) + torch.arange(t, device=q.device)
    extra = along.gather(-1, place.expand(*along.shape[:3], s, t))
    if other is not None and segments is not None:
        extra = extra + grouped(other.unsqueeze(-1), k) * _differ(segments, slice(0, s))
    return weighted(scores_of(q, k, problem, extra), q, k, v, problem)[0]


def relative_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asking: Tensor,
    keys: Tensor,
    other: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    *,
    mask: Mask,
    dropout: AttentionDropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same, ``ROWS`` queries at a time, whose scores are computed again for the gradients.

    Memory beyond inputs and output grows with the length, not with its square.
    """
    problem = problem_of(q, k, v, mask, dropout=dropout, scale=scale)
    return _Rows.apply(q, k, v, asking, keys, other, segments, problem)


class _Rows(torch.autograd.Function):
    """Saves inputs, out and a number a query and head."""

    @staticmethod
    def forward(ctx, q, k, v, asking, keys, other, segments, problem):  # type: ignore[no-untyped-def]
        blocks = _blocks(q, k, problem)
        parts = [_some(q, k, v, asking, keys, other, segments, *block)[1] for block in blocks]
        out, lse = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], -1)
        ctx.save_for_backward(q, k, v, asking, keys, other, out, lse)
        ctx.segments, ctx.problem = segments, problem
        return out

    @staticmethod
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        q, k, v, asking, keys, other, out, lse = ctx.saved_tensors
        delta, wide = delta_of(do, out), lse.dtype
        dq, dasking = torch.empty_like(q), torch.empty_like(asking)
        dk, dv, dkeys = (torch.zeros_like(x, dtype=wide) for x in (k, v, keys))
        dother = None if other is None else torch.empty_like(other)
        for rows, near, here in _blocks(q, k, ctx.problem):
            n, t = rows.stop - rows.start, len(k)
            scores, _ = _some(q, k, v, asking, keys, other, ctx.segments, rows, near, here, alone=True)
            dscores, dq[rows], dk_, dv_ = backward_of(
                scores, do[rows], q[rows], k, v, lse[..., rows].contiguous(), delta[..., rows].contiguous(), here
            )
            dk += dk_
            dv += dv_
            dscores = dscores * here.scale
            along = dscores.new_zeros(*dscores.shape[:3], n * (n + t))
            _shifted(along, n, t).copy_(dscores)
            along = along.unflatten(-1, (n, n + t))[..., :-1]
            dasking[rows] = narrow(along @ _by_group(keys[near], k))
            dkeys[near] += (along.transpose(-1, -2) @ grouped(asking[rows], k)).sum(0).flatten(0, 1).transpose(0, 1)
            if dother is not None:
                differ = _differ(ctx.segments, rows)
                dother[rows] = narrow((dscores * differ).sum(-1, keepdim=True)).squeeze(-1)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dasking, dkeys.to(keys.dtype), dother, None, None


def _blocks(q: Tensor, k: Tensor, p: Problem) -> list[tuple[slice, slice, Problem]]:
    """Queries of each block, entries of ``keys`` by distance that they meet, and their problem."""
    s, t = q.shape[0], k.shape[0]
    found = []
    for first in range(0, s, ROWS):
        rows = slice(first, min(first + ROWS, s))
        near = slice(s - rows.stop, s - rows.start + t - 1)
        found.append((rows, near, replace(p, mask=p.mask.part(rows, slice(0, t)))))
    return found


def _some(
    q: Tensor, k: Tensor, v: Tensor, asking: Tensor, keys: Tensor, other: Tensor | None,
    segments: tuple[Tensor, Tensor] | None, rows: slice, near: slice, p: Problem, alone: bool = False,
) -> tuple[Tensor, Halves]:  # fmt: skip
    """Scores of some of the queries, and unless they are wanted ``alone`` out and log-sum-exp."""
    n, t = rows.stop - rows.start, k.shape[0]
    # One entry more makes the rows n + t long, for the shift.
    along = grouped(asking[rows], k) @ F.pad(_by_group(keys[near], k), (0, 0, 0, 1)).transpose(-1, -2)
    more = _shifted(along.flatten(-2), n, t)
    if other is not None and segments is not None:
        more = more + grouped(other[rows].unsqueeze(-1), k) * _differ(segments, rows)
    scores = scores_of(q[rows], k, p, more)
    return scores, (scores, scores) if alone else weighted(scores, q[rows], k, v, p)


def _shifted(along: Tensor, s: int, t: int) -> Tensor:
    """A view [..., s, t] of [..., s (s + t)]: row i from its entry s - 1 - i on.

    That is where the flat rows, read s + t - 1 at a time from entry s - 1 on, begin.
    """
    wide = s + t - 1
    return along[..., s - 1 : s - 1 + s * wide].unflatten(-1, (s, wide))[..., :t]


def _differ(segments: tuple[Tensor, Tensor], rows: slice) -> Tensor:
    """Bool [b, 1, 1, queries, t]: whether a key is in another segment than the query."""
    return (segments[0][rows].t().unsqueeze(2) != segments[1].t().unsqueeze(1))[:, None, None]


def _by_group(keys: Tensor, k: Tensor) -> Tensor:
    """Keys by distance as [kv heads, group, distances, d] in the wide type."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    return keys.to(wide).unflatten(1, (k.shape[2], -1)).permute(1, 2, 0, 3)
