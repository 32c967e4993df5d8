"""What a pruning took out, as a record: done again without following channels, without scores and without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from torchtrim.channels.groups import Group
from torchtrim.channels.labels import Mask
from torchtrim.edits.channel_narrow import Narrowing, changed_in, narrow
from torchtrim.edits.weights import Weights
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import EditError


@dataclass(frozen=True)
class Lost:
    """Indices that went, and of what.

    Attributes:
        of: Each a parameter or buffer and its dimension, `"layer1.0.conv1.weight:0"`; of a grouped layer's weight also
            `":0,1"`, the places in its table of outputs and inputs, row by row.
        indices: The indices.
    """

    of: tuple[str, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class PrunedGroup:
    """A group of channels that was pruned, or left as wide as it was.

    Attributes:
        name: The path of the module that writes it.
        before: How many channels there were.
        after: How many there are.
        members: The paths of the modules that hold something of it.
    """

    name: str
    before: int
    after: int
    members: tuple[str, ...]

    @staticmethod
    def of(group: Group, units: Mask) -> PrunedGroup:
        """What becomes of a group when units go."""
        left = int((~units[group.units]).sum()) * group.channels_each
        owners = tuple(dict.fromkeys(each.path.rpartition(".")[0] for each in group.members))
        return PrunedGroup(group.name, group.width, left, tuple(each for each in owners if each != group.name))

    def joint(self) -> Joint:
        """The group, for a plan."""
        named = ", ".join(self.members[:3]) + (f" and {len(self.members) - 3} more" if len(self.members) > 3 else "")
        return Joint(self.name, (self.before,), (self.after,), f"narrowed, with {named}" if named else "narrowed")


@dataclass(frozen=True)
class Pruned:
    """What a pruning decided.

    Attributes:
        groups: The groups, those that were left as they are too.
        lost: What each parameter and buffer lost.
        shapes: The resulting shape of each of these.
        attributes: What modules say of their widths since, by the path of the module.
        left_alone: The paths of layers that could not be narrowed, and why.
        notes: What the user was told.
        weights: Weights that were solved for anew.
    """

    groups: tuple[PrunedGroup, ...] = ()
    lost: tuple[Lost, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    weights: Weights | None = None

    @property
    def narrowed(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """For each parameter and buffer the indices that went along each of its dimensions."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for lost in self.lost:
            for each in lost.of:
                path, _, axis = each.rpartition(":")
                found.setdefault(path, {})[axis] = lost.indices
        return found


def lost_by(changes: Iterable[Narrowing]) -> tuple[Lost, ...]:
    """What parameters and buffers lose, each list of indices once."""
    found: dict[tuple[int, ...], list[str]] = {}
    for change in changes:
        for axis, indices in change.removed.items():
            found.setdefault(indices, []).append(f"{change.path}:{axis}")
    return tuple(Lost(tuple(of), indices) for indices, of in found.items())


def shapes_of(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters and buffers."""
    return {path: tuple(tensor.shape) for path, tensor in _held(model, paths).items()}


def narrow_again(work: Work, pruned: Pruned) -> list[torch.Tensor]:
    """Take out what a record says; returns the tensors that are narrower now.

    Raises:
        EditError: The model is not the one that the record was made of; names the tensor. Nothing has changed.
    """
    narrowed = pruned.narrowed
    held = _held(work.model, narrowed)
    changes = []
    for path, removed in narrowed.items():
        before, after = tuple(held[path].shape), pruned.shapes.get(path)
        taken = _taken(removed)
        try:
            found = tuple(taken(torch.empty(before, device="meta")).shape)
        except (IndexError, ValueError, RuntimeError):
            found = None
        if after is None or found != tuple(after):
            raise EditError(
                "it has another shape than where this was recorded, or its channels are gone already",
                path=path,
                found=list(before),
                expected=f"a shape that becomes {list(after or ())} without {_counts(removed)}",
                hint="the model that the record was made of",
            )
        owner, _, name = path.rpartition(".")
        changes.append(Narrowing(work.model.get_submodule(owner), name, path, taken, removed))
    narrow(work, changes)
    return changed_in(changes)


def _counts(removed: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{len(indices)} along {axis}" for axis, indices in removed.items())


def _held(model: nn.Module, paths: Iterable[str]) -> dict[str, torch.Tensor]:
    names: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    names |= dict(model.named_buffers(remove_duplicate=False))
    missing = [path for path in paths if path not in names]
    if missing:
        raise EditError("no such parameter or buffer", path=missing[0], hint="the model that the record was made of")
    return {path: names[path] for path in paths}


def _taken(removed: Mapping[str, tuple[int, ...]]) -> Callable[[torch.Tensor], torch.Tensor]:
    def take(tensor: torch.Tensor) -> torch.Tensor:
        table = removed.get("0,1")
        rows = None
        if table is not None:
            stays = _stays(tensor.shape[0] * tensor.shape[1], table).reshape(tensor.shape[0], tensor.shape[1])
            kept = stays[_stays(tensor.shape[0], removed.get("0", ()))]
            rows = torch.as_tensor(np.stack([np.flatnonzero(row) for row in kept]), device=tensor.device)
        for axis, indices in removed.items():
            if axis != "0,1":
                index = np.flatnonzero(_stays(tensor.shape[int(axis)], indices))
                tensor = tensor.index_select(int(axis), torch.as_tensor(index, device=tensor.device))
        if rows is not None:
            places = rows.reshape(*rows.shape, *(1,) * (tensor.dim() - 2))
            tensor = tensor.gather(1, places.expand(*rows.shape, *tensor.shape[2:]))
        return tensor.clone()

    return take


def _stays(size: int, removed: Iterable[int]) -> Mask:
    stays = np.ones(size, dtype=bool)
    stays[list(removed)] = False
    return stays
