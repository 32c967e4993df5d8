"""Which units go: by a ratio for each group, or ranked among all groups; widths rounded, families even."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from torchtrim.channels.groups import Dependencies, Group
from torchtrim.channels.labels import Mask

FloatArray: TypeAlias = npt.NDArray[np.float64]
Scope = Literal["uniform", "global", "isomorphic"]


def select(
    dependencies: Dependencies,
    scores: FloatArray,
    ratios: FloatArray,
    scope: Scope = "uniform",
    *,
    round_to: int = 8,
    min_channels: int = 1,
    max_ratio: float = 0.9,
) -> Mask:
    """Choose the units that go: the least important ones.

    Widths that stay are multiples of `round_to`: the nearest that there is. A layer less than twice as wide is rounded
    to half of that, and so on, so that it is pruned too. Of each group something stays.

    Args:
        dependencies: The groups.
        scores: The importance of each unit, `(units,)`; higher = keep.
        ratios: The fraction that is to go of each group, `(groups,)`.
        scope: `"uniform"`: each group loses its fraction. `"global"`: all groups with a ratio above 0 are ranked
            together, each unit by its score, and lose their fraction of all. `"isomorphic"`: so are those of the same
            structure (Fang et al., *Isomorphic Pruning for Vision Models*, ECCV 2024).
        round_to: What widths are rounded to; 1 for none.
        min_channels: How many channels stay of each group at least.
        max_ratio: The largest fraction that may go of a group.

    Returns:
        Whether each unit goes, `(units,)`.
    """
    groups = dependencies.groups
    wanted = np.minimum(ratios if scope == "uniform" else _ranked(groups, scores, ratios, scope), max_ratio)
    gone = np.zeros(len(scores), dtype=bool)
    for family in _families(groups):
        share = float(np.mean([wanted[number] for number in family]))
        for number, kept in zip(family, _kept([groups[n] for n in family], share, round_to, min_channels), strict=True):
            units = groups[number].units
            gone[units[np.argsort(scores[units], kind="stable")[: len(units) - kept]]] = True
    for units in dependencies.one_of:
        if gone[units].all():
            gone[units[np.argmax(scores[units])]] = False
    return gone


def _ranked(groups: Sequence[Group], scores: FloatArray, ratios: FloatArray, scope: Scope) -> FloatArray:
    """The fraction of each group that is among the least important of all it is ranked with."""
    found = np.zeros(len(groups))
    together: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        if ratios[number] > 0:
            together.setdefault(group.structure if scope == "isomorphic" else "", []).append(number)
    for numbers in together.values():
        units = np.concatenate([groups[number].units for number in numbers])
        sizes = [len(groups[number].units) for number in numbers]
        each = np.repeat([groups[number].channels_each for number in numbers], sizes)
        share = np.repeat([ratios[number] for number in numbers], sizes)
        order = np.argsort(scores[units], kind="stable")
        cost = np.cumsum(each[order])
        goes = np.zeros(len(units), dtype=bool)
        goes[order[cost <= (share * each).sum() + 1e-9]] = True
        for number, part in zip(numbers, np.split(goes, np.cumsum(sizes)[:-1]), strict=True):
            found[number] = part.mean()
    return found


def _families(groups: Sequence[Group]) -> Iterator[list[int]]:
    found: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        found.setdefault(group.family, []).append(number)
    return iter(found.values())


def _kept(family: Sequence[Group], share: float, round_to: int, min_channels: int) -> list[int]:
    """How many units stay of each group of a family: of all the same fraction, the nearest that can be had.

    Where no fraction of each can be had, its blocs keep the same one.
    """
    blocs: dict[int, list[Group]] = {}
    for number, group in enumerate(family):
        blocs.setdefault(number, []).append(group)
    if math.gcd(*(len(group.units) for group in family)) == 1 < len(family):
        blocs.clear()
        for group in family:
            blocs.setdefault(group.bloc, []).append(group)
    several = list(blocs.values())
    counts = [sum(len(group.units) for group in bloc) for bloc in several]
    common = math.gcd(*counts)
    step = round_to
    while step > 1 and any(group.width < 2 * step for group in family):
        step //= 2
    least = {id(group): -(-min(min_channels, group.width) // group.channels_each) for group in family}
    parts = [
        part
        for part in range(1, common)
        if all(
            count * part // common >= sum(least[id(group)] for group in bloc)
            for count, bloc in zip(counts, several, strict=True)
        )
    ]
    rounded = [
        part
        for part in parts
        if all(sum(group.width for group in bloc) * part // common % step == 0 for bloc in several)
    ]
    best = min((*(rounded or parts), common), key=lambda part: (abs(part / common - (1 - share)), -part))
    kept: dict[int, int] = {}
    for count, bloc in zip(counts, several, strict=True):
        kept |= _shared_out(bloc, count * best // common, least)
    return [kept[id(group)] for group in family]


def _shared_out(bloc: Sequence[Group], count: int, least: Mapping[int, int]) -> dict[int, int]:
    """How many units of each group stay, of so many of all: one after the other, each to the group that is owed most.

    By the divisors of Webster and Sainte-Lague: with more to share out no group gets fewer.
    """
    kept = {id(group): max(1, least[id(group)]) for group in bloc} if len(bloc) > 1 else {id(bloc[0]): count}
    for _ in range(count - sum(kept.values())):
        owed = [group for group in bloc if kept[id(group)] < len(group.units)]
        kept[id(max(owed, key=lambda group: len(group.units) / (2 * kept[id(group)] + 1)))] += 1
    return kept
