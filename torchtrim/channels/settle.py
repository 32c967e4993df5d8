"""What every number that counts channels has to become once some are gone, and where a forward cannot follow."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torchtrim.channels.cost import Sizes
from torchtrim.channels.labels import Layer, Mask
from torchtrim.channels.run import Flow
from torchtrim.channels.widths import Attribute, Computed, Demand, Size, Source, attributes_of, sizes_of


@dataclass(frozen=True, eq=False)
class Broken:
    """A place that cannot follow.

    Attributes:
        where: The call, in words.
        layers: The channels at fault.
        reason: What is wrong, in words.
    """

    where: str
    layers: tuple[Layer, ...]
    reason: str


@dataclass
class Settled:
    """What `settle` found.

    Attributes:
        attributes: The new value of each number that a module holds and that has to change.
        broken: The places that cannot follow.
    """

    attributes: dict[Attribute, int] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)


def settle(flow: Flow, gone: Mask) -> Settled:
    """Work out what the numbers that modules hold have to become when channels are gone.

    First those that are given by themselves where a size is meant; then those that others are computed from, one
    unknown at a time; then every size is computed anew, and what comes out wrong is broken.

    Args:
        flow: The channels of the model.
        gone: Whether each channel goes.
    """
    demands = list(flow.demands)
    after = _sizes(demands, gone)
    known: dict[Attribute, int] = {}
    old: dict[Attribute, int] = {}
    found = Settled()
    for demand in demands:
        for attribute in attributes_of(demand.source):
            old.setdefault(attribute, 0)
        if isinstance(demand.source, Attribute):
            old[demand.source] = demand.given
            known.setdefault(demand.source, after[demand.size])
    values = _Values(known, flow.numbers, after)
    waiting = [demand for demand in demands if isinstance(demand.source, Computed)]
    while waiting:
        solved = [demand for demand in waiting if _solve(demand, values, 1)]
        solved = solved or [demand for demand in waiting if _solve(demand, values, _MOST)][:1]
        waiting = [demand for demand in waiting if demand not in solved]
        if not solved:
            break
    for demand in demands:
        right, now = after[demand.size], values.of(demand.source)
        if right != now:
            found.broken.append(Broken(demand.where, _layers(demand), _reason(demand, now, right)))
    found.attributes = {each: value for each, value in known.items() if flow.numbers.get(each) != value}
    return found


def _sizes(demands: list[Demand], gone: Mask) -> dict[Size, int]:
    """The sizes after, of all that demands speak of."""
    asked = list(dict.fromkeys(size for each in demands for size in (each.size, *sizes_of(each.source))))
    shapes = Sizes.of([tuple((size.shape, size.label) for size in asked)]).after(gone)[0]
    return {size: shape[size.axis] for size, shape in zip(asked, shapes, strict=True)}


@dataclass
class _Values:
    """What numbers are, when some of those that modules hold are new."""

    known: dict[Attribute, int]
    old: dict[Attribute, int]
    sizes: dict[Size, int]

    def of(self, source: Source) -> int | None:
        """The value of a number; `None` where it cannot be computed (a division by zero)."""
        if isinstance(source, int):
            return source
        if isinstance(source, Size):
            return self.sizes[source]
        if isinstance(source, Attribute):
            return self.known.get(source, self.old[source])
        operands = [self.of(each) for each in source.operands]
        plain = [each for each in operands if each is not None]
        if len(plain) < len(operands) or (source.function in (operator.floordiv, operator.mod) and not plain[1]):
            return None
        return int(source.function(*plain))


def _solve(demand: Demand, values: _Values, most: int) -> bool:
    """Find a number that is not known yet, where the demand is not met; returns whether there was one.

    Of several that are unknown one alone is changed: one that counts channels by its name before one that counts parts.
    """
    right = values.sizes[demand.size]
    if values.of(demand.source) == right:
        return False
    unknown = [each for each in dict.fromkeys(attributes_of(demand.source)) if each not in values.known]
    if len(unknown) > most:
        return False
    for attribute in sorted(unknown, key=lambda each: each.name.startswith(_PARTS)):
        for value in _candidates(values.old[attribute], demand.given, right):
            values.known[attribute] = value
            if values.of(demand.source) == right:
                return True
        del values.known[attribute]
    return False


_MOST = 3
_PARTS = ("num_", "n_", "groups", "radix", "factor", "scale", "heads")


def _candidates(old: int, before: int, after: int) -> list[int]:
    """What a number may have become: in proportion to the size, inversely, by as much less; else any smaller one."""
    likely = [old * after // max(before, 1), old * before // max(after, 1), old - (before - after)]
    return [*dict.fromkeys(each for each in likely if each > 0), *range(1, min(old, 4096) + 1)]


def _layers(demand: Demand) -> tuple[Layer, ...]:
    return (*demand.size.layers, *(layer for size in sizes_of(demand.source) for layer in size.layers))


def _reason(demand: Demand, now: int | None, right: int) -> str:
    names = [f"{each.path}.{each.name}".lstrip(".") for each in dict.fromkeys(attributes_of(demand.source))]
    if names:
        told = f"computed from {', '.join(names)}"
    else:
        told = "computed from another value's size" if sizes_of(demand.source) else "written into the forward"
    return f"a width in {demand.where} would be {now} and has to be {right}: it is {told}"
