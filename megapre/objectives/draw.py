"""Random numbers of one sample."""

from __future__ import annotations

import numpy as np

from megapre.objectives.example import Setting


class Draw:
    """A stream that is a pure function of (seed, split, number of the sample).

    Philox (Salmon et al. 2011) read as raw 64-bit words: numpy's generator methods may change their stream between
    versions, the words may not.
    """

    def __init__(self, setting: Setting, number: int) -> None:
        self._bits = np.random.Philox(key=[setting.seed % 2**64, number], counter=[0, 0, 0, setting.stream])

    def words(self, count: int) -> np.ndarray:
        """uint64 [count]."""
        words: np.ndarray = self._bits.random_raw(count)
        return words

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count] in [0, 1)."""
        return shares(self.words(count))

    def below(self, limit: int, count: int) -> np.ndarray:
        """int64 [count] in [0, limit)."""
        return (self.words(count) % np.uint64(limit)).astype(np.int64)

    def integer(self, limit: int) -> int:
        """One number in [0, limit)."""
        return int(self.below(limit, 1)[0])

    def happens(self, probability: float) -> bool:
        """True with ``probability``."""
        return float(self.uniform(1)[0]) < probability

    def order(self, count: int) -> np.ndarray:
        """A permutation of [0, count), int64."""
        return np.argsort(self.words(count), kind="stable")

    def subset(self, total: int, count: int) -> np.ndarray:
        """``count`` different numbers of [0, total), ascending, int64."""
        return np.sort(self.order(total)[:count])

    def parts(self, total: int, count: int) -> np.ndarray:
        """``total`` as ``count`` positive numbers that sum to it, each such list as likely as any other, int64."""
        cuts = self.subset(total - 1, count - 1) + 1
        return np.diff(np.concatenate(([0], cuts, [total])))


def shares(words: np.ndarray) -> np.ndarray:
    """Words as float64 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
