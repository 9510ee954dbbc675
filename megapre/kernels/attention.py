"""Scaled dot-product attention with grouped key/value heads (arXiv 1706.03762, 2305.13245).

o = softmax(q k^T / sqrt(d) + mask) v, query head h reading key/value head h // (hq / hkv).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.random import philox


@dataclass(frozen=True)
class AttentionDropout:
    """Which attention weights are dropped: key (seed, step), counter (sample, query position, key index, site)."""

    seed: int
    """Seed of the run."""
    step: int
    """Optimizer step."""
    sites: list[int]
    """One number per local query head, unique over layers and global heads."""
    positions: Tensor
    """int64 [s], index of each query in its sample."""
    samples: Tensor
    """int64 [b], global number of each sample."""
    probability: float
    """Share of weights dropped."""


def reference_supports(
    q: Tensor, k: Tensor, *, segments: Tensor | None, dropout: AttentionDropout | None, offset: int
) -> str:
    """Why the reference cannot do this call, or ""."""
    if q.shape[2] % k.shape[2]:
        return f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads"
    if segments is not None and (offset or q.shape[0] != k.shape[0]):
        return f"segments need as many keys as queries, not {k.shape[0]} and {q.shape[0]}"
    if dropout is not None and len(dropout.sites) != q.shape[2]:
        return f"{len(dropout.sites)} dropout sites for {q.shape[2]} query heads"
    return ""


def sdpa_supports(
    q: Tensor, k: Tensor, *, segments: Tensor | None, dropout: AttentionDropout | None, offset: int
) -> str:
    """Why torch's scaled_dot_product_attention cannot do this call, or ""."""
    if dropout is not None:
        return "its dropout mask depends on the layout"
    return reference_supports(q, k, segments=segments, dropout=dropout, offset=offset)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    segments: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    offset: int = 0,
) -> Tensor:
    """Attention of q [s, b, hq, d] over k, v [t, b, hkv, d] -> [s, b, hq, d], scores written out in fp32 (or fp64).

    ``offset`` is the position of q[0] among the keys (decoding with a cache); ``segments`` int64 [s, b] keeps
    attention inside a document. Raises ValueError for shapes that do not fit together.
    """
    reason = reference_supports(q, k, segments=segments, dropout=dropout, offset=offset)
    if reason:
        raise ValueError(f"attention of {list(q.shape)} over {list(k.shape)}: {reason}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    (s, b, heads, d), t, groups = q.shape, k.shape[0], k.shape[2]
    grouped = q.to(wide).view(s, b, groups, heads // groups, d)
    scores = torch.einsum("sbgnd,tbgd->bgnst", grouped, k.to(wide)) / math.sqrt(d)
    mask = allowed(s, t, causal, segments, offset, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if dropout is not None:
        kept = philox.keep_mask(
            dropout.seed, dropout.step, dropout.sites, dropout.positions, dropout.samples, 0, t, dropout.probability
        )
        kept = kept.permute(2, 0, 1, 3).reshape(weights.shape)
        weights = torch.where(kept, weights * (1.0 / (1.0 - dropout.probability)), 0.0)
    return torch.einsum("bgnst,tbgd->sbgnd", weights, v.to(wide)).reshape(q.shape).to(q.dtype)


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    segments: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    offset: int = 0,
) -> Tensor:
    """``attention_reference`` by torch's scaled_dot_product_attention; the reference where that cannot do the call."""
    if sdpa_supports(q, k, segments=segments, dropout=dropout, offset=offset):
        return attention_reference(q, k, v, causal=causal, segments=segments, dropout=dropout, offset=offset)
    s, t, repeats = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
    if repeats > 1:  # enable_gqa would leave the fused kernels on the CPU
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    plain = causal and segments is None and offset == 0 and s == t
    mask = None if plain else allowed(s, t, causal, segments, offset, q.device)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain).permute(2, 0, 1, 3).contiguous()


def allowed(
    s: int, t: int, causal: bool, segments: Tensor | None, offset: int, device: torch.device
) -> Tensor | None:
    """Boolean mask [b or 1, 1, s, t], true where a query may read a key; None when it may read all of them."""
    mask = None
    if causal and not (s == 1 and t == offset + 1):
        query, key = torch.arange(s, device=device) + offset, torch.arange(t, device=device)
        mask = (key.unsqueeze(0) <= query.unsqueeze(1)).view(1, 1, s, t)
    if segments is not None:
        document = segments.t().contiguous()
        same = (document.unsqueeze(2) == document.unsqueeze(1)).unsqueeze(1)
        mask = same if mask is None else mask & same
    return mask
