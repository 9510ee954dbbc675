"""Attention in fp64, one query at a time from the words of its definition, and the cases that every version is held to.

The masks here are written independently of ``megapre/kernels/mask.py``: a case says which keys a query may read by a
plain Python function of positions, documents and orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megapre.kernels.attention import AttentionDropout, Version, delta_of
from megapre.kernels.mask import CAUSAL, FULL, Mask
from megapre.random import philox
from tests.kernels.tolerances import error

Visible = Callable[[int, int, int], bool]
"""(sample, query, key) -> whether the query may read the key."""


@dataclass
class Asked:
    """One mask, in the product's words and in plain ones."""

    mask: Mask
    visible: Visible


def causal(s: int, t: int, b: int) -> Asked:
    return Asked(Mask(causal=True, q_offset=t - s), lambda n, i, j: j <= i + t - s)


def full(s: int, t: int, b: int) -> Asked:
    return Asked(Mask(), lambda n, i, j: True)


def window(s: int, t: int, b: int, size: int = 9) -> Asked:
    return Asked(Mask(causal=True, window=size, q_offset=t - s), lambda n, i, j: 0 <= i + t - s - j < size)


def two_sided_window(s: int, t: int, b: int) -> Asked:
    return Asked(Mask(window=7), lambda n, i, j: abs(i - j) < 7)


def prefix(s: int, t: int, b: int) -> Asked:
    lengths = torch.tensor([(t // 3 + 5 * n) % t for n in range(b)])
    return Asked(
        Mask(causal=True, prefix=lengths, q_offset=t - s), lambda n, i, j: j <= i + t - s or j < int(lengths[n])
    )


def document(s: int, t: int, b: int, is_causal: bool = True) -> Asked:
    """Documents of about a third, by sample; in the second sample they alternate, so that no block is whole."""
    numbers = torch.stack([torch.arange(t) // (t // 3 + 1 + n) if n != 1 else torch.arange(t) % 2 for n in range(b)], 1)
    asking = numbers[t - s :] if t >= s else torch.cat((numbers, numbers[-1:].expand(s - t, b) + 1))
    shift = t - s

    def visible(n: int, i: int, j: int) -> bool:
        return int(asking[i, n]) == int(numbers[j, n]) and (not is_causal or j <= i + shift)

    return Asked(Mask(causal=is_causal, documents=(asking, numbers), q_offset=shift), visible)


def packed(s: int, t: int, b: int) -> Asked:
    return document(s, t, b, is_causal=False)


def query_stream(s: int, t: int, b: int, strict: bool = True) -> Asked:
    """XLNet: a permutation by sample; the query stream does not see itself, so that its first sees nothing."""
    generator = torch.Generator().manual_seed(s)
    order = torch.stack([torch.randperm(max(s, t), generator=generator) for _ in range(b)], 1)
    asking, asked = order[:s], order[:t]

    def visible(n: int, i: int, j: int) -> bool:
        mine, other = int(asking[i, n]), int(asked[j, n])
        return other < mine if strict else other <= mine

    return Asked(Mask(causal=True, strict=strict, order=(asking, asked)), visible)


def content_stream(s: int, t: int, b: int) -> Asked:
    return query_stream(s, t, b, strict=False)


def nothing(s: int, t: int, b: int) -> Asked:
    """Keys that all lie ahead: no query reads any."""
    return Asked(Mask(causal=True, k_offset=s), lambda n, i, j: False)


def one_key(s: int, t: int, b: int) -> Asked:
    """Only the last query reads anything, and that is the first key."""
    return Asked(Mask(causal=True, k_offset=s - 1), lambda n, i, j: i == s - 1 and j == 0)


MASKS = {
    f.__name__: f
    for f in (
        causal, full, window, two_sided_window, prefix, document, packed, query_stream, content_stream, nothing, one_key
    )
}  # fmt: skip


def weights(asked: Asked, s: int, t: int, b: int) -> Tensor:
    """Bool [b, s, t] from the plain words."""
    table = torch.tensor([[[asked.visible(n, i, j) for j in range(t)] for i in range(s)] for n in range(b)])
    return table.view(b, s, t)


def formula(
    q: Tensor, k: Tensor, v: Tensor, asked: Asked, bias: Tensor | None = None, dropout: AttentionDropout | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out [s, b, h, d] and log-sum-exp [b, h, s], by sample and head; ``more`` [b, h, s, t] is added to the scores."""
    (s, b, heads, d), t = q.shape, k.shape[0]
    visible, group = weights(asked, s, t, b).to(q.device), heads // k.shape[2]
    out, sums = [], []
    for n in range(b):
        for h in range(heads):
            scores = q[:, n, h] @ k[:, n, h // group].T / math.sqrt(d)
            if bias is not None:
                scores = scores + torch.stack([bias[h, s - 1 - i : s - 1 - i + t] for i in range(s)])
            scores = scores if more is None else scores + more[n, h]
            top = scores.masked_fill(~visible[n], -torch.inf).amax(1, keepdim=True).detach()
            e = torch.exp(scores - top.nan_to_num(0.0, neginf=0.0)).masked_fill(~visible[n], 0.0)
            total = e.sum(1, keepdim=True)
            w = e / total.masked_fill(total == 0, 1.0)
            if dropout is not None:
                m = asked.mask
                place = torch.arange(s) + m.q_offset
                kept = philox.keep_mask_reference(
                    dropout.seed, dropout.step, [dropout.sites[h]], place, dropout.samples[n : n + 1].cpu(),
                    m.k_offset, t, dropout.probability,
                )[0, :, 0]  # fmt: skip
                w = w * kept.to(w.device) / (1 - dropout.probability)
            out.append(w @ v[:, n, h // group])
            sums.append((top + total.log())[:, 0])
    shape = (b, heads, s)
    return torch.stack(out).view(*shape, d).permute(2, 0, 1, 3), torch.stack(sums).view(shape)


def draw(s: int, t: int, b: int, heads: int, groups: int, d: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v."""
    generator = torch.Generator().manual_seed(seed + s + 31 * t + 7 * d)
    shapes = ((s, heads), (t, groups), (t, groups))
    return [torch.randn(n, b, h, d, generator=generator).to(dtype) for n, h in shapes]


def dropout_of(heads: int, batch: int, probability: float = 0.3) -> AttentionDropout:
    """Sites and samples that use the upper bits."""
    sites = [4099 + 4 * h for h in range(heads)]
    return AttentionDropout(2**35 + 5, 3, sites, torch.arange(batch) + 2**32 - 1, probability)


# --- relations that hold whatever the values ------------------------------------------------------------------------


def check_documents(version: Version, dtype: torch.dtype, device: str = "cpu", s: int = 150, d: int = 64) -> None:
    """Other values in one document leave the next one's results and gradients as they are, bit for bit."""
    cut = s // 2 - 8
    inputs = [x.to(device) for x in draw(s, s, 1, 2, 1, d, dtype)]
    numbers = (torch.arange(s, device=device) >= cut).long().unsqueeze(1)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    results = []
    for change in (False, True):
        x = [y.clone() for y in inputs]
        for y in x:
            if change:
                y[:cut] = y[:cut] * 3 + 1
        x = [y.requires_grad_() for y in x]
        out = version(*x, mask=Mask(causal=True, documents=(numbers, numbers)))
        results.append([out[cut:].detach(), *(g[cut:] for g in torch.autograd.grad(out, x, grad))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def check_same_masks(version: Version, dtype: torch.dtype, device: str, tolerance: float, s: int = 100) -> None:
    """Causal is an empty prefix, a window as long as the sequence, one document, an order by position, another offset;
    a prefix of all is no mask. Value and gradients."""
    b, inputs = 2, [x.to(device).requires_grad_() for x in draw(s, s, 2, 2, 1, 32, dtype)]
    everywhere = torch.arange(s, device=device).unsqueeze(1).expand(s, b)
    pairs = [
        (CAUSAL, Mask(causal=True, prefix=torch.zeros(b, dtype=torch.int64, device=device))),
        (CAUSAL, Mask(causal=True, window=s)),
        (CAUSAL, Mask(causal=True, documents=(torch.full((s, b), 7, device=device),) * 2)),
        (CAUSAL, Mask(causal=True, order=(everywhere,) * 2)),
        (CAUSAL, Mask(causal=True, q_offset=30, k_offset=30)),
        (FULL, Mask(causal=True, prefix=torch.full((b,), s, device=device))),
    ]
    plain = {}
    for asked, same in pairs:
        found = []
        for mask in (asked, same):
            if mask is asked and id(asked) in plain:
                found.append(plain[id(asked)])
                continue
            out = version(*inputs, mask=mask)
            found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
        plain[id(asked)] = found[0]
        for x, y in zip(*found):
            assert error(y, x) <= tolerance, same


def check_two_steps(version: Version, dtype: torch.dtype, device: str, tolerance: float, s: int = 66) -> None:
    """Two parts of the keys, as ring attention takes them, put together by their log-sum-exps, are the whole."""
    q, k, v = (x.to(device) for x in draw(s, s, 1, 2, 1, 32, dtype))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(4)).to(dtype).to(device)
    out, lse = version.forward(q, k, v, mask=CAUSAL)
    delta = delta_of(grad, out)
    whole = version.backward(grad, q, k, v, lse=lse, delta=delta, mask=CAUSAL)
    cuts = (slice(0, s // 2 - 4), slice(s // 2 - 4, s))
    masks = [CAUSAL.part(slice(0, s), cut) for cut in cuts]
    parts = [version.forward(q, k[cut], v[cut], mask=mask) for cut, mask in zip(cuts, masks)]
    assert all(part.dtype == torch.float32 for part, _ in parts)
    together = torch.logaddexp(parts[0][1], parts[1][1])
    shares = [torch.exp(part - together).permute(2, 0, 1).unsqueeze(-1) * x for x, part in parts]
    assert error(together, lse) <= 2e-6 and error(shares[0] + shares[1], out) <= tolerance
    found = [
        version.backward(grad, q, k[cut], v[cut], lse=lse, delta=delta, mask=mask) for cut, mask in zip(cuts, masks)
    ]
    assert error(found[0][0] + found[1][0], whole[0]) <= tolerance
    for which in (1, 2):
        assert error(torch.cat([part[which] for part in found]), whole[which]) <= tolerance
