"""Thresholds by name: of some layers, every channel goes whose score is below a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from torchtrim.channels.asked import asked_of
from torchtrim.channels.groups import Dependencies
from torchtrim.importance.channels import FloatArray


def ratios_below(
    model: nn.Module, dependencies: Dependencies, scores: FloatArray, thresholds: Mapping[Any, float]
) -> FloatArray:
    """The share of each group's units whose score is below its threshold; so many go, the lowest first.

    Scores are those of `scores`: of magnitudes 1 is the average of a group, of `lamp` and `apoz` they are shares. A
    function as importance has a scale of its own: with `lambda group: group.tensors[0].values.abs().mean(1)` a
    threshold is one for the mean absolute weight of a filter.

    A group has the threshold of the first selection that fits a layer which makes its channels.

    Args:
        model: The model that was followed.
        dependencies: The groups.
        scores: A score for each unit, NaN where there is none.
        thresholds: By path, glob, type or predicate of layers: `{"block3": 0.5}`; see `asked_of`.

    Returns:
        As many as there are groups; 0.0 for those that nothing fits.

    Raises:
        TorchTrimError: What `asked_of` raises.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchtrim.channels.follow import follow
        >>> from torchtrim.channels.groups import dependencies
        >>> from torchtrim.graph.inputs import Inputs
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> found = dependencies(net, follow(net, Inputs.of(torch.zeros(1, 4))))
        >>> ratios_below(net, found, np.array([0.2, 1.8, 1.0, 0.5, 1.5]), {"0": 1.5})
        array([0.66666667, 0.        ])
    """
    limits = asked_of(model, dependencies, thresholds)
    below = [
        0.0 if limit is None else float((scores[group.units] < limit).mean())
        for group, limit in zip(dependencies.groups, limits, strict=True)
    ]
    return np.array(below)
