"""What is asked of layers by name, as what is asked of the groups of channels that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from torchtrim.channels.groups import Dependencies, Group, Member
from torchtrim.errors import EditError, SelectionError, nearest
from torchtrim.graph.paths import covered, describe


def asked_of(model: nn.Module, dependencies: Dependencies, asked: Mapping[Any, float]) -> list[float | None]:
    """For each group the number of the first selection that fits a layer which makes its channels.

    A selection is a path, a glob, a type, a predicate or a tuple of these; a module stands for all that is in it. Of a
    residual stream all layers make the channels that add to it.

    Args:
        model: The model that the dependencies were made of.
        dependencies: Its groups.
        asked: A number by selection.

    Returns:
        As many as there are groups; `None` where nothing fits.

    Raises:
        PathError: An exact path does not exist.
        SelectionError: A selection that fits no module, or no layer that makes channels.
        EditError: The channels of none of the layers that it fits can go.

    Example:
        >>> import torch
        >>> from torchtrim.channels.follow import follow
        >>> from torchtrim.channels.groups import dependencies
        >>> from torchtrim.graph.inputs import Inputs
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), nn.ReLU(), nn.Linear(2, 2))
        >>> found = dependencies(net, follow(net, Inputs.of(torch.zeros(1, 4))))
        >>> [group.name for group in found.groups], asked_of(net, found, {"1": 0.5})
        (['0', '1.1'], [None, 0.5])
    """
    made_by = [set(makers(dependencies, group)) for group in dependencies.groups]
    found: list[float | None] = [None] * len(made_by)
    for selection, number in asked.items():
        paths = covered(model, selection)
        fitting = [group for group, several in enumerate(made_by) if not several.isdisjoint(paths)]
        if not fitting:
            raise _unfit(selection, paths, dependencies, made_by)
        for group in fitting:
            found[group] = number if found[group] is None else found[group]
    return found


def makers(dependencies: Dependencies, group: Group) -> list[str]:
    """The paths of the layers that make a group's channels, the one that names it first.

    A layer that passes them on one by one (a depthwise convolution) makes none, though its weights go with them.
    """
    reads = {_owner(member) for member in group.members if member.role == "reads"}
    found = dict.fromkeys([group.name])
    for member in group.members:
        path = _owner(member)
        if member.role == "writes" and (path in reads or not _is_given(dependencies, path, group)):
            found[path] = None
    return list(found)


def _unfit(selection: Any, paths: list[str], dependencies: Dependencies, made_by: list[set[str]]) -> Exception:
    reasons = [why for path, why in dependencies.left_alone.items() if path in paths]
    named = selection if isinstance(selection, str) else describe(selection)
    if reasons:
        return EditError(f"its channels cannot go: {reasons[0]}", path=named)
    layers = list(dict.fromkeys(path for several in made_by for path in sorted(several)))
    return SelectionError(
        "no layer whose channels can go is named so",
        path=named,
        found=", ".join(paths[:6]),
        expected=", ".join(layers[:20]) or None,
        hint=nearest(named, layers) or "a path that tt.plan lists",
    )


def _owner(member: Member) -> str:
    return member.path.rpartition(".")[0]


def _is_given(dependencies: Dependencies, path: str, group: Group) -> bool:
    """Whether units of a group go into a module."""
    return any(
        bool(np.isin(dependencies.unit_of[layer], group.units).any())
        for run in dependencies.flow.runs
        for call in run.calls.get(path, ())[:1]
        for _, label in call.given
        for layer in label.layers
    )
