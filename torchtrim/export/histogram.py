"""A histogram that widens while values stream in, and does not depend on the order they came in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 4096
_FINEST = 2.0**-20  # of the largest absolute value: float32 tells little more apart


class Histogram:
    """Counts of values in bins of equal width.

    The width is a power of two and the bins start at multiples of it. It is the smallest for which the range seen so
    far takes at most `BINS` bins, so it only grows, by merging neighbours: the counts are the same whether the values
    come at once or in parts. Where the range is more than a millionth of the values, at least `BINS / 2 - 1` bins are
    in use.

    Example:
        >>> histogram = Histogram()
        >>> histogram.add(np.array([0.0, 1.0]), 0.0, 1.0)
        >>> histogram.add(np.array([8.0]), 8.0, 8.0)
        >>> int(histogram.counts.sum()), float(histogram.edges[0]), bool(histogram.edges[-1] > 8)
        (3, 0.0, True)
    """

    def __init__(self) -> None:
        self.width = 0.0
        self.first = 0
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self.zeros = 0
        self._low = math.inf
        self._high = -math.inf

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bounds of the bins, one more than there are bins."""
        return np.asarray((self.first + np.arange(len(self.counts) + 1)) * self.width, np.float64)

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        return np.asarray((self.first + np.arange(len(self.counts)) + 0.5) * self.width, np.float64)

    def add(self, values: NDArray[Any], low: float, high: float) -> None:
        """Count values.

        Args:
            values: Finite ones, of any shape.
            low: Not above any of them.
            high: Not below any of them.
        """
        self._widen(min(self._low, low), max(self._high, high))
        values = values.reshape(-1)
        wide = values if values.dtype == np.float64 else values.astype(np.float32, copy=False)
        bins = np.floor(wide * wide.dtype.type(1 / self.width)).astype(np.int64) - self.first
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.zeros += int(values.size - np.count_nonzero(values))

    def _widen(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        width = _width(low, high)
        first, last = math.floor(low / width), math.floor(high / width)
        counts = np.zeros(last - first + 1, np.int64)
        if len(self.counts):
            # Both widths are powers of two and the old one is no larger, so each old bin lies inside one new bin.
            held = np.flatnonzero(self.counts)
            places = np.floor((self.first + held) * (self.width / width)).astype(np.int64) - first
            np.add.at(counts, places, self.counts[held])
        self.width, self.first, self.counts = width, first, counts


def _width(low: float, high: float) -> float:
    """The smallest power of two that covers the range in at most `BINS` bins and is not finer than floats are."""
    largest = max(abs(low), abs(high))
    if largest == 0:
        return 2.0**-100
    finest = 2.0 ** math.ceil(math.log2(largest * _FINEST))
    width = max(finest, 2.0 ** math.floor(math.log2(max(high - low, finest) / BINS)))
    while math.floor(high / width) - math.floor(low / width) >= BINS:
        width *= 2
    return max(width, 2.0**-100)
