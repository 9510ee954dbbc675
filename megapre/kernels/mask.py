"""Which keys a query of attention may read: declared once, read by every version, never written out as a matrix.

Every rule reduces to two numbers of a key and two of a query: query i reads key j when ``order[j] <= limit[i]``, their
documents are equal and their positions are less than ``window`` apart. Causal attention has positions for order and
limit; a prefix has order -1, so that all read it; XLNet's two streams have the place in the factorisation order, the
query stream a limit one lower, so that it does not see itself (arXiv 1906.08237).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALL = ("prefix", "document", "window", "order", "offset", "empty", "bias", "learned", "dropout", "lse")
"""What a call may ask of a version beyond full and causal attention with grouped heads.

``offset``: causal queries that are not the last of the keys, or not as many; ``empty``: queries that may have no key
to read; ``bias``: scores with a bias by distance; ``learned``: the gradient of that bias; ``lse``: forward that returns
log-sum-exp and backward that is given it, as ring attention needs.
"""
FEATURES = {
    "cpp": ALL,
    "cuda": ALL,
    "triton": ALL,
    "flash": ("window",),
    "sdpa": ("prefix", "document", "window", "order", "offset"),
    "reference": ALL,
}
"""What each version of attention can do. Nothing that a call asks for is ignored: one that cannot is not picked."""


@dataclass(frozen=True)
class Mask:
    """The keys that each query of one call may read. Position of query i: q_offset + i, of key j: k_offset + j."""

    causal: bool = False
    """A query reads the keys whose order is at most its own."""
    strict: bool = False
    """Less than its own: the query stream of two-stream attention."""
    window: int = 0
    """Distances |position - position| that are visible are below it; 0: all. Sliding window when causal."""
    prefix: Tensor | None = None
    """int64 [batch]: with ``causal``, keys at positions below it are visible to every query."""
    documents: tuple[Tensor, Tensor] | None = None
    """Integers [s, batch] of the queries, [t, batch] of the keys: attention stays inside a document."""
    order: tuple[Tensor, Tensor] | None = None
    """Integers [s, batch] and [t, batch] that ``causal`` compares in place of positions; not negative."""
    q_offset: int = 0
    k_offset: int = 0

    def part(self, rows: slice, columns: slice) -> Mask:
        """The mask of some queries and some keys of this call."""
        pairs = {
            name: None if pair is None else (pair[0][rows], pair[1][columns])
            for name, pair in (("documents", self.documents), ("order", self.order))
        }
        q, k = self.q_offset + (rows.start or 0), self.k_offset + (columns.start or 0)
        return replace(self, q_offset=q, k_offset=k, documents=pairs["documents"], order=pairs["order"])

    def hides_all(self, s: int, t: int) -> bool:
        """Whether positions alone say that no query reads any key (the host need not look at the tensors)."""
        ahead = self.k_offset - (self.q_offset + s - 1)
        if self.causal and self.order is None and self.prefix is None and ahead > -int(self.strict):
            return True
        return bool(self.window) and max(ahead, self.q_offset - (self.k_offset + t - 1)) >= self.window

    def needs(self, s: int, t: int) -> list[str]:
        """Features of ``ALL`` that this mask asks for."""
        aligned = self.q_offset - self.k_offset == t - s
        asked = {
            "prefix": self.prefix is not None,
            "document": self.documents is not None,
            "window": self.window > 0,
            "order": self.order is not None or self.strict,
            "offset": self.causal and not aligned,
            "empty": self.strict
            or (self.causal and self.order is None and self.k_offset > self.q_offset)
            or ((self.order is not None or self.documents is not None or self.window > 0)
            and not (s == t and self.q_offset == self.k_offset)),
        }
        return [name for name, wanted in asked.items() if wanted]

    def limits(self, s: int, t: int) -> tuple[Tensor, Tensor] | None:
        """int32 [batch, s] and [batch, t]: limits and orders, where positions do not say them."""
        if not self.causal or (self.order is None and self.prefix is None and not self.strict):
            return None
        device = next((x.device for x in (*(self.order or ()), self.prefix) if x is not None), None)
        if self.order is not None:
            limit, order = self.order[0].t(), self.order[1].t()
        else:
            limit, order = (torch.arange(n, device=device).unsqueeze(0) + o
                            for n, o in ((s, self.q_offset), (t, self.k_offset)))  # fmt: skip
        if self.prefix is not None:
            place = torch.arange(t, device=device) + self.k_offset
            order = torch.where(place < self.prefix.unsqueeze(1), -1, order)
        batch = max(limit.shape[0], order.shape[0])
        limit = limit - 1 if self.strict else limit
        narrow = [x.to(torch.int32).expand(batch, x.shape[1]).contiguous() for x in (limit, order)]
        return narrow[0], narrow[1]

    def numbers(self) -> tuple[Tensor, Tensor] | None:
        """int32 [batch, s] and [batch, t]: documents."""
        if self.documents is None:
            return None
        asking, asked = (x.t().to(torch.int32).contiguous() for x in self.documents)
        return asking, asked

    @property
    def extra(self) -> bool:
        """Whether it is more than a causal or full mask by positions."""
        return self.window > 0 or any(x is not None for x in (self.documents, self.order, self.prefix)) or self.strict

    def tables(self, s: int, t: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """int32 limits [batch, s], orders [batch, t], and documents of queries and keys, with nothing left out."""
        limits, numbers = self.limits(s, t), self.numbers()
        if limits is None:
            places = [torch.arange(n, dtype=torch.int32, device=device) for n in (s, t)]
            query, key = (x.expand(batch, -1).contiguous() for x in places)
            if self.causal:
                limits = query + self.q_offset, key + self.k_offset
            else:
                limits = torch.full_like(query, 2**31 - 1), torch.zeros_like(key)
        limit, order = (x.expand(batch, x.shape[1]).contiguous() for x in limits)
        if numbers is None:
            numbers = torch.zeros_like(limit), torch.zeros_like(order)
        return limit, order, *numbers

    def dense(self, s: int, t: int, device: torch.device) -> Tensor | None:
        """The same rule written out, bool [batch or 1, 1, s, t]; None where all is visible. For references alone."""
        query = torch.arange(s, device=device).unsqueeze(1) + self.q_offset
        key = torch.arange(t, device=device).unsqueeze(0) + self.k_offset
        visible = torch.ones(1, 1, s, t, dtype=torch.bool, device=device)
        if self.causal:
            asking, asked = query.unsqueeze(0), key.unsqueeze(0)
            if self.order is not None:
                asking, asked = self.order[0].t().unsqueeze(2), self.order[1].t().unsqueeze(1)
            earlier = asked < asking if self.strict else asked <= asking
            if self.prefix is not None:
                earlier = earlier | (key.unsqueeze(0) < self.prefix.view(-1, 1, 1))
            visible = visible & earlier.unsqueeze(1)
        if self.window:
            visible = visible & ((query - key).abs() < self.window)
        if self.documents is not None:
            asking, asked = self.documents[0].t().unsqueeze(2), self.documents[1].t().unsqueeze(1)
            visible = visible & (asking == asked).unsqueeze(1)
        plain = not (self.causal or self.window or self.documents is not None)
        return None if plain else visible


CAUSAL, FULL = Mask(causal=True), Mask()


def spans(order: Tensor, document: Tensor, tile: int) -> Tensor:
    """int32 [batch, tiles, 4]: least and greatest order (or limit) and document of every ``tile`` keys or queries."""
    found = []
    for x in (order, document):
        n = x.shape[1]
        x = torch.cat((x, x[:, -1:].expand(-1, -n % tile)), 1).unflatten(1, (-1, tile))
        found += [x.amin(2), x.amax(2)]
    return torch.stack(found, 2).contiguous()


def check(mask: Mask, s: int, t: int, batch: int) -> None:
    """Raise ValueError where the mask's tensors do not fit [s, batch] queries and [t, batch] keys."""
    for name, pair in (("documents", mask.documents), ("order", mask.order)):
        if pair is not None and (pair[0].shape != (s, batch) or pair[1].shape != (t, batch)):
            raise ValueError(
                f"the mask's {name} are {list(pair[0].shape)} and {list(pair[1].shape)}: "
                f"give [{s}, {batch}] for the queries and [{t}, {batch}] for the keys"
            )
    if mask.prefix is not None and (not mask.causal or mask.prefix.shape != (batch,)):
        raise ValueError(f"a prefix needs a causal mask and one length for each of {batch} samples")
    if (mask.order is not None or mask.strict) and not mask.causal:
        raise ValueError("an order, or strict, needs a causal mask")
    if mask.window < 0:
        raise ValueError(f"the window of {mask.window} positions must be 0 (none) or more")


def documents_of(lengths: Tensor, batch: int = 1) -> Tensor:
    """Document numbers int64 [total, batch] of ``cu_seqlens`` [n + 1]: sequences end to end in one of ``total``."""
    total = int(lengths[-1])
    place = torch.arange(total, device=lengths.device)
    return (torch.searchsorted(lengths, place, right=True) - 1).unsqueeze(1).expand(total, batch).contiguous()


def alibi(slopes: Tensor, mask: Mask, s: int, t: int) -> Tensor:
    """Bias -slope x |distance| (arXiv 2108.12409) as fp32 (fp64) [heads, s + t - 1] for slopes [heads]."""
    return -_wide(slopes).unsqueeze(1) * distances(mask, s, t, slopes.device).abs()


def alibi_slopes(heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Slopes of the ALiBi paper: 2^(-8 i / n) for n a power of two; the rest from the next power's odd steps."""
    n = 1 << (heads.bit_length() - 1)
    own = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    return torch.tensor((own + [2.0 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)])[:heads], dtype=dtype)


def relative(table: Tensor, mask: Mask, s: int, t: int, *, two_sided: bool, farthest: int = 128) -> Tensor:
    """T5's relative bias (arXiv 1910.10683) as fp32 (fp64) [heads, s + t - 1] of a learned table [buckets, heads].

    Its gradient reaches the table through torch's indexing; versions of attention give that of the result.
    """
    buckets = bucket(distances(mask, s, t, table.device), table.shape[0], two_sided, farthest)
    return _wide(table[buckets].t())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def bucket(distance: Tensor, buckets: int, two_sided: bool, farthest: int) -> Tensor:
    """T5's bucket of each distance (key - query): half of them single distances, the others growing to ``farthest``."""
    first, near = torch.zeros_like(distance), -distance
    if two_sided:
        buckets //= 2
        first, near = (distance > 0).long() * buckets, distance.abs()
    near = near.clamp_min(0)
    exact = buckets // 2
    ratio = torch.log(near.clamp_min(1).double() / exact) / math.log(farthest / exact)
    far = (exact + ratio * (buckets - exact)).long().clamp_max(buckets - 1)
    return first + torch.where(near < exact, near, far)


def distances(mask: Mask, s: int, t: int, device: torch.device) -> Tensor:
    """int64 [s + t - 1]: position of the key - that of the query, in the order of a bias; (i, j) is s - 1 - i + j."""
    return torch.arange(s + t - 1, device=device) - (s - 1) + mask.k_offset - mask.q_offset
