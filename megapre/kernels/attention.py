"""Attention with declared masks, biases by distance, grouped heads and counter-based dropout: one entry, many versions.

o_i = sum_j p_ij v_j, p = softmax over visible j of (scale q_i . k_j + bias(j - i)), query head h reading key/value head
h // (hq / hkv) (arXiv 1706.03762, 2305.13245). A query that may read no key gives o = 0 and log-sum-exp -inf.

The entry is a :class:`Version`, or a :class:`Chain` of them (what the registry hands out), called as
``attention(q, k, v, mask=, bias=, dropout=, scale=)``, or in two halves for those who compose it (ring attention):
``forward`` returns the log-sum-exp and ``backward`` takes any out, log-sum-exp and delta, so that a softmax over more
keys than those at hand has the right gradient (arXiv 2205.14135, 2310.01889).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.kernels.mask import FEATURES, Mask, check
from megapre.random import native, philox


@dataclass(frozen=True)
class AttentionDropout:
    """Which weights are dropped: key (seed, step), counter (sample, position of the query, of the key, site)."""

    seed: int
    """Seed of the run."""
    step: int
    """Optimizer step."""
    sites: list[int]
    """One number per local query head, unique over layers and global heads."""
    samples: Tensor
    """int64 [b], global number of each sample."""
    probability: float
    """Share of weights dropped."""


@dataclass(frozen=True)
class Problem:
    """What a call asks, apart from q, k and v."""

    mask: Mask
    bias: Tensor | None
    """fp32 (fp64) [hq, s + t - 1]: that of query i and key j is entry s - 1 - i + j; added to the scaled score."""
    dropout: AttentionDropout | None
    scale: float
    wide: bool = False
    """Results in fp32 whatever the type of q, for sums of several calls."""


Halves = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Version:
    """One way to compute attention. q [s, b, hq, d], k and v [t, b, hkv, d]; lse and delta fp32 [b, hq, s]."""

    name: str
    features: tuple[str, ...]
    """Those of ``mask.ALL`` that it can do; a call that asks for more goes to another version."""
    whole: Callable[..., Tensor] | None = None
    """Differentiable (q, k, v, problem) -> out, for versions that are one already."""
    forward_: Callable[[Tensor, Tensor, Tensor, Problem], Halves] | None = None
    backward_: Callable[..., Gradients] | None = None
    """(do, q, k, v, lse, delta, problem) -> gradients of q, k, v and bias."""
    refuses: Callable[[Tensor, Tensor], str] = lambda q, k: ""
    """Why it cannot do q and k of these shapes and types, or ""."""
    delta_: Callable[[Tensor, Tensor], Tensor] = lambda do, out: delta_of(do, out)
    """``delta_of`` in this version's own way."""

    def lacks(self, q: Tensor, k: Tensor, problem: Problem, halves: bool = False) -> str:
        """Why this version cannot do a call, or ""."""
        asked = problem.mask.needs(q.shape[0], k.shape[0])
        asked += [name for name, there in (("bias", problem.bias), ("dropout", problem.dropout)) if there is not None]
        asked += ["learned"] if problem.bias is not None and problem.bias.requires_grad else []
        asked += ["lse"] if halves else []
        missing = [name for name in asked if name not in self.features]
        return f"{self.name} attention has no {' and no '.join(missing)}" if missing else self.refuses(q, k)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention; options as in :meth:`Chain.__call__`. Raises ValueError where this version cannot do it."""
        return Chain((self,))(q, k, v, **options)

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        """Attention with gradients."""
        if self.whole is not None:
            return self.whole(q, k, v, problem)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, problem.bias)):
            return _Attend.apply(q, k, v, problem.bias, self, problem)
        assert self.forward_ is not None
        return self.forward_(q, k, v, problem)[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Halves:
        """Out and log-sum-exp; as :meth:`Chain.forward`."""
        return Chain((self,)).forward(q, k, v, **options)

    def backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Gradients:
        """Gradients; as :meth:`Chain.backward`."""
        return Chain((self,)).backward(do, q, k, v, **options)


class _Attend(torch.autograd.Function):
    """Saves q, k, v, out and a number a row and head: memory linear in the length."""

    @staticmethod
    def forward(ctx, q, k, v, bias, version, problem):  # type: ignore[no-untyped-def]
        out, lse = version.forward_(q, k, v, problem)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.version, ctx.problem = version, problem
        return out

    @staticmethod
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv, dbias = ctx.version.backward_(do, q, k, v, lse, ctx.version.delta_(do, out), ctx.problem)
        return dq, dk, dv, dbias, None, None


@dataclass(frozen=True)
class Chain:
    """Versions in order: each call goes to the first that can do all it asks, so that nothing asked is ignored."""

    versions: tuple[Version, ...]

    def pick(self, q: Tensor, k: Tensor, problem: Problem, halves: bool = False) -> Version:
        """The version that a call gets. Raises ValueError where none can do it."""
        reasons = []
        for version in self.versions:
            reason = version.lacks(q, k, problem, halves)
            if not reason:
                return version
            reasons.append(reason)
        raise ValueError(f"no version can do this attention ({'; '.join(reasons)}): set kernels.attention to auto")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask,
        bias: Tensor | None = None,
        dropout: AttentionDropout | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of q [s, b, hq, d] over k, v [t, b, hkv, d] -> [s, b, hq, d], with gradients of q, k, v and bias.

        ``bias`` fp32 [hq, s + t - 1] by distance (``mask.alibi``, ``mask.relative``); ``scale`` defaults to 1/sqrt(d).
        Raises ValueError for shapes that do not fit together.
        """
        problem = problem_of(q, k, v, mask, bias, dropout, scale)
        return self.pick(q, k, problem).run(q, k, v, problem)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Halves:
        """Out [s, b, hq, d] and log-sum-exp [b, hq, s], both fp32 (fp64): parts of a softmax over more keys.

        ``options`` are those of :meth:`__call__`.
        """
        problem = problem_of(q, k, v, **options, wide=True)
        version = self.pick(q, k, problem, halves=True)
        assert version.forward_ is not None
        return version.forward_(q, k, v, problem)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, *, lse: Tensor, delta: Tensor, **options: Any
    ) -> Gradients:
        """Gradients of q, k, v and bias (None without one), fp32 (fp64), of the part that these keys have.

        ``lse`` and ``delta`` [b, hq, s] are those of the whole softmax: delta = sum over d of do x out. ``options`` are
        those of :meth:`__call__`.
        """
        problem = problem_of(q, k, v, **options, wide=True)
        version = self.pick(q, k, problem, halves=True)
        assert version.backward_ is not None
        return version.backward_(do, q, k, v, lse, delta, problem)


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    scale: float | None = None,
    wide: bool = False,
) -> Problem:
    """What a call asks; ValueError where its shapes do not fit together."""
    (s, b, heads, d), t = q.shape, k.shape[0]
    what = f"attention of {list(q.shape)} over {list(k.shape)}"
    if k.shape != v.shape or k.shape[1] != b or k.shape[3] != d:
        raise ValueError(f"{what} and {list(v.shape)}: batch and head size must agree")
    if heads % k.shape[2]:
        raise ValueError(f"{what}: {heads} query heads are no multiple of {k.shape[2]} key heads")
    if dropout is not None and len(dropout.sites) != heads:
        raise ValueError(f"{what}: {len(dropout.sites)} dropout sites for {heads} query heads")
    if bias is not None and bias.shape != (heads, s + t - 1):
        raise ValueError(f"{what}: a bias by distance is [{heads}, {s + t - 1}], not {list(bias.shape)}")
    if scale is not None and scale <= 0:
        raise ValueError(f"{what}: the scale must be positive, not {scale}")
    check(mask, s, t, b)
    return Problem(mask, bias, dropout, 1 / math.sqrt(d) if scale is None else scale, wide)


def delta_of(do: Tensor, out: Tensor) -> Tensor:
    """[b, heads, s]: sum over the features of do x out, [s, b, heads, d], in fp32 (fp64)."""
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    return torch.linalg.vecdot(do.to(wide), out.to(wide)).permute(1, 2, 0).contiguous()


def diagonals(partial: Tensor, s: int, t: int) -> Tensor:
    """Gradient [heads, s + t - 1] of a bias from sums over the diagonals of pairs of tiles.

    ``partial`` [heads, pairs, 2 tile]: of all pairs whose keys lie as many tiles behind their queries, from the first
    keys with the last queries on, entry n is the sum where key - query, inside the tiles, is n - (tile - 1); the last
    is 0. Two pairs share every diagonal.
    """
    tile = partial.shape[2] // 2
    whole = partial.new_zeros((partial.shape[0], partial.shape[1] + 1, tile))
    whole[:, :-1] += partial[..., :tile]
    whole[:, 1:] += partial[..., tile:]
    first = -(-s // tile) * tile - s
    return whole.flatten(1)[:, first : first + s + t - 1]


# --- the formula ----------------------------------------------------------------------------------------------------


def _type(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """Queries as [b, kv heads, group, s, d] in the wide type."""
    return q.to(_type(q)).unflatten(2, (k.shape[2], -1)).permute(1, 2, 3, 0, 4)


def narrow(x: Tensor) -> Tensor:
    """The inverse of ``grouped``."""
    return x.permute(3, 0, 1, 2, 4).flatten(2, 3)


def _wide(k: Tensor) -> Tensor:
    """Keys or values as [b, kv heads, 1, t, d] in the wide type."""
    return k.to(_type(k)).permute(1, 2, 0, 3).unsqueeze(2)


def scores_of(q: Tensor, k: Tensor, p: Problem, more: Tensor | None = None) -> Tensor:
    """[b, kv heads, group, s, t], -inf where a query may not read; ``more`` is added to the products of q and k."""
    s, t = q.shape[0], k.shape[0]
    scores = grouped(q, k) @ _wide(k).transpose(-1, -2)
    scores = (scores if more is None else scores + more) * p.scale
    if p.bias is not None:
        # Row i of the matrix of distances is the bias from entry s - 1 - i on.
        place = (s - 1 - torch.arange(s, device=q.device)).unsqueeze(1) + torch.arange(t, device=q.device)
        scores = scores + p.bias.to(scores.dtype)[:, place].unflatten(0, (k.shape[2], -1))
    visible = p.mask.dense(s, t, q.device)
    return scores if visible is None else scores.masked_fill(~visible.unsqueeze(2), -torch.inf)


def _kept(q: Tensor, k: Tensor, p: Problem) -> Tensor | None:
    """Factors 0 or 1 / (1 - p) of the weights."""
    d = p.dropout
    if d is None:
        return None
    positions = torch.arange(q.shape[0], device=q.device) + p.mask.q_offset
    kept = philox.keep_mask(
        d.seed, d.step, d.sites, positions, d.samples, p.mask.k_offset, k.shape[0], d.probability
    )
    return kept.permute(2, 0, 1, 3).unflatten(1, (k.shape[2], -1)).to(_type(q)) / (1 - d.probability)


def _reference(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Halves:
    """Out and log-sum-exp, in torch operations that autograd follows."""
    return weighted(scores_of(q, k, p), q, k, v, p)


def weighted(scores: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Halves:
    """Out and log-sum-exp of ``scores`` as ``scores_of`` gives them."""
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    kept = _kept(q, k, p)
    out = narrow((weights if kept is None else weights * kept) @ _wide(v))
    return out if p.wide else out.to(q.dtype), lse.flatten(1, 2)


def _reference_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, p: Problem
) -> Gradients:
    dscores, dq, dk, dv = backward_of(scores_of(q, k, p), do, q, k, v, lse, delta, p)
    dbias = None
    if p.bias is not None:
        s, t = q.shape[0], k.shape[0]
        place = (s - 1 - torch.arange(s, device=q.device)).unsqueeze(1) + torch.arange(t, device=q.device)
        along = dscores.sum(0).flatten(0, 1).flatten(1)
        dbias = along.new_zeros(p.bias.shape).index_add_(1, place.flatten(), along).to(p.bias.dtype)
    if not p.wide:
        dq, dk, dv = (x.to(q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv, dbias


def backward_of(
    scores: Tensor, do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, p: Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, in the wide type, of ``scores`` as ``scores_of`` gives them, and of q, k and v through them."""
    lse, delta = (x.to(_type(q)).unflatten(1, (k.shape[2], -1)).unsqueeze(-1) for x in (lse, delta))
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf))
    do_ = grouped(do, k)
    dweights, kept = do_ @ _wide(v).transpose(-1, -2), _kept(q, k, p)
    dropped = weights if kept is None else weights * kept
    dscores = weights * ((dweights if kept is None else dweights * kept) - delta)
    dq = narrow(dscores @ _wide(k)) * p.scale
    dk = (dscores.transpose(-1, -2) @ grouped(q, k)).sum(2).permute(2, 0, 1, 3) * p.scale
    dv = (dropped.transpose(-1, -2) @ do_).sum(2).permute(2, 0, 1, 3)
    return dscores, dq, dk, dv


attention_reference = Version(
    "reference", FEATURES["reference"], lambda q, k, v, p: _reference(q, k, v, p)[0], _reference, _reference_backward
)


# --- libraries ------------------------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Tensor:
    """torch's scaled_dot_product_attention; masks other than the plain causal one are written out for it."""
    s, t, repeats = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
    if repeats > 1:  # enable_gqa would leave the fused kernels on the CPU
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    plain = p.mask.causal and s == t and not p.mask.needs(s, t)
    one = s == 1 and p.mask.causal and not p.mask.needs(s, t)  # decoding: the last position reads all
    mask = None if plain or one else p.mask.dense(s, t, q.device)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain and s > 1, scale=p.scale)
    return y.permute(2, 0, 1, 3).contiguous()


attention_sdpa = Version("sdpa", FEATURES["sdpa"], _sdpa)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Tensor:
    """The package flash-attn (arXiv 2307.08691); its causal mask and window are aligned with the last key, as here."""
    from flash_attn import flash_attn_func

    w = p.mask.window
    window = (w - 1 if w else -1, 0 if p.mask.causal else w - 1 if w else -1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return flash_attn_func(q, k, v, softmax_scale=p.scale, causal=p.mask.causal, window_size=window).transpose(0, 1)


def _flash_attn_refuses(q: Tensor, k: Tensor) -> str:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn handles bf16 and fp16, not {q.dtype}"
    return "" if q.shape[3] <= 256 else f"flash-attn handles heads of up to 256, not {q.shape[3]}"


attention_flash = Version("flash", FEATURES["flash"], _flash_attn, refuses=_flash_attn_refuses)


# --- C++ ------------------------------------------------------------------------------------------------------------


def arguments(q: Tensor, k: Tensor, p: Problem) -> tuple[Any, ...]:
    """The problem as what a native function takes: tensors or None, then plain numbers."""
    m, d = p.mask, p.dropout
    limits, numbers = m.limits(q.shape[0], k.shape[0]), m.numbers() or (None, None)
    tables = [None, None] if limits is None else [x.expand(q.shape[1], -1).contiguous() for x in limits]
    bias = None if p.bias is None else p.bias.detach().float().contiguous()
    drop: tuple[Any, ...] = (None, None, 0, 0, 0, 1.0)
    if d is not None:
        sites = torch.tensor(d.sites, dtype=torch.int64, device=q.device)
        limit = philox.threshold(d.probability)
        drop = (sites, d.samples, philox.mix(d.seed), d.step, limit, 1 / (1 - d.probability))
    return (*tables, *numbers, bias, *drop, m.causal, m.window, m.q_offset, m.k_offset, p.scale, p.wide)


def _cpp(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Halves:
    return torch.ops.megapre.attention_forward(q, k, v, *arguments(q, k, p))


def _cpp_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, p: Problem) -> Gradients:
    dq, dk, dv, dbias = torch.ops.megapre.attention_backward(do, q, k, v, lse, delta, *arguments(q, k, p))
    return dq, dk, dv, None if p.bias is None else dbias.to(p.bias.dtype)


def _cpp_delta(do: Tensor, out: Tensor) -> Tensor:
    if do.dtype != out.dtype or not do.is_contiguous():
        return delta_of(do, out)
    return torch.ops.megapre.attention_delta(do, out)


def _cpp_refuses(q: Tensor, k: Tensor) -> str:
    if native.load():
        return native.load()
    if q.dtype not in (torch.float32, torch.bfloat16) or q.device.type != "cpu":
        return f"C++ attention handles fp32 and bf16 on the CPU, not {q.dtype} on {q.device.type}"
    return "" if q.shape[3] <= 256 else f"C++ attention handles heads of up to 256, not {q.shape[3]}"


attention_cpp = Version("cpp", FEATURES["cpp"], None, _cpp, _cpp_backward, _cpp_refuses, _cpp_delta)
