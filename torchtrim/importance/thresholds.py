"""Thresholds by name: of some layers, every channel goes whose score is below a number."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from torchtrim.channels.groups import Dependencies, Group, Member
from torchtrim.errors import SelectionError, nearest
from torchtrim.importance.channels import FloatArray


def ratios_below(dependencies: Dependencies, scores: FloatArray, thresholds: Mapping[str, float]) -> dict[str, float]:
    """The share of each group's units whose score is below its threshold; so many go, the lowest first.

    Scores are those of `scores`: of magnitudes 1 is the average of a group, of `lamp` and `apoz` they are shares. A
    function as importance has a scale of its own: with `lambda group: group.tensors[0].values.abs().mean(1)` a
    threshold is one for the mean absolute weight of a filter.

    A group has the threshold of the first pattern that fits a layer which makes its channels: of a residual stream all
    layers that add to it.

    Args:
        dependencies: The groups.
        scores: A score for each unit, NaN where there is none.
        thresholds: By path or glob of layers: `{"block3.*": 0.5}`.

    Returns:
        By the name of the group; 0.0 for those that no pattern fits.

    Raises:
        SelectionError: A pattern that fits no layer which makes channels, or a threshold that is no number.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchtrim.channels.follow import follow
        >>> from torchtrim.channels.groups import dependencies
        >>> from torchtrim.graph.inputs import Inputs
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> found = dependencies(net, follow(net, Inputs.of(torch.zeros(1, 4))))
        >>> ratios_below(found, np.array([0.2, 1.8, 1.0, 0.5, 1.5]), {"0": 1.5})
        {'0': 0.6666666666666666, '2': 0.0}
    """
    for pattern, threshold in thresholds.items():
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not np.isfinite(threshold):
            raise SelectionError("a threshold is a number", path=pattern, found=threshold)
    made_by = [makers(dependencies, group) for group in dependencies.groups]
    paths = list(dict.fromkeys(path for several in made_by for path in several))
    for pattern in thresholds:
        if not any(_fits(path, pattern) for path in paths):
            raise SelectionError(
                "no layer whose channels can go has such a name",
                path=pattern,
                expected=paths[:20],
                hint=nearest(pattern, paths),
            )
    found = {}
    for group, several in zip(dependencies.groups, made_by, strict=True):
        limits = (limit for pattern, limit in thresholds.items() if any(_fits(path, pattern) for path in several))
        below = scores[group.units] < next(limits, -np.inf)
        found[group.name] = float(below.mean())
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


def _fits(path: str, pattern: str) -> bool:
    return path == pattern or fnmatchcase(path, pattern)
