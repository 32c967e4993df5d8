"""What a model's tensors lost when channels went: told by its history, to be taken out of what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from torchtrim.edits.history import history

Removed: TypeAlias = "Mapping[str, Sequence[int]]"  # the indices that went, by dimension; "0,1" for a grouped layer's


def losses(net: nn.Module, since: int = 0) -> list[Mapping[str, Removed]]:
    """For each edit of a model that narrowed tensors, oldest first: what each tensor lost, by its full name.

    Args:
        net: The model.
        since: How many of its first edits to leave out.

    Example:
        >>> import torchtrim as tt
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> losses(tt.delete_channels(net, torch.zeros(1, 4), "0", [1]))
        [{'0.weight': {'0': (1,)}, '0.bias': {'0': (1,)}, '2.weight': {'1': (1,)}}]
    """
    found = (getattr(edit, "narrowed", None) for edit in history(net).edits[since:])
    return [narrowed for narrowed in found if isinstance(narrowed, Mapping) and narrowed]


def shapes_before(shape: Sequence[int], lost: Sequence[Removed]) -> list[tuple[int, ...]]:
    """The shapes that a tensor had: now, before the last narrowing, before the one before that, and so on.

    Args:
        shape: Its shape now.
        lost: What it lost each time, oldest first.

    Example:
        >>> shapes_before((6, 3), [{"0": (5,), "1": (0, 1)}, {"0": (2, 4)}])
        [(6, 3), (8, 3), (9, 5)]
    """
    shapes = [tuple(shape)]
    for removed in reversed(lost):
        before = list(shapes[-1])
        rows = before[0] if before else 0
        for axis, indices in removed.items():
            if axis != "0,1":
                before[int(axis)] += len(indices)
        if "0,1" in removed:
            before[1] = (rows * before[1] + len(removed["0,1"])) // before[0]
        shapes.append(tuple(before))
    return shapes


def taken(tensor: torch.Tensor, removed: Removed) -> torch.Tensor:
    """What is left of a tensor. Along dimensions of size 1 (a sum that an optimizer keeps) nothing is taken out.

    Example:
        >>> taken(torch.arange(6).reshape(2, 3), {"1": (0, 2)})
        tensor([[1],
                [4]])
        >>> taken(torch.arange(6).reshape(3, 2), {"0": (1,), "0,1": (0, 2, 3, 5)})
        tensor([[1],
                [4]])
    """
    if "0,1" in removed and tensor.dim() > 1 and tensor.shape[1] > 1 and tensor.shape[0] > 1:
        stays = torch.ones(tensor.shape[0] * tensor.shape[1], dtype=torch.bool)
        stays[list(removed["0,1"])] = False
        stays = stays.reshape(tensor.shape[:2])
        rows = stays.any(1).nonzero().flatten()
        columns = torch.stack([row.nonzero().flatten() for row in stays[rows]]).to(tensor.device)
        index = columns.reshape(*columns.shape, *(1,) * (tensor.dim() - 2))
        tensor = tensor.index_select(0, rows.to(tensor.device))
        tensor = tensor.gather(1, index.expand(*columns.shape, *tensor.shape[2:]))
    for axis, indices in removed.items():
        # The rows of a grouped layer's table went with it.
        if axis == "0,1" or (axis == "0" and "0,1" in removed) or tensor.shape[int(axis)] == 1:
            continue
        stays = torch.ones(tensor.shape[int(axis)], dtype=torch.bool)
        stays[list(indices)] = False
        tensor = tensor.index_select(int(axis), stays.nonzero().flatten().to(tensor.device))
    return tensor.clone()
