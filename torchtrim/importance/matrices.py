"""What a criterion looks at: the tensors of a group as matrices, with one row for each unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from torchtrim.channels.groups import Dependencies, Member
from torchtrim.channels.labels import Layer, varying
from torchtrim.channels.units import IntArray


@dataclass(frozen=True, eq=False)
class GroupTensor:
    """One parameter or buffer of a group.

    Attributes:
        path: Its name, as in the state dict: `"layer1.0.conv1.weight"`.
        role: `"writes"` (the rows of a weight that make a unit), `"reads"` (its weights that read one) or `"holds"`
            (a norm's scale, a bias, a buffer, a token: one value for each channel).
        owner: The module that holds it.
        rows: Which of the group's units it has values of, in order: whole numbers, (n,).
        values: (n, elements). A unit with fewer elements than others ends in zeros.
        gradient: The gradient of the loss by them, likewise, where the criterion asks for gradients.
    """

    path: str
    role: str
    owner: nn.Module
    rows: IntArray
    values: torch.Tensor
    gradient: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """A group of units that are ranked among one another: what a callable importance is given.

    A *unit* is the smallest set of channels that can only go together; a criterion gives one score for each.

    Attributes:
        name: The path of the module that makes the channels.
        units: How many units there are.
        tensors: Every parameter and buffer that would lose something, the one that makes the channels first.

    Example:
        >>> def largest_weight(group: ChannelGroup) -> torch.Tensor:
        ...     score = torch.zeros(group.units)
        ...     for tensor in group.tensors:
        ...         if tensor.role == "writes":
        ...             score[tensor.rows] = torch.maximum(score[tensor.rows], tensor.values.abs().amax(1))
        ...     return score
        >>> values = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
        >>> weight = GroupTensor("fc.weight", "writes", nn.Linear(2, 2), np.arange(2), values)
        >>> largest_weight(ChannelGroup("fc", 2, (weight,)))
        tensor([3., 2.])
    """

    name: str
    units: int
    tensors: tuple[GroupTensor, ...]


def groups_of(
    model: nn.Module,
    dependencies: Dependencies,
    gradients: Mapping[int, torch.Tensor] | None = None,
    *,
    buffers: bool = True,
    biases: bool = True,
) -> Iterator[ChannelGroup]:
    """The groups, in order, with their tensors as matrices; whole-number tensors (counters) are left out.

    Args:
        model: The model that the dependencies were made of.
        dependencies: Its groups.
        gradients: The gradient of each parameter, by its identity; others of the same group have zeros.
        buffers: Whether buffers are among them.
        biases: Whether biases are.
    """
    owners = _owners(model)
    position = np.full(dependencies.count + 1, -1, dtype=np.int64)
    for group in dependencies.groups:
        position[group.units] = np.arange(len(group.units))
        tensors = []
        for member in group.members:
            owner, held = owners[member.path]
            if not held.is_floating_point() or (not biases and is_bias(member.role, member.path)):
                continue
            if not buffers and not isinstance(held, nn.Parameter):
                continue
            found = _tensor(member, owner, held, position, (gradients or {}).get(id(held)))
            if found is not None:
                tensors.append(found)
        position[group.units] = -1
        if any(each.gradient is not None for each in tensors):
            tensors = [
                each if each.gradient is not None else replace(each, gradient=torch.zeros_like(each.values))
                for each in tensors
            ]
        first = [each for each in tensors if each.role == "writes" and each.path.rpartition(".")[0] == group.name][:1]
        yield ChannelGroup(group.name, len(group.units), (*first, *(each for each in tensors if each not in first)))


def is_bias(role: str, path: str) -> bool:
    """Whether a tensor that holds values is a bias, or a norm's shift, by its name."""
    name = path.rpartition(".")[2]
    return role == "holds" and (name.startswith("bias") or name.endswith("bias"))


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, held in (*module._parameters.items(), *module._buffers.items()):
            if held is not None:
                found[f"{path}.{name}" if path else name] = (module, held)
    return found


def _tensor(
    member: Member, owner: nn.Module, held: torch.Tensor, position: IntArray, gradient: torch.Tensor | None
) -> GroupTensor | None:
    places = rows_of(member.units, position)
    if places is None:
        return None
    values = gathered(held.detach(), member.units, places)
    slope = None if gradient is None else gathered(gradient, member.units, places)
    return GroupTensor(member.path, member.role, owner, places.units, values, slope)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the units of a group lie in a tensor whose dimensions without channels are put last.

    Attributes:
        units: The units that are there at all, by their place in the group, in order.
        order: The entries of the other dimensions, run together, that belong to them: unit by unit.
        counts: How many entries each has.
    """

    units: IntArray
    order: IntArray
    counts: IntArray


def rows_of(units: Layer, position: IntArray) -> Places | None:
    """Find the units of a group in a layer of units; `None` where there are none.

    Args:
        units: The layer: unit numbers, -1 for what cannot go.
        position: For each unit of the model its place in the group, -1 for those of other groups; and a last -1.

    Example:
        >>> found = rows_of(np.array([7, 5, 7, 6, -1]), np.array([-1] * 5 + [0, -1, 1, -1]))
        >>> found.units, found.order, found.counts
        (array([0, 1]), array([1, 0, 2]), array([1, 2]))
    """
    place = position[units.ravel()]
    entries = np.flatnonzero(place >= 0)
    if not entries.size:
        return None
    told = place[entries]
    steps = told[1:] - told[:-1]
    if steps.min(initial=1) > 0:
        return Places(told, entries, np.ones_like(told))
    if steps.min() < 0:
        order = np.argsort(told, kind="stable")
        entries, told = entries[order], told[order]
    found, counts = np.unique(told, return_counts=True)
    return Places(found, entries, counts)


def gathered(tensor: torch.Tensor, units: Layer, places: Places) -> torch.Tensor:
    """The values of each unit as a row.

    Example:
        >>> units = np.array([[0], [1], [1]])
        >>> gathered(torch.arange(6.0).reshape(3, 2), units, rows_of(units, np.array([0, 1, -1])))
        tensor([[0., 1., 0., 0.],
                [2., 3., 4., 5.]])
    """
    axes = sorted(varying(units))
    entries = int(np.prod([tensor.shape[axis] for axis in axes]))
    flat = tensor.movedim(tuple(axes), tuple(range(len(axes)))).reshape(entries, -1)
    start, count = int(places.order[0]), len(places.order)
    if places.order[-1] - start + 1 == count and (places.order[1:] > places.order[:-1]).all():
        taken = flat[start : start + count].float()
    else:
        taken = flat[torch.as_tensor(places.order, device=tensor.device)].float()
    most = int(places.counts.max())
    if (places.counts == most).all():
        return taken.reshape(len(places.units), -1)
    wide = taken.new_zeros(len(places.units), most, taken.shape[1])
    unit = np.repeat(np.arange(len(places.units)), places.counts)
    nth = np.arange(count) - np.repeat(np.cumsum(places.counts) - places.counts, places.counts)
    wide[torch.as_tensor(unit, device=tensor.device), torch.as_tensor(nth, device=tensor.device)] = taken
    return wide.flatten(1)
