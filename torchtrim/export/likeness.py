"""Whether data looks like the example: pictures that were not normalised calibrate without a word, and wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FAR = 10.0  # times; that is far from what other rows of the same kind differ by, and below what 0 to 255 gives


@dataclass
class Spread:
    """The range, the mean and the standard deviation of what was added.

    Example:
        >>> seen = Spread()
        >>> seen.add(np.array([0.0, 2.0]))
        >>> seen.add(np.array([4.0, 6.0]))
        >>> print(seen)
        0 to 6, mean 3, deviation 2.24
    """

    count: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[Any]) -> None:
        """Add finite values."""
        if not values.size:
            return
        exact = values.astype(np.float64)
        self.count += exact.size
        self.low, self.high = min(self.low, float(exact.min())), max(self.high, float(exact.max()))
        self.total += float(exact.sum())
        self.squares += float((exact * exact).sum())

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(abs(self.low), abs(self.high)) if self.count else 0.0

    @property
    def size(self) -> float:
        """The root of the mean square: it grows with the mean as well as with the deviation."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    def __str__(self) -> str:
        mean = self.total / self.count
        deviation = float(np.sqrt(max(0.0, self.squares / self.count - mean * mean)))
        return f"{self.low:.3g} to {self.high:.3g}, mean {mean:.3g}, deviation {deviation:.3g}"


def unlike(seen: Mapping[str, Spread], example: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """What to say of inputs whose values are ten times larger or smaller than those of the example.

    An example of zeros says nothing.

    Args:
        seen: What was seen of each input.
        example: The example's inputs.

    Example:
        >>> seen = Spread()
        >>> seen.add(np.array([0.0, 255.0]))
        >>> print(unlike({"x": seen}, {"x": np.array([-1.0, 1.0], np.float32)})["x"])
        x is unlike the example: 0 to 255, mean 128, deviation 128 in the data, -1 to 1, mean 0, deviation 1 there: ...
    """
    found = {}
    for name, spread in seen.items():
        ours = Spread()
        array = example.get(name)
        if array is not None and np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all():
            ours.add(array)
        if not ours.size or not spread.size:
            continue
        times = (spread.largest / ours.largest, spread.size / ours.size)
        if max(times) >= _FAR or min(times) <= 1 / _FAR:
            found[name] = (
                f"{name} is unlike the example: {spread} in the data, {ours} there: is it normalised as the model "
                "expects?"
            )
    return found
