"""The few values that stand best for many: k-means along a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from torchtrim.errors import ModelError

ClusterInit = Literal["linear", "density"]
_Numbers = npt.NDArray[np.float64]
_ROUNDS = 100
_TINY = 1e-12  # of all squares: what is left of an error that is none
_AT_ONCE = 2**22  # weights that are put to their values at once


@dataclass(frozen=True, eq=False)
class Shared:
    """A weight as a few values and which of them each entry has.

    Attributes:
        values: The values, in the weight's type, ascending but for zero, which is the first where the weight has zeros.
        index: The number of each entry's value, as bytes in the weight's shape.
        keeps_zero: Whether the first value is the zero of entries that were zero.
    """

    values: torch.Tensor
    index: torch.Tensor
    keeps_zero: bool

    def weight(self) -> torch.Tensor:
        """The weight that they make."""
        return self.values[self.index.int()]


def share(name: str, weight: torch.Tensor, clusters: int, init: ClusterInit) -> Shared:
    """Find the values that are nearest to a weight's entries, in the mean of squares, and put each to its nearest.

    Lloyd's algorithm on the sorted entries, where a cluster is a stretch and its mean a difference of two sums. Zeros
    are a cluster of their own, so that what was pruned stays so.

    Args:
        name: The weight's name, for messages.
        weight: The weight.
        clusters: How many values at most, zero among them.
        init: Where they start: spread evenly from the smallest to the largest (`"linear"`, which keeps the few large
            weights apart: Han, Mao and Dally, *Deep compression*, 2016), or as many weights to each (`"density"`).

    Raises:
        ModelError: It holds NaN or infinity.

    Example:
        >>> found = share("w", torch.tensor([0.0, 1.0, 1.2, -3.0, 0.0]), 3, "linear")
        >>> found.values, found.index.tolist()
        (tensor([ 0.0000, -3.0000,  1.1000]), [0, 2, 2, 1, 0])
    """
    flat = weight.detach().flatten()
    if not bool(torch.isfinite(flat).all()):
        raise ModelError("weights that are not finite cannot be shared", path=name, hint="the last good state")
    zero = flat == 0
    keeps_zero = bool(zero.any())
    entries: _Numbers = np.sort(flat[~zero].to("cpu", torch.float64).numpy())
    count = clusters - keeps_zero
    centres = _lloyd(entries, _start(entries, count, init)) if entries.size and count else np.zeros(0)
    values = torch.as_tensor(centres).to(weight.dtype).unique()  # ascending
    index = torch.zeros(flat.numel(), dtype=torch.uint8, device=flat.device)
    if values.numel():
        plain = values.double()
        bounds = ((plain[1:] + plain[:-1]) / 2).to(flat.device)
        for at in range(0, flat.numel(), _AT_ONCE):
            index[at : at + _AT_ONCE] = torch.bucketize(flat[at : at + _AT_ONCE].double(), bounds).to(torch.uint8)
    if keeps_zero:
        index = torch.where(zero, 0, index + bool(values.numel()))
        values = torch.cat([torch.zeros(1, dtype=values.dtype), values])
    used, index = _renumbered(index, values.numel())
    return Shared(values[used].to(flat.device), index.reshape(weight.shape), keeps_zero)


def _start(entries: _Numbers, count: int, init: ClusterInit) -> _Numbers:
    if init == "linear":
        return np.linspace(entries[0], entries[-1], count)
    places = ((np.arange(count) + 0.5) / count * entries.size).astype(np.int64)
    found: _Numbers = np.unique(entries[places])
    return found


def _lloyd(entries: _Numbers, centres: _Numbers) -> _Numbers:
    sums, squares = (np.concatenate([[0.0], np.cumsum(each)]) for each in (entries, entries**2))
    for _ in range(_ROUNDS):
        inner = np.searchsorted(entries, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], inner, [entries.size]])
        counts = np.diff(ends)
        totals = np.diff(sums[ends])
        means = np.divide(totals, counts, out=centres.copy(), where=counts > 0)
        errors = np.diff(squares[ends]) - means * totals
        # A value that nothing is near to (pruning leaves a gap around zero) goes where the error is largest instead.
        worst = np.argsort(-errors, kind="stable")
        for empty, crowded in zip(np.flatnonzero(counts == 0), worst, strict=False):
            if errors[crowded] > _TINY * squares[-1] and counts[crowded] > 1:
                means[empty] = entries[ends[crowded] + 3 * int(counts[crowded]) // 4]
        moved = float(np.abs(means - centres).max())
        centres = np.sort(means)
        if moved <= 1e-9 * float(np.abs(centres).max()):
            break
    return centres


def _renumbered(index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers that occur, and the index with those alone counted."""
    occurs = torch.bincount(index.int(), minlength=count).cpu() > 0
    numbers: Any = (occurs.cumsum(0) - 1).to(torch.uint8).to(index.device)
    return occurs.nonzero().flatten(), numbers[index.int()]


def cluster_sums(entries: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """The sum of the entries of each cluster, in double precision; the same bits each time, on every device.

    Example:
        >>> cluster_sums(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0], dtype=torch.uint8), 2)
        tensor([4., 2.], dtype=torch.float64)
    """
    flat, numbers = entries.flatten(), index.flatten()
    if flat.device.type == "cpu":
        return torch.bincount(numbers.int(), weights=flat.double(), minlength=count)
    return sorted_sums(flat, numbers, count)  # atomic additions elsewhere come in any order


def cluster_means(entries: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of the entries of each cluster, in double precision; 0 of an empty one.

    Of entries that are equal already it is that value, to the bit, once it is in the entries' type.

    Example:
        >>> cluster_means(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0], dtype=torch.uint8), 2)
        tensor([2., 2.], dtype=torch.float64)
    """
    sizes = torch.bincount(index.flatten().int(), minlength=count)
    if entries.dtype != torch.float64:  # the error of a sum in double precision is lost with its last bits
        return cluster_sums(entries, index, count) / sizes.clamp(min=1)
    numbers = index.flatten().long()
    least = torch.zeros(count, dtype=entries.dtype, device=entries.device)
    least.scatter_reduce_(0, numbers, entries.flatten(), "amin", include_self=False)
    above = cluster_sums(entries.flatten() - least[numbers], index, count)
    return least + above / sizes.clamp(min=1)


def sorted_sums(flat: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """`cluster_sums`, by sorting the entries first."""
    order = numbers.argsort(stable=True)
    sizes = torch.bincount(numbers.int(), minlength=count).tolist()
    return torch.stack([part.sum() for part in flat.double()[order].split(sizes)])
