"""Take channels out of parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from torchtrim.channels.follow import Flow
from torchtrim.channels.labels import Label, Layer, Mask, kept_indices, varying
from torchtrim.edits.truth import set_attributes, tell_the_truth
from torchtrim.edits.work import Work
from torchtrim.errors import EditError

__all__ = ["Narrowing", "narrow", "narrowings", "set_attributes", "tell_the_truth"]


@dataclass(frozen=True)
class Narrowing:
    """What a parameter or buffer loses.

    Attributes:
        owner: The first module that holds it.
        name: Its name there.
        path: Its full name.
        taken: The function that takes out of a tensor of its shape what stays.
        removed: For each dimension (as text) the indices that go.
    """

    owner: nn.Module
    name: str
    path: str
    taken: Callable[[torch.Tensor], torch.Tensor]
    removed: dict[str, tuple[int, ...]]


def narrowings(model: nn.Module, flow: Flow, gone: Mask) -> list[Narrowing]:
    """What each parameter and buffer of a model would lose. Nothing is changed.

    Raises:
        EditError: Nothing would be left of one, or what is left has gaps.
    """
    found: list[Narrowing] = []
    seen: set[int] = set()
    for path, owner in model.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            label = None if tensor is None else flow.tensors.get(id(tensor))
            if tensor is None or label is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if any(bool(gone[layer].any()) for layer in label.layers):
                full = f"{path}.{name}" if path else name
                taken, removed = _taken(full, label, gone)
                found.append(Narrowing(owner, name, full, taken, removed))
    return found


def changed_in(changes: list[Narrowing]) -> list[torch.Tensor]:
    """The tensors that replaced those that lost something."""
    return [getattr(change.owner, change.name) for change in changes]


def narrow(work: Work, changes: list[Narrowing]) -> None:
    """Put narrower tensors in place of those that lose something, wherever they are referred to."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in work.model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            places.setdefault(id(tensor), []).append((module, name))
    for change in changes:
        old = getattr(change.owner, change.name)
        new = change.taken(old.detach())
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            work.came_from[new] = work.came_from.pop(old, old)
            if old.grad is not None:
                new.grad = change.taken(old.grad.detach())
        for module, name in places[id(old)]:
            held: dict[str, Any] = module.__dict__["_parameters" if isinstance(old, nn.Parameter) else "_buffers"]
            held[name] = new
    for module in work.model.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _taken(
    path: str, label: Label, gone: Mask
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, tuple[int, ...]]]:
    kept: dict[int, Mask] = {}
    ragged: list[Layer] = []
    for layer in label.layers:
        indices = kept_indices(layer, gone)
        if indices is None:
            ragged.append(layer)
            continue
        for axis, mask in indices.items():
            kept[axis] = kept.get(axis, mask) & mask
    table = _rows(path, ragged[0], gone, kept) if ragged else None
    if len(ragged) > 1 or any(not mask.any() for mask in kept.values()):
        raise EditError("nothing would be left of it", path=path, hint="leave a channel")
    removed = {str(axis): _gone(mask) for axis, mask in kept.items() if not mask.all()}
    if table is not None:
        removed["0,1"] = _gone(~gone[ragged[0]].reshape(ragged[0].shape[:2]))

    def take(tensor: torch.Tensor) -> torch.Tensor:
        for axis, mask in kept.items():
            if not mask.all():
                tensor = tensor.index_select(axis, _index(np.flatnonzero(mask), tensor))
        if table is not None:
            index = _index(table, tensor).reshape(*table.shape, *(1,) * (tensor.dim() - 2))
            tensor = tensor.gather(1, index.expand(*table.shape, *tensor.shape[2:]))
        return tensor.clone()

    return take, removed


def _rows(path: str, layer: Layer, gone: Mask, kept: dict[int, Mask]) -> Layer:
    """For each row (output channel) that stays, the columns that stay: each group reads others of its own."""
    stays = ~gone[layer.reshape(layer.shape[:2])]
    rows = kept.get(0, np.ones(layer.shape[0], dtype=bool)) & stays.any(axis=1)
    counts = set(stays[rows].sum(axis=1).tolist())
    if not varying(layer) <= {0, 1} or len(counts) != 1:
        raise EditError(
            "its groups would keep different numbers of channels",
            path=path,
            found=sorted(counts),
            expected="as many in each",
            hint="as many channels of every group, or whole groups",
        )
    kept[0] = rows
    return np.stack([np.flatnonzero(row) for row in stays[rows]]).astype(np.int64)


def _index(indices: Any, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(indices), device=tensor.device)


def _gone(mask: Mask) -> tuple[int, ...]:
    return tuple(int(index) for index in np.flatnonzero(~mask.ravel()))
