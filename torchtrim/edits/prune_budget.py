"""How many channels have to go for a model to stay within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from torchtrim.channels.cost import macs, params, size_mb
from torchtrim.channels.groups import Dependencies
from torchtrim.channels.labels import Mask
from torchtrim.edits.budget import Budget
from torchtrim.graph.summary import short

Cost = Mapping[str, float]
_RATIOS = 1 << 10  # ratios that lie nearer to each other are not told apart


@dataclass(frozen=True, eq=False)
class Within:
    """A choice of units, made for a budget.

    Attributes:
        units: Whether each unit goes.
        ratio: The ratio it was found at: the largest that any group of it was asked for.
        cost: What is left, by the names of the limits.
        original: What there was.
        missed: The limits that are not kept; empty where all are.
    """

    units: Mask
    ratio: float
    cost: Cost
    original: Cost
    missed: tuple[str, ...]

    def told(self) -> str:
        """What was reached, in words.

        Example:
            >>> none = np.zeros(3, dtype=bool)
            >>> Within(none, 0.25, {"macs": 600, "size_mb": 0.5}, {"macs": 1200, "size_mb": 1.0}, ()).told()
            'MACs 600 of 1.20 k (50.0%), size 0.50 MB of 1.00 MB (50.0%)'
        """
        return ", ".join(
            f"{_NAMES[name][0]} {_number(name, left)} of {_number(name, self.original[name])}"
            f" ({left / max(self.original[name], 1e-9):.1%})"
            for name, left in self.cost.items()
        )


def units_within(
    budget: Budget,
    model: nn.Module,
    dependencies: Dependencies,
    scores: npt.NDArray[np.float64],
    choose: Callable[[float], Mask],
    *,
    most: float,
) -> Within:
    """The smallest choice of a model's units that keeps the computed limits of a budget.

    Args:
        budget: The limits; its latency is left aside.
        model: The model that was followed.
        dependencies: Its groups of units.
        scores: The importance of each unit.
        choose: The units that go at a ratio, `(units,)`. At a larger ratio more go.
        most: The largest ratio to try.

    Returns:
        The choice. Where no choice keeps all limits, that of the largest ratio, and what it misses.
    """

    def cost(units: Mask) -> Cost:
        return cost_of(budget, model, dependencies, units)

    together: dict[int, list[npt.NDArray[np.int64]]] = {}
    for group in dependencies.groups:
        together.setdefault(group.family, []).append(group.units)
    families = [np.concatenate(each) for each in together.values()]
    families.sort(key=lambda units: float(np.median(scores[units])))
    return smallest(budget, cost, choose, families, most=most)


def cost_of(budget: Budget, model: nn.Module, dependencies: Dependencies, units: Mask) -> Cost:
    """What is left of a model when units go, by the names of a budget's computed limits."""
    flow, gone = dependencies.flow, dependencies.gone(units)
    found: dict[str, float] = {}
    for name in budget.computed:
        if name == "macs":
            found[name] = macs(flow, gone)
        else:
            found[name] = params(model, flow, gone) if name == "params" else size_mb(model, flow, gone)
    return found


def smallest(
    budget: Budget,
    cost: Callable[[Mask], Cost],
    choose: Callable[[float], Mask],
    families: Sequence[npt.NDArray[np.int64]],
    *,
    most: float,
) -> Within:
    """The smallest choice of units that keeps the computed limits of a budget.

    First the ratio is bisected. Between the last ratio that is too large a model and the first that is not, the groups
    change by whole steps (the widths are rounded), all at once where they are alike; so the groups then take that last
    step one after the other, as far as it has to go.

    Args:
        budget: The limits; its latency is left aside.
        cost: What is left when units go, by the names of the limits (`macs`, `params`, `size_mb`).
        choose: The units that go at a ratio. At a larger ratio more go.
        families: The units that take a step together, in the order in which they should: those that matter least first.
        most: The largest ratio to try.

    Returns:
        The choice. Where no choice keeps all limits, that of the largest ratio, and what it misses.

    Example:
        >>> def choose(ratio):  # four units of each of two groups, the first ones first
        ...     return np.tile(np.arange(4) < round(4 * ratio), 2)
        >>> def cost(units):
        ...     return {"macs": float((~units[:4]).sum() * (~units[4:]).sum())}
        >>> found = smallest(Budget(macs=0.5), cost, choose, [np.arange(4), np.arange(4, 8)], most=0.9)
        >>> found.units.astype(int), found.cost
        (array([1, 1, 0, 0, 1, 0, 0, 0]), {'macs': 6.0})
    """
    few, many = choose(0.0), choose(most)
    original = {name: cost(np.zeros_like(few))[name] for name in budget.computed}
    limits = budget.limits(original)

    def within(units: Mask, ratio: float) -> Within:
        left = cost(units)
        held = {name: left[name] for name in limits}
        return Within(units, ratio, held, original, tuple(name for name in limits if held[name] > limits[name]))

    first = within(few, 0.0)
    if not first.missed:
        return first
    best = within(many, most)
    if best.missed:
        return best
    low, high = 0, round(most * _RATIOS)
    while high - low > 1 and bool((few != many).any()):
        middle = (low + high) // 2
        found = within(choose(middle / _RATIOS), middle / _RATIOS)
        if found.missed:
            low, few = middle, found.units
        else:
            high, many, best = middle, found.units, found
    steps = [units for units in families if bool((few[units] != many[units]).any())]
    low, high = 0, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        mixed = few.copy()
        for units in steps[:middle]:
            mixed[units] = many[units]
        found = within(mixed, best.ratio)
        if found.missed:
            low = middle
        else:
            high, best = middle, found
    return best


_NAMES = {"macs": ("MACs", ""), "params": ("parameters", ""), "size_mb": ("size", " MB")}


def _number(name: str, value: float) -> str:
    unit = _NAMES[name][1]
    return f"{value:.2f}{unit}" if unit else short(round(value))
