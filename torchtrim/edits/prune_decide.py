"""Decide which channels go: choose them, try the narrower model on shapes alone, leave alone what does not follow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from torchtrim.channels.follow import Flow
from torchtrim.channels.groups import Dependencies, Group
from torchtrim.channels.labels import Layer, Mask
from torchtrim.channels.settle import settle
from torchtrim.channels.units import IntArray
from torchtrim.edits.channel_check import check_shapes
from torchtrim.edits.channel_narrow import Narrowing, changed_in, narrow, narrowings
from torchtrim.edits.truth import Numbers, set_attributes, tell_the_truth
from torchtrim.edits.work import Work
from torchtrim.errors import EditError
from torchtrim.graph.copying import structural_copy
from torchtrim.graph.stale import forget_computed


@dataclass(eq=False)
class Decision:
    """The channels that go.

    Attributes:
        units: Whether each unit goes.
        gone: Whether each channel goes.
        left_alone: The groups (by their number) that cannot go after all, and why.
        tried: The narrower model, which ran.
        changes: What its tensors lost.
        attributes: What its modules say of their widths since.
    """

    units: Mask
    gone: Mask
    left_alone: dict[int, str]
    tried: Work
    changes: list[Narrowing]
    attributes: Numbers

    def commit(self, work: Work) -> None:
        """Do on `work.model` what was tried on a copy of it."""
        for own, other in zip(work.model.modules(), self.tried.model.modules(), strict=True):
            own._parameters.update(other._parameters)
            own._buffers.update(other._buffers)
            if isinstance(own, nn.RNNBase):
                own._flat_weights = [getattr(own, name, None) for name in own._flat_weights_names]
        for new, old in self.tried.came_from.items():
            work.came_from[new] = work.came_from.pop(old, old)
        set_attributes(work.model, self.attributes)
        forget_computed(work.model, changed_in(self.changes))


def decide(work: Work, found: Dependencies, choose: Callable[[Collection[int]], Mask]) -> Decision:
    """Choose channels such that the narrower model runs, every shape being as foretold.

    Where it does not run, the groups at fault are left alone, and it is tried again.

    Args:
        work: The model, which is left as it is.
        found: Its groups.
        choose: The units that go when some groups (by their number) are to be left alone.
    """
    group_of = np.full(found.count + 1, -1)
    for number, group in enumerate(found.groups):
        group_of[group.units] = number
    left: dict[int, str] = {}
    while True:
        units = choose(left)
        gone = found.gone(units)
        chosen = np.unique(group_of[:-1][units]).tolist()
        broken = {
            number: f"{each.reason}, at {each.where}"
            for each in settle(found.flow, gone).broken
            for number in _groups_in(each.layers, found, group_of) & set(chosen)
        }
        if broken:
            _leave(broken, found, left)
            continue
        error, tried, changes, attributes = attempt(work, found.flow, gone)
        if error is None:
            return Decision(units, gone, left, tried, changes, attributes)
        if not chosen:
            raise error
        named = _groups_in(getattr(error, "layers", ()), found, group_of) & set(chosen)
        if not named:
            named, error = _at_fault(work, found, units, chosen, error)
        _leave(dict.fromkeys(named, error.message), found, left)


def _groups_in(layers: Iterable[Layer], found: Dependencies, group_of: IntArray) -> set[int]:
    return {int(each) for layer in layers for each in np.unique(group_of[found.unit_of[layer]])}


def _leave(reasons: Mapping[int, str], found: Dependencies, left: dict[int, str]) -> None:
    """Leave groups alone, with all of their families."""
    families = {found.groups[number].family: reason for number, reason in reasons.items()}
    for number, group in enumerate(found.groups):
        if group.family in families:
            left.setdefault(number, families[group.family])


def attempt(work: Work, flow: Flow, gone: Mask) -> tuple[EditError | None, Work, list[Narrowing], Numbers]:
    """Take channels out of a copy of a model, and run it on shapes alone. The model itself is left as it is.

    Returns:
        Why it does not follow, `None` where it does; the copy, what its tensors lost, and what its modules say since.
    """
    tried = Work(structural_copy(work.model), work.inputs)
    changes: list[Narrowing] = []
    attributes: Numbers = {}
    try:
        changes, attributes = take_out(tried, flow, gone)
        check_shapes(tried, flow, gone, cut=False)
    except EditError as error:
        return error, tried, changes, attributes
    return None, tried, changes, attributes


def failure(work: Work, flow: Flow, gone: Mask) -> EditError | None:
    """Why a model does not follow when channels go; `None` where it does. Nothing is changed."""
    return attempt(work, flow, gone)[0]


def take_out(work: Work, flow: Flow, gone: Mask) -> tuple[list[Narrowing], Numbers]:
    """Take channels out of `work.model`; returns what tensors lost, and what modules say of their widths since.

    Raises:
        EditError: Nothing would be left of a tensor, or what is left has gaps.
    """
    changes = narrowings(work.model, flow, gone)
    narrow(work, changes)
    attributes = tell_the_truth(work.model, flow, gone, {change.owner for change in changes})
    forget_computed(work.model, changed_in(changes))
    return changes, attributes


def _at_fault(
    work: Work, found: Dependencies, units: Mask, chosen: list[int], error: EditError
) -> tuple[set[int], EditError]:
    """The first group with which a model does not run, and what is wrong then: by bisection.

    Where the error names a place, those that touch it come last, so that they alone are looked at if it runs without.
    """

    def without(numbers: list[int]) -> EditError | None:
        some = np.zeros_like(units)
        for number in numbers:
            some[found.groups[number].units] = units[found.groups[number].units]
        return failure(work, found.flow, found.gone(some))

    suspects = [number for number in chosen if _touches(found.groups[number], error.path)]
    others = [number for number in chosen if number not in suspects]
    numbers, low, high = others + suspects, 0, len(chosen)
    if suspects and others:
        reason = without(others)
        low, high, error = (len(others), high, error) if reason is None else (0, len(others), reason)
    while high - low > 1:
        middle = (low + high) // 2
        reason = without(numbers[:middle])
        if reason is None:
            low = middle
        else:
            high, error = middle, reason
    return {numbers[high - 1]}, error


def _touches(group: Group, path: object) -> bool:
    return isinstance(path, str) and any(f"{each.path}.".startswith(f"{path}.") for each in group.members)
