"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11), as pure functions of what they belong to.

A weight depends on (seed, name, element index), a dropout decision on (seed, step, sample, position, feature, site):
never on the order of calls, the rank or the device. Any layout therefore draws the same numbers, and a recomputed
forward pass draws them again without saved generator state.

The references below are torch int64 and float64 arithmetic; ``csrc/cpu/philox.cpp`` is the same arithmetic in C++,
bit for bit: log, sine and cosine are polynomials of IEEE additions and multiplications (no fused multiply-add, no
libm), so the result does not depend on the machine either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megapre.random import native

MASK = 0xFFFFFFFF
CHUNK = 1 << 18
LN2 = 0.6931471805599453
QUARTER_TURN = math.pi / 2 / 2**30
"""Angle of one unit of a 32-bit phase, in radians."""
LOG_TERMS = tuple(1.0 / (2 * k + 1) for k in range(10))
SIN_TERMS = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9))
COS_TERMS = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 random bits per counter; all words int64 in [0, 2^32), shapes broadcast.

    Products wrap modulo 2^64, which leaves both 32-bit halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


# --- normal values: initial weights ---------------------------------------------------------------------------------


def normal(seed: int, name: str, shape: tuple[int, ...], offset: Sequence[int], size: Sequence[int]) -> Tensor:
    """A box of the logical tensor ``name`` of N(0, 1) values: float32 of shape ``size``, on the CPU.

    ``shape`` is the logical global shape, ``offset`` the box's first element. Element i (row-major, global) comes from
    Philox counter i >> 2: lanes 0, 1 are one Box-Muller pair (elements 0, 1 of the four), lanes 2, 3 the other. The
    key and the upper half of the counter are blake2b of seed and name. Any box is bitwise the slice of the whole.
    Raises ValueError when the box is not inside the tensor.
    """
    _check_box(name, shape, offset, size)
    if native.load():
        return normal_reference(seed, name, shape, offset, size)
    out = torch.empty(tuple(size), dtype=torch.float32)
    torch.ops.megapre.philox_normal_(out, list(name_words(seed, name)), list(shape), list(offset))
    return out


def normal_reference(
    seed: int, name: str, shape: tuple[int, ...], offset: Sequence[int], size: Sequence[int]
) -> Tensor:
    """``normal`` in torch arithmetic."""
    _check_box(name, shape, offset, size)
    words = name_words(seed, name)
    out = torch.empty(math.prod(size), dtype=torch.float32)
    for start in range(0, out.numel(), CHUNK):
        piece = out[start : start + CHUNK]
        local = torch.arange(start, start + piece.numel())
        index, stride = torch.zeros_like(local), 1
        for extent, first, length in zip(reversed(shape), reversed(list(offset)), reversed(list(size))):
            index += (local % length + first) * stride
            local, stride = local // length, stride * extent
        piece.copy_(_normal_at(index, words))
    return out.view(tuple(size))


def name_words(seed: int, name: str) -> tuple[int, int, int, int]:
    """Four 32-bit words that stand for (seed, name): two of key, two of counter."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    a, b, c, d = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12))
    return a, b, c, d


def _normal_at(index: Tensor, words: tuple[int, int, int, int]) -> Tensor:
    block, lane = index >> 2, index & 3
    high = [torch.full_like(block, word) for word in words[2:]]
    x = philox((block & MASK, block >> 32, *high), words[:2])
    second_pair = lane >= 2
    radius = _radius(torch.where(second_pair, x[2], x[0]))
    cosine, sine = _cos_sin(torch.where(second_pair, x[3], x[1]))
    return (radius * torch.where((lane & 1) == 1, sine, cosine)).float()


def _radius(x: Tensor) -> Tensor:
    """sqrt(-2 ln((x + 1) / 2^32)) for int64 x in [0, 2^32), in float64."""
    mantissa, exponent = torch.frexp((x + 1).double())
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    exponent = torch.where(low, exponent - 33, exponent - 32).double()
    s = (mantissa - 1.0) / (mantissa + 1.0)
    log = exponent * LN2 + 2.0 * s * _polynomial(s * s, LOG_TERMS)
    return torch.sqrt(log * -2.0)


def _cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle x / 2^32 turns, for int64 x in [0, 2^32), in float64."""
    quadrant = (x + 2**29) >> 30
    angle = (x - (quadrant << 30)).double() * QUARTER_TURN
    square = angle * angle
    sine, cosine = angle * _polynomial(square, SIN_TERMS), _polynomial(square, COS_TERMS)
    swap = (quadrant & 1) == 1
    c, s = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return torch.where(((quadrant + 1) & 2) == 2, -c, c), torch.where((quadrant & 2) == 2, -s, s)


def _polynomial(x: Tensor, terms: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        value = value * x + term
    return value


def _check_box(name: str, shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> None:
    inside = len(shape) == len(offset) == len(size) and all(
        0 <= o and 0 <= n and o + n <= extent for extent, o, n in zip(shape, offset, size)
    )
    if not inside:
        raise ValueError(f"box at {list(offset)} of size {list(size)} is not inside {name} of shape {list(shape)}")


# --- keep mask: dropout ---------------------------------------------------------------------------------------------


def keep_mask(
    seed: int,
    step: int,
    sites: Sequence[int],
    positions: Tensor,
    samples: Tensor,
    first: int,
    features: int,
    probability: float,
) -> Tensor:
    """What dropout keeps: bool [len(sites), P, B, features] for positions int64 [P] and samples int64 [B].

    Key: (mix(seed) xor the sample's upper 32 bits, step); counter: (sample's lower 32 bits, position, feature >> 2,
    site); lane: feature & 3, feature counting from ``first``. Kept when the word is >= probability x 2^32, so with
    probability 1 - p. Positions, sites, features and steps below 2^32. Raises ValueError for p outside [0, 1).
    """
    threshold(probability)
    if positions.device.type == "cpu" and not native.load():
        mixed, numbers = mix(seed), list(sites)
        return torch.ops.megapre.keep_mask(mixed, step, numbers, positions, samples, first, features, probability)
    return keep_mask_reference(seed, step, sites, positions, samples, first, features, probability)


def keep_mask_reference(
    seed: int,
    step: int,
    sites: Sequence[int],
    positions: Tensor,
    samples: Tensor,
    first: int,
    features: int,
    probability: float,
) -> Tensor:
    """``keep_mask`` in torch arithmetic, on the device of ``positions``."""
    limit = threshold(probability)
    site = torch.tensor(list(sites), dtype=torch.int64, device=positions.device).view(-1, 1, 1, 1)
    position, sample = positions.view(1, -1, 1, 1) & MASK, samples.view(1, 1, -1, 1)
    group = torch.arange(first >> 2, (first + features + 3) >> 2, device=positions.device).view(1, 1, 1, -1)
    key = ((sample >> 32) & MASK) ^ mix(seed)
    words = philox((sample & MASK, position, group, site & MASK), (key, step & MASK))
    kept = torch.stack([word >= limit for word in torch.broadcast_tensors(*words)], dim=-1).flatten(-2)
    return kept[..., first & 3 : (first & 3) + features].contiguous()


def uniform(seed: int, site: int, positions: Tensor, samples: Tensor) -> Tensor:
    """fp64 [P, B] in [0, 1): multiples of 2^-32, of positions int64 [P] and samples int64 [B].

    The first word of the key and counter of ``keep_mask`` at step 0 and feature 0. A sample number belongs to one visit
    of a text, so a run never draws the same twice.
    """
    position, sample = positions.view(-1, 1) & MASK, samples.view(1, -1)
    key = ((sample >> 32) & MASK) ^ mix(seed)
    words = philox((sample & MASK, position, torch.zeros_like(position), torch.full_like(position, site)), (key, 0))
    return torch.broadcast_tensors(*words)[0].double() / 2.0**32


def threshold(probability: float) -> int:
    """probability x 2^32, rounded: words below it are dropped. Raises ValueError outside [0, 1)."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout probability {probability} must be in [0, 1): set model.dropout accordingly")
    return min(math.floor(probability * 2.0**32 + 0.5), MASK)


def mix(seed: int) -> int:
    """32 well-mixed bits of a seed (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) & MASK
