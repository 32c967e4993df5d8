"""Thresholds by name: of some layers, every channel goes whose score is below a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import numpy as np

from torchtrim.channels.groups import Dependencies, Group
from torchtrim.errors import SelectionError, nearest
from torchtrim.importance.channels import FloatArray


def ratios_below(dependencies: Dependencies, scores: FloatArray, thresholds: Mapping[str, float]) -> dict[str, float]:
    """The share of each group's units whose score is below its threshold; so many go, the lowest first.

    Scores are those of `scores`: of magnitudes 1 is the average of a group, of `lamp` and `apoz` they are shares.
    A group has the threshold of the first pattern that fits the layer that names it; where there is none, of the first
    that fits another layer which writes it (the last convolution of another residual block, which is added to it).

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
    writers = {group.name: _writers(group) for group in dependencies.groups}
    paths = list(dict.fromkeys(path for several in writers.values() for path in several))
    for pattern in thresholds:
        if not any(_fits(path, pattern) for path in paths):
            raise SelectionError(
                "no layer whose channels can go has such a name",
                path=pattern,
                expected=paths[:20],
                hint=nearest(pattern, paths),
            )
    found = {}
    for group in dependencies.groups:
        limits = _limits(writers[group.name], thresholds)
        below = scores[group.units] < next(limits, -np.inf)
        found[group.name] = float(below.mean())
    return found


def _writers(group: Group) -> list[str]:
    paths = [member.path.rpartition(".")[0] for member in group.members if member.role == "writes"]
    return list(dict.fromkeys((group.name, *paths)))


def _fits(path: str, pattern: str) -> bool:
    return path == pattern or fnmatchcase(path, pattern)


def _limits(paths: list[str], thresholds: Mapping[str, float]) -> Iterator[float]:
    for path in paths:
        yield from (threshold for pattern, threshold in thresholds.items() if _fits(path, pattern))
