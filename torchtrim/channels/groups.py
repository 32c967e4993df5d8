"""What goes together in a model: units of channels, the groups in which they are chosen, and what each touches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from torchtrim.channels.labels import FIXED, Label, Layer, Mask
from torchtrim.channels.roles import roles
from torchtrim.channels.run import Flow
from torchtrim.channels.units import Implied, IntArray, Units, all_layers, units_of
from torchtrim.graph.paths import What, covered


@dataclass(frozen=True, eq=False)
class Member:
    """One layer (of the label) of one parameter or buffer that a group touches.

    Attributes:
        path: Its full name: `"layer1.0.conv1.weight"`.
        role: `"writes"` (a weight's rows that make the channel), `"reads"` (a weight's columns that are summed over) or
            `"holds"` (one value a channel: norms, biases, embeddings, tokens).
        units: The layer with the number of a unit in place of each channel, -1 where it cannot go or belongs to none;
            broadcastable to the tensor. Units of other groups stand in it too.
    """

    path: str
    role: str
    units: Layer


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are chosen among one another: all are made, held and read by the same tensors.

    Attributes:
        name: The path of the module that writes it, the first in order of execution.
        units: Its units, in the order of the rows of the layer that names it.
        members: All that it touches.
        channels_each: How many entries of that layer one unit is (of attention heads: the width of a head).
        family: Groups of the same number keep the same fraction.
        step: The kept number of units is a multiple of this.
        bloc: Groups of a family that are of the same number keep that fraction together, where they cannot each: what
            is tied to something else is all of them (heads that go through convolutions of their own, and a stream).
        structure: Groups of the same structure are built of the same kinds of layers.
    """

    name: str
    units: IntArray
    members: tuple[Member, ...]
    channels_each: int
    family: int
    step: int = 1
    bloc: int = 0
    structure: str = ""

    @property
    def width(self) -> int:
        """How many entries of the layer that names it are its own."""
        return len(self.units) * self.channels_each


@dataclass(frozen=True, eq=False)
class Dependencies:
    """Which channels of a model go together, and which cannot go.

    Attributes:
        flow: The channels of the model.
        groups: The groups, in order of execution.
        unit_of: For each channel the number of its unit; -1 where it cannot go.
        left_alone: The path of each layer whose output cannot be narrowed, and the reason.
        one_of: Sets of units, of which one has to stay.
        implied: What goes where others go.
    """

    flow: Flow
    groups: tuple[Group, ...]
    unit_of: IntArray
    left_alone: dict[str, str]
    one_of: tuple[IntArray, ...]
    implied: Implied

    @property
    def count(self) -> int:
        """How many units there are."""
        return int(self.unit_of.max(initial=-1)) + 1

    def gone(self, units: Mask) -> Mask:
        """Every channel that goes with some units.

        Args:
            units: Whether each unit goes, `(count,)`.
        """
        return self.implied.closed(np.append(units, False)[self.unit_of])


def dependencies(model: nn.Module, flow: Flow, *, protect: What | Iterable[What] = ()) -> Dependencies:
    """Work out which channels of a model go together, from its followed channels alone.

    What reaches the model's outputs stays. So does what is read by its number, or runs together with a width that is
    written into a forward.

    Args:
        model: The model that was followed.
        flow: Its channels.
        protect: Modules that are to stay as wide as they are, with all in them: paths, globs, types or predicates.

    Raises:
        PathError: `protect` names a path that does not exist.
        SelectionError: `protect` fits no module.
    """
    tensors = list(_tensors(model, flow))
    role = roles(flow)
    layers = [(path, role(label, layer), layer) for path, _, label, layer in tensors]
    chosen = np.zeros(flow.channels.count, dtype=bool)
    for _, each, layer in layers:
        chosen[layer] |= each != "holds"
    units = units_of(flow, chosen, _protected(model, flow, protect, layers))
    unit_of = _numbered(units, chosen & _made_by_parameters(model, flow, layers, units))
    owners = {path: owner for path, owner, _, _ in tensors}
    uneven: dict[str, str] = {}
    while True:
        members = [Member(path, role, unit_of[layer]) for path, role, layer in layers]
        groups, group_of = _groups([each for each in members if (each.units >= 0).any()], owners, unit_of, flow)
        fast = [group for group in groups if len(group.units) == 1]
        for group, reason in _without_fraction(groups):
            uneven[group.name] = reason
            fast.append(group)
        if not fast:
            break
        unit_of = _renumbered(unit_of, np.concatenate([group.units for group in fast]).tolist())
    left_alone = _with_sharers(model, _left_alone(layers, units, unit_of) | uneven)
    return Dependencies(flow, groups, unit_of, left_alone, tuple(_one_of(flow, unit_of, group_of)), units.implied)


def _tensors(model: nn.Module, flow: Flow) -> Iterator[tuple[str, nn.Module, Label, Layer]]:
    """Every layer of every parameter and buffer: its path, the module that holds it and its label."""
    seen: set[int] = set()
    for path, owner in model.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or id(tensor) in seen or id(tensor) not in flow.tensors:
                continue
            seen.add(id(tensor))
            label = flow.tensors[id(tensor)]
            for layer in label.layers:
                yield f"{path}.{name}" if path else name, owner, label, layer


def _protected(
    model: nn.Module, flow: Flow, protect: What | Iterable[What], layers: list[tuple[str, str, Layer]]
) -> Iterator[tuple[Layer, str]]:
    """What some modules return, and what their own weights write and hold: they may be used without a call."""
    paths = set(covered(model, protect))
    named = dict(model.named_parameters(remove_duplicate=False))
    own = {id(held) for name, held in named.items() if name.rpartition(".")[0] in paths}
    for path, role, layer in layers:
        if role != "reads" and id(named.get(path)) in own:
            yield layer, "it is protected"
    for run in flow.runs:
        for path in paths & run.calls.keys():
            for call in run.calls[path]:
                for _, label in call.outputs:
                    yield from ((layer, "it is protected") for layer in label.layers)


def _made_by_parameters(model: nn.Module, flow: Flow, layers: list[tuple[str, str, Layer]], units: Units) -> Mask:
    """Whether a parameter writes or holds each channel: a buffer alone may be one that a forward computes anew."""
    own = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    made = np.zeros(flow.channels.count, dtype=bool)
    for path, role, layer in layers:
        if path in own and role != "reads":
            made[units.root[layer]] = True
    found: Mask = made[units.root]
    return found


def _without_fraction(groups: tuple[Group, ...]) -> Iterator[tuple[Group, str]]:
    """The groups of families of which no fraction can go, and why."""
    families: dict[int, list[Group]] = {}
    for group in groups:
        families.setdefault(group.family, []).append(group)
    for family in families.values():
        sizes = sorted({len(group.units) for group in family})
        together: dict[int, int] = {}
        for group in family:
            together[group.bloc] = together.get(group.bloc, 0) + len(group.units)
        if len(family) > 1 and math.gcd(*sizes) == 1 == math.gcd(*together.values()):
            told = ", ".join(map(str, sizes))
            yield from (
                (group, f"as large a part would have to go of {told} channels or heads each") for group in family
            )


def _numbered(units: Units, chosen: Mask) -> IntArray:
    """A number for each unit that is written or read by a weight; -1 for other channels."""
    found = np.zeros(units.root.size, dtype=bool)
    found[units.root[chosen]] = True
    found[FIXED] = False
    numbers = np.full(units.root.size, -1, dtype=np.int64)
    roots = np.flatnonzero(found)
    numbers[roots] = np.arange(roots.size)
    return numbers[units.root]


def _renumbered(unit_of: IntArray, without: list[int]) -> IntArray:
    """The numbers of units when some cannot go."""
    stays = np.ones(int(unit_of.max()) + 2, dtype=bool)
    stays[[*without, -1]] = False
    numbers = np.where(stays, np.cumsum(stays) - 1, -1)
    return numbers[unit_of]


def _groups(
    members: list[Member], owners: dict[str, nn.Module], unit_of: IntArray, flow: Flow
) -> tuple[tuple[Group, ...], IntArray]:
    """Units that stand in the same members are a group; returns the group of each unit too."""
    held = [np.unique(member.units[member.units >= 0]) for member in members]
    signature = np.zeros(int(unit_of.max(initial=-1)) + 1, dtype=np.int64)
    for key, units in zip(np.random.default_rng(0).integers(1, 2**53, len(members)), held, strict=True):
        signature[units] += key
    _, group_of = np.unique(signature, return_inverse=True)
    own: dict[int, list[Member]] = {}
    for member, units in zip(members, held, strict=True):
        for number in np.unique(group_of[units]).tolist():
            own.setdefault(number, []).append(member)
    order = _Order.of(flow)
    families = _families(flow, unit_of, group_of)
    blocs = _blocs(flow, unit_of, group_of)
    found = []
    for number, touched in own.items():
        naming = min(touched, key=lambda each: (_ROLES.index(each.role), order[each.path]))
        row = naming.units[naming.units >= 0]
        row = row[group_of[row] == number]
        _, places, counts = np.unique(row, return_index=True, return_counts=True)
        structure = sorted((each.role, type(owners[each.path]).__name__, each.units.ndim) for each in touched)
        group = Group(
            naming.path.rpartition(".")[0] or naming.path,
            row[np.sort(places)],
            tuple(touched),
            int(counts[0]),
            families[number],
            bloc=blocs[number],
            structure=str(structure),
        )
        found.append((order[naming.path], int(group.units[0]), number, group))
    found.sort(key=lambda each: each[:2])
    return tuple(each[3] for each in found), group_of


_ROLES = ("writes", "holds", "reads")


class _Order(dict[str, int]):
    """When a tensor's module first runs: when the first operator of its own, or of the module around it, does."""

    @staticmethod
    def of(flow: Flow) -> _Order:
        paths = (step.path for run in flow.runs for step in run.steps)
        return _Order({path: number for number, path in enumerate(dict.fromkeys(paths))})

    def __missing__(self, path: str) -> int:
        return self[path.rpartition(".")[0]] if path else len(self)


def _families(flow: Flow, unit_of: IntArray, group_of: IntArray) -> list[int]:
    """The family of each group: those that ties name together."""
    family = np.arange(int(group_of.max(initial=-1)) + 1)
    for tie in flow.ties:
        units = np.concatenate([unit_of[tie.one].ravel(), unit_of[tie.other].ravel()])
        tied = np.unique(family[group_of[units[units >= 0]]])
        if tied.size:
            family[np.isin(family, tied)] = tied[0]
    return [int(each) for each in family]


def _blocs(flow: Flow, unit_of: IntArray, group_of: IntArray) -> list[int]:
    """The bloc of each group: those that stand in the same sides of ties, each unit as often."""
    sides: dict[int, list[tuple[int, int]]] = {}
    for number, side in enumerate(each for tie in flow.ties for each in (tie.one, tie.other)):
        units, counts = np.unique(unit_of[side], return_counts=True)
        for group in np.unique(group_of[units[units >= 0]]).tolist():
            own = counts[(units >= 0) & (group_of[units] == group)]
            # A group of which units stand in it unequally often is a bloc by itself.
            sides.setdefault(group, []).append((number, int(own[0]) if (own == own[0]).all() else -1 - group))
    known: dict[tuple[tuple[int, int], ...], int] = {}
    return [
        known.setdefault(tuple(sides.get(group, [(-1, group)])), group)
        for group in range(int(group_of.max(initial=-1)) + 1)
    ]


def _left_alone(layers: list[tuple[str, str, Layer]], units: Units, unit_of: IntArray) -> dict[str, str]:
    """The layers of which nothing can go."""
    written: dict[str, list[Layer]] = {}
    for path, role, layer in layers:
        if role == "writes":
            written.setdefault(path, []).append(layer)
    found = {}
    for path, rows in written.items():
        if all((unit_of[layer] < 0).all() for layer in rows):
            reason = units.reason(max(rows, key=np.size))
            found[path.rpartition(".")[0] or path] = reason or "all of its channels can only go together"
    return found


def _with_sharers(model: nn.Module, left_alone: dict[str, str]) -> dict[str, str]:
    """The layers that are left alone, with those that share a weight of one."""
    found, first = dict(left_alone), dict[int, str]()
    for path, module in model.named_modules():
        for held in module._parameters.values():
            if held is not None and held.dim() > 1:
                owner = first.setdefault(id(held), path)
                if owner in left_alone:
                    found.setdefault(path, left_alone[owner])
    return found


def _one_of(flow: Flow, unit_of: IntArray, group_of: IntArray) -> Iterator[IntArray]:
    """Sets of units that no choice within groups leaves one of by itself."""
    sizes = np.bincount(group_of) if group_of.size else group_of
    conditions = (before for before, after, _ in flow.channels.implied if (after == FIXED).any())
    seen: set[bytes] = set()
    for layer in (*conditions, *(layer for layer, _ in all_layers(flow))):
        units = np.unique(unit_of[layer])
        if units.size and units[0] >= 0 and units.tobytes() not in seen:
            seen.add(units.tobytes())
            numbers, counts = np.unique(group_of[units], return_counts=True)
            if (counts < sizes[numbers]).all():
                yield units
