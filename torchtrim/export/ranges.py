"""From a histogram to the range that a tensor is quantized in."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from torchtrim.export.histogram import Histogram

METHODS = ("minmax", "entropy", "percentile", "mse")
PERCENTILE = 99.99


def range_of(histogram: Histogram, low: float, high: float, method: str) -> tuple[float, float]:
    """The range to keep of a tensor.

    `minmax` keeps all of it. `percentile` cuts off 0.005% of the values on each side. `entropy` takes the threshold
    after which the 8-bit distribution tells least apart from the original by Kullback-Leibler divergence (S. Migacz,
    "8-bit Inference with TensorRT", 2017). `mse` takes the bounds with the least expected squared error of 8 bits:
    what clipping costs, in full, and a twelfth of a squared step for the others (Banner et al., "Post-training 4-bit
    quantization", 2019; Nagel et al., "A White Paper on Neural Network Quantization", 2021); exact zeros cost nothing.

    Args:
        histogram: The values.
        low: The smallest one.
        high: The largest one.
        method: One of `METHODS`.

    Returns:
        The lowest and the highest value kept; never outside of `low` and `high`.

    Example:
        >>> histogram = Histogram()
        >>> values = np.concatenate([np.linspace(0, 1, 100_000), [50.0]])
        >>> histogram.add(values, 0.0, 50.0)
        >>> low, high = range_of(histogram, 0.0, 50.0, "percentile")
        >>> low, 0.9 < high < 1.1
        (0.0, True)
    """
    if method == "minmax" or low == high or len(histogram.counts) < 3:
        return low, high
    if method == "percentile":
        found = _percentile(histogram)
    elif method == "entropy":
        found = _entropy(histogram)
    else:
        found = _least_error(histogram, low, high)
    return float(max(low, found[0])), float(min(high, found[1]))


def _percentile(histogram: Histogram) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (100 - PERCENTILE) / 200
    edges = histogram.edges
    lower = int(np.searchsorted(share, tail, side="right"))
    upper = int(np.searchsorted(share, 1 - tail, side="left"))
    return float(edges[lower]), float(edges[min(upper, len(share) - 1) + 1])


def _entropy(histogram: Histogram) -> tuple[float, float]:
    """Search one threshold for the absolute values: with 128 levels, or 256 where no value is negative."""
    size = np.abs(histogram.centres)
    places = np.floor(size / histogram.width).astype(np.int64)
    counts = np.bincount(places, weights=histogram.counts).astype(np.float64)
    levels = 128 if histogram.edges[0] < 0 else 256
    counts[0] = max(0.0, counts[0] - histogram.zeros)  # zero is a level of its own, and says nothing of the rest
    total = len(counts)
    if total <= levels or not counts.sum():
        return float(histogram.edges[0]), float(histogram.edges[-1])
    step = max(1, (total - levels) // 256)
    best, threshold = np.inf, total
    for kept in [*range(levels, total, step), total]:
        divergence = _divergence(counts, kept, levels)
        if divergence < best:
            best, threshold = divergence, kept
    bound = threshold * histogram.width
    return -bound, bound


def _divergence(counts: NDArray[np.float64], kept: int, levels: int) -> float:
    """How much is lost by clipping at `kept` bins and merging those into `levels`."""
    inside = counts[:kept]
    reference = inside.copy()
    reference[-1] += counts[kept:].sum()
    group = np.arange(kept) * levels // kept
    present = inside > 0
    sums = np.bincount(group, weights=inside, minlength=levels)
    filled = np.bincount(group, weights=present, minlength=levels)
    spread = np.divide(sums, filled, out=np.zeros(levels), where=filled > 0)
    candidate = np.where(present, spread[group], 0.0)
    weight = candidate.sum()
    if not weight:
        return np.inf
    p, q = reference / reference.sum(), candidate / weight
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-9))).sum())


def _least_error(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """Try bounds at shares of the lowest and of the highest value."""
    centres, counts = histogram.centres, histogram.counts.astype(np.float64)
    moments = [np.concatenate([[0.0], np.cumsum(counts * centres**power)]) for power in range(3)]
    total = moments[0][-1]
    shares = np.concatenate([np.geomspace(1 / 64, 0.25, 12, endpoint=False), np.linspace(0.25, 1.0, 48)])

    def clipped(bound: float, above: bool) -> float:
        place = int(np.searchsorted(centres, bound))
        n, first, second = (m[-1] - m[place] if above else m[place] for m in moments)
        return float(second - 2 * bound * first + bound * bound * n)

    lows = [(0.0, 0.0)] if low >= 0 else [(low * share, clipped(low * share, False)) for share in shares]
    highs = [(0.0, 0.0)] if high <= 0 else [(high * share, clipped(high * share, True)) for share in shares]
    rounded = max(0.0, total - histogram.zeros)
    best = min(
        product(lows, highs),
        key=lambda pair: pair[0][1] + pair[1][1] + rounded * (pair[1][0] - pair[0][0]) ** 2 / 255**2 / 12,
    )
    return (low if low >= 0 else best[0][0]), (high if high <= 0 else best[1][0])
