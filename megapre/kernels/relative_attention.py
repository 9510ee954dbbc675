"""Attention whose scores know how far a key is from its query, as Transformer-XL and XLNet have it.

p_ij = softmax over visible j of scale (q_i . k_j + a_i . r_(j - i) + [segments of i and j differ] g_i): a is the query
with another bias than q has, r one key for each distance and head (arXiv 1901.02860, equation 5), g what a key in
another segment of text adds (arXiv 1906.08237, section 2.5; a key in the same segment adds a number that is the same
for all keys of a query, which a softmax takes out). Masks, grouped heads and dropout are those of ``attention.py``.

The term of distances depends on the query, so it is no bias by distance: no version of ``attention`` can add it. Here
it is one product of [rows, d] by [rows + keys, d] for every block of rows, whose rows are then shifted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megapre.kernels.attention import AttentionDropout, Problem, grouped, problem_of, scores_of, weighted
from megapre.kernels.mask import Mask

ROWS = 256
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
    scores = scores_of(q, k, problem, extra + _between_segments(other, segments, k))
    return weighted(scores, q, k, v, problem)[0]


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
    s, t = q.shape[0], k.shape[0]
    parts = []
    for first in range(0, s, ROWS):
        rows = slice(first, min(first + ROWS, s))
        here = Problem(mask.part(rows, slice(0, t)), None, dropout, problem.scale)
        change = None if other is None else other[rows]
        types = None if segments is None else (segments[0][rows], segments[1])
        near = keys[s - rows.stop : s - rows.start + t - 1]
        one = (q[rows], k, v, asking[rows], near, change, types, here)
        parts.append(checkpoint(_some, *one, use_reentrant=False, preserve_rng_state=False))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _some(
    q: Tensor, k: Tensor, v: Tensor, asking: Tensor, keys: Tensor, other: Tensor | None,
    segments: tuple[Tensor, Tensor] | None, p: Problem,
) -> Tensor:  # fmt: skip
    """Some of the queries; ``keys`` are those of their distances."""
    s, t = q.shape[0], k.shape[0]
    # One entry more makes the rows s + t long: row i begins s - 1 - i entries into its own, which is where the
    # flat rows, read s + t - 1 at a time from entry s - 1 on, begin.
    along = grouped(asking, k) @ F.pad(_by_group(keys, k), (0, 0, 0, 1)).transpose(-1, -2)
    wide = s + t - 1
    extra = along.flatten(-2)[..., s - 1 : s - 1 + s * wide].unflatten(-1, (s, wide))[..., :t]
    scores = scores_of(q, k, p, extra + _between_segments(other, segments, k))
    return weighted(scores, q, k, v, p)[0]


def _by_group(keys: Tensor, k: Tensor) -> Tensor:
    """Keys by distance as [kv heads, group, distances, d] in the wide type."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    return keys.to(wide).unflatten(1, (k.shape[2], -1)).permute(1, 2, 0, 3)


def _between_segments(other: Tensor | None, segments: tuple[Tensor, Tensor] | None, k: Tensor) -> Tensor | float:
    """[b, kv heads, group, s, t]: ``other`` where segments differ, else 0."""
    if other is None or segments is None:
        return 0.0
    differ = segments[0].t().unsqueeze(2) != segments[1].t().unsqueeze(1)
    return grouped(other.unsqueeze(-1), k) * differ[:, None, None]
