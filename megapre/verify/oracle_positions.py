"""The oracle's positions, pair by pair and distance by distance, as the papers write them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megapre.config.schema import ModelConfig


def rotate(model: ModelConfig, x: Tensor, positions: Tensor) -> Tensor:
    """RoPE of x [batch, heads, seq, d] at ``positions`` [seq, batch]: pair i turns by position x its frequency."""
    half, d = model.head_dim // 2, model.head_dim
    frequencies = torch.tensor([frequency(model, i) for i in range(half)], dtype=torch.float64)
    turns = torch.polar(torch.ones(()).double(), positions.T[:, None, :, None] * frequencies)
    if model.rope_scaling == "yarn":
        turns = turns * (model.rope_attention or 1 + 0.1 * math.log(model.rope_factor))
    if model.rope_interleaved:
        pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], half, 2)) * turns
        return torch.view_as_real(pairs).flatten(-2)
    rotated = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat((rotated.real, rotated.imag), -1).view(*x.shape[:-1], d)


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Fixed positions [..., width], feature by feature."""
    columns = []
    for feature in range(width):
        angle = position.double() / 10000 ** ((feature - feature % 2) / width)
        columns.append(angle.cos() if feature % 2 else angle.sin())
    return torch.stack(columns, -1)


def slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head: a geometric sequence; where heads are no power of two, odd terms of the next one."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    rest = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)][::2]
    return torch.tensor((first + rest)[:heads], dtype=torch.float64)


def relative_bias(model: ModelConfig, table: Tensor, length: int) -> Tensor:
    """T5's bias [heads, query, key] of a table [buckets, heads], pair by pair."""
    buckets = [[bucket(model, key - query) for key in range(length)] for query in range(length)]
    return table[torch.tensor(buckets)].permute(2, 0, 1)


def bucket(model: ModelConfig, distance: int) -> int:
    """Bucket of key - query: half of them for each single distance, the rest growing by a constant factor."""
    count, first = model.relative_buckets, 0
    if model.architecture == "decoder":
        away = max(0, -distance)
    else:
        count //= 2
        first, away = (count if distance > 0 else 0), abs(distance)
    exact = count // 2
    if away < exact:
        return first + away
    way = math.log(away / exact) / math.log(model.relative_distance / exact)
    return first + min(count - 1, math.floor(exact + way * (count - exact)))


def distance_scores(
    model: ModelConfig, w: dict[str, Tensor], name: str, q: Tensor, k: Tensor, types: Tensor | None
) -> Tensor:
    """Scores, before their scale, of q and k [batch, heads, seq, d] as Transformer-XL and XLNet have them.

    (arXiv 1901.02860, equation 5; 1906.08237, section 2.5), with the distance query - key of every pair looked up;
    ``types`` [seq, batch] are segments of text.
    """
    length, heads, d = q.shape[2], model.heads, model.head_dim
    u, v = (w[f"{name}.{part}_bias"][:, None, :] for part in ("content", "position"))
    rows = []
    for distance in range(-length + 1, length):
        far = model.relative_clamp or length
        angles = [max(-far, min(far, distance)) / 10000 ** (2 * i / model.hidden) for i in range(model.hidden // 2)]
        rows.append([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])
    r = (torch.tensor(rows, dtype=torch.float64) @ w[f"{name}.distance.weight"].T).view(-1, heads, d)
    place = torch.arange(length)
    apart = place[:, None] - place[None, :] + length - 1  # row of r
    scores = (q + u) @ k.transpose(-1, -2) + torch.einsum("bhid,ijhd->bhij", q + v, r[apart])
    if not model.token_types:
        return scores
    types = torch.zeros(length, q.shape[0]).long() if types is None else types
    bias, same, other = (w[f"{name}.segment_{part}"] for part in ("bias", "same", "other"))
    alike = (types.T[:, :, None] == types.T[:, None, :])[:, None, :, :, None]
    met = torch.where(alike, same[:, None, None, :], other[:, None, None, :])  # [batch, heads, query, key, d]
    return scores + torch.einsum("bhid,bhijd->bhij", q + bias[:, None, :], met)


def frequency(model: ModelConfig, i: int) -> float:
    """Radians a position of pair ``i``."""
    d, theta, factor = model.head_dim, model.rope_theta, model.rope_factor
    plain = theta ** (-2 * i / d)
    if model.rope_scaling == "linear":
        return plain / factor
    if model.rope_scaling == "ntk":
        return (theta * factor ** (d / (d - 2))) ** (-2 * i / d)
    high = model.rope_high or (32 if model.rope_scaling == "yarn" else 4)
    if model.rope_scaling == "yarn":
        kept = 1 - _ramp(i, *(_pair_of(model, turns) for turns in (high, model.rope_low)))
        return kept * plain + (1 - kept) * plain / factor
    if model.rope_scaling == "llama3":
        wavelength = 2 * math.pi / plain
        if wavelength < model.rope_original / high:
            return plain
        if wavelength > model.rope_original / model.rope_low:
            return plain / factor
        smooth = (model.rope_original / wavelength - model.rope_low) / (high - model.rope_low)
        return (1 - smooth) * plain / factor + smooth * plain
    return plain


def _pair_of(model: ModelConfig, turns: float) -> float:
    """The pair, not rounded, that makes so many turns over the original length: theta^(-2i/d) L = 2 pi turns."""
    return model.head_dim / 2 * math.log(model.rope_original / (2 * math.pi * turns), model.rope_theta)


def _ramp(i: int, first: float, last: float) -> float:
    """0 up to pair ``first``, 1 from ``last`` on; the authors' code rounds both outwards."""
    low, high = max(0, math.floor(first)), math.ceil(last)
    if i <= low:
        return 0.0
    return min(1.0, (i - low) / (high - low)) if high > low else 1.0
