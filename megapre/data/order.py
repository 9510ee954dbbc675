"""Which tokens sample n of a source holds: computed from (seed, n), never stored.

The tokens of a source's split, [lo, hi), are a ring, cut into windows of L tokens from a phase that changes with
the epoch. Windows are visited in the order of a two-level keyed permutation: blocks of neighbouring windows are
permuted over the whole split, then windows within groups of blocks, so that reads stay local to a group.
The permutation is a Feistel network on a rectangle barely larger than its domain, with cycle walking
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, isqrt

from megapre.data import native

BLOCK = 16
"""Neighbouring windows that the first level keeps together."""
GROUP = 4096 * BLOCK
"""Windows that the second level mixes: at 2,048 tokens of two bytes, 256 MiB."""

EPOCHS_KEPT = 4
"""Epochs whose keys a source remembers."""

_MASK = (1 << 64) - 1
_ROUNDS = tuple((2 * r + 1) * 0x9E3779B97F4A7C15 & _MASK for r in range(8))


def mix(x: int) -> int:
    """Hash of a 64-bit integer (the finaliser of splitmix64)."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def derive_key(*parts: int) -> int:
    """64-bit key of a tuple of integers."""
    key = 0
    for part in parts:
        key = mix(key + mix(part + _ROUNDS[0]) + _ROUNDS[1])
    return key


def permute(index: int, size: int, key: int) -> int:
    """Image of ``index`` under the keyed permutation of [0, size), by csrc/data where it is built."""
    found = native.library()
    if found is not None and size < 1 << 52:  # there the square root of a double is exact enough
        image: int = found.megapre_permute(index, size, key)
        return image
    return permute_reference(index, size, key)


def permute_reference(index: int, size: int, key: int) -> int:
    """The definition of ``permute``."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for r in range(0, len(_ROUNDS), 2):
            row = (row + mix(column * _ROUNDS[r] + key)) % rows
            column = (column + mix(row * _ROUNDS[r + 1] + key)) % columns
        index = row * columns + column
        if index < size:
            return index


def unpermute(index: int, size: int, key: int) -> int:
    """The index whose image under ``permute`` is ``index``."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for r in range(len(_ROUNDS) - 2, -1, -2):
            column = (column - mix(row * _ROUNDS[r + 1] + key)) % columns
            row = (row - mix(column * _ROUNDS[r] + key)) % rows
        index = row * columns + column
        if index < size:
            return index


def two_level(index: int, size: int, key: int, short_slot: int, block: int = BLOCK, group: int = GROUP) -> int:
    """Window visited at place ``index`` of an epoch of ``size`` windows.

    ``short_slot`` is ``short_block_slot(size, key)``: the last block may be short, and the places after its slot
    move up by what it lacks. By csrc/data where it is built.
    """
    found = native.library()
    if found is not None and size < 1 << 52:
        window: int = found.megapre_two_level(index, size, key, short_slot, block, group)
        return window
    return two_level_reference(index, size, key, short_slot, block, group)


def two_level_reference(
    index: int, size: int, key: int, short_slot: int, block: int = BLOCK, group: int = GROUP
) -> int:
    """`two_level` by its definition."""
    g, within = divmod(index, group)
    place = g * group + permute_reference(within, min(group, size - g * group), derive_key(key, g + 1))
    last = size % block
    if last and place >= short_slot * block + last:
        place += block - last
    slot, offset = divmod(place, block)
    return permute_reference(slot, -(-size // block), key) * block + offset


def two_level_place(window: int, size: int, key: int, short_slot: int, block: int = BLOCK, group: int = GROUP) -> int:
    """The place at which ``two_level`` visits ``window``."""
    number, offset = divmod(window, block)
    place = unpermute(number, -(-size // block), key) * block + offset
    last = size % block
    if last and place >= (short_slot + 1) * block:
        place -= block - last
    g, within = divmod(place, group)
    return g * group + unpermute(within, min(group, size - g * group), derive_key(key, g + 1))


def short_block_slot(size: int, key: int, block: int = BLOCK) -> int:
    """Slot of the last, perhaps short, block in the order of blocks."""
    blocks = -(-size // block)
    return unpermute(blocks - 1, blocks, key)


@dataclass(frozen=True)
class _Epoch:
    number: int
    key: int
    phase: int
    short_slot: int


class SampleOrder:
    """Samples of one split of one source: rank r, counted over epochs, to token spans. O(1), without arrays.

    Every epoch visits each of ``windows`` = (hi - lo) // length windows once and leaves out fewer than ``length``
    tokens, other ones in another epoch. ``stream`` separates sources and splits under one seed.
    Raises ValueError when the split holds fewer than ``length`` + 1 tokens.
    """

    def __init__(self, seed: int, stream: int, lo: int, hi: int, length: int, name: str = "the source") -> None:
        if hi - lo < length + 1:
            raise ValueError(
                f"{name} has {hi - lo} tokens in its split, fewer than the {length + 1} of one sample: "
                "shorten model.sequence, change data.split or drop the path from data.paths."
            )
        self.lo, self.hi, self.length = lo, hi, length
        self.windows = (hi - lo) // length
        self._key = derive_key(seed, stream)
        # A stride coprime to L near L / golden ratio: L consecutive epochs have L different, well spread phases.
        stride = max(1, round(length * 0.6180339887498949))
        while gcd(stride, length) != 1:
            stride += 1
        self._stride = stride
        self._epochs: dict[int, _Epoch] = {}

    def epoch(self, rank: int) -> int:
        """Epoch of the source's sample ``rank``."""
        return rank // self.windows

    def phase(self, epoch: int) -> int:
        """Tokens by which the windows of an epoch are shifted, in [0, length)."""
        return (self._key + epoch * self._stride) % self.length

    def window(self, rank: int) -> int:
        """Window, in [0, windows), that the source's sample ``rank`` holds."""
        number, place = divmod(rank, self.windows)
        epoch = self._at(number)
        return two_level(place, self.windows, epoch.key, epoch.short_slot)

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """Token ranges [start, stop) of sample ``rank``, ``length`` + 1 tokens in all.

        One range, or two for the window that runs over the end of the split, which is a document's end, and
        goes on at the split's first document.
        """
        number, place = divmod(rank, self.windows)
        epoch = self._at(number)
        window = two_level(place, self.windows, epoch.key, epoch.short_slot)
        size = self.hi - self.lo
        start = (epoch.phase + window * self.length) % size
        over = start + self.length + 1 - size
        if over <= 0:
            return [(self.lo + start, self.lo + start + self.length + 1)]
        return [(self.lo + start, self.hi), (self.lo, self.lo + over)]

    def ranks(self, start: int, stop: int, epoch: int) -> list[int]:
        """Ranks of an epoch's samples that hold, as input or target, any of the source's tokens [start, stop)."""
        state, size = self._at(epoch), self.hi - self.lo
        found = set()
        for token in {*range(max(start, self.lo), min(stop, self.hi), self.length), min(stop, self.hi) - 1}:
            if self.lo <= token < self.hi:
                place = (token - self.lo - state.phase) % size
                # A window's last token is the next one's first; the window that ends the ring takes in what follows.
                near = {place // self.length, (place - 1) // self.length if place else -1}
                if place == 0:
                    near.add(self.windows - 1 if self.windows * self.length == size else -1)
                found |= {window for window in near if 0 <= window < self.windows}
        key, slot = state.key, state.short_slot
        return sorted(epoch * self.windows + two_level_place(w, self.windows, key, slot) for w in found)

    def _at(self, number: int) -> _Epoch:
        # The reading thread and a direct caller may race here: both write a correct, immutable value.
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._make_epoch(number)
            self._epochs = {**(self._epochs if len(self._epochs) < EPOCHS_KEPT else {}), number: epoch}
        return epoch

    def _make_epoch(self, number: int) -> _Epoch:
        key = derive_key(self._key, number)
        return _Epoch(number, key, self.phase(number), short_block_slot(self.windows, key))


def split_documents(documents: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Ranges of documents, one per share, in stored order; ValueError on shares that are negative or sum to 0."""
    total = sum(shares)
    if not shares or min(shares) < 0 or not total > 0:
        raise ValueError(f"data.split = {list(shares)} needs shares that are not negative and not all 0.")
    bounds, passed = [0], 0.0
    for share in shares:
        passed += share
        bounds.append(min(documents, round(passed / total * documents)))
    bounds[-1] = documents
    return list(pairwise(bounds))
