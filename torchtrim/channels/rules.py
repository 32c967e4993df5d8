"""What the rule of an operator is given, and what rules are made of: labels are joined, summed over, pinned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.channels.labels import Channels, Label, Layer, varying

Shape: TypeAlias = "tuple[int, ...]"


class Labels(Protocol):
    """Where labels are kept, by tensor."""

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of a tensor."""

    def give(self, tensor: torch.Tensor, label: Label) -> None:
        """Give a tensor its label."""


@dataclass(frozen=True)
class OpCall:
    """One call of an operator, on tensors that have labels.

    Attributes:
        name: The operator's name: `"view"`.
        arguments: Its arguments by name.
        out: What it gave.
        channels: The model's channels.
        labels: The labels of tensors.
        where: The call, in words.
        module: The module that makes it.
        static: Whether all its tensors are computed from parameters and constants.
        repeats: Whether it is part of a call that repeats values a given number of times.
    """

    name: str
    arguments: dict[str, Any]
    out: Any
    channels: Channels
    labels: Labels
    where: str
    module: nn.Module | None
    static: bool
    repeats: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def layers(self, tensor: torch.Tensor | None) -> tuple[Layer, ...]:
        """The layers of a tensor's label."""
        return () if tensor is None else self.labels.label(tensor).layers

    def give(self, tensor: torch.Tensor, layers: Sequence[Layer | None]) -> None:
        """Label an output."""
        kept = tuple(layer for layer in layers if layer is not None and varying(layer))
        made = self.static and (
            self.name in _PRODUCTS or any(self.labels.label(each).made for each in tensors_in(self.arguments))
        )
        self.labels.give(tensor, Label(kept, static=self.static, made=made))

    def set_aside(self, tensors: Sequence[torch.Tensor]) -> None:
        """Label by-products."""
        for tensor in tensors:
            self.labels.give(tensor, Label(static=self.static, aside=True))

    def pin(self, layers: Sequence[Layer], why: str | None = None) -> None:
        """Say that what goes into it cannot be narrowed."""
        for layer in layers:
            self.channels.pin(layer, why or self.where)


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution")
Rule: TypeAlias = Callable[[OpCall], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def shape_of(tensor: torch.Tensor) -> Shape:
    """A tensor's shape, as plain numbers."""
    return tuple(int(size) for size in tensor.shape)


def extent_of(tensor: torch.Tensor, layers: Sequence[Layer]) -> Shape:
    """A tensor's shape, with 1 for dimensions along which the same values are repeated and no channels are told apart.

    There it takes whatever size the others have, as if it were broadcast.
    """
    told = frozenset().union(*map(varying, layers))
    steps = tensor.stride() if tensor.layout is torch.strided else (1,) * tensor.dim()
    return tuple(
        1 if step == 0 and axis not in told else size
        for axis, (size, step) in enumerate(zip(shape_of(tensor), steps, strict=True))
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in arguments or results, in order; dataclasses are looked into."""
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) in (tuple, list, dict):
        return [tensor for item in (value.values() if type(value) is dict else value) for tensor in tensors_in(item)]
    if value is None or type(value) in (int, float, bool, str):
        return []
    parts = pytree.tree_leaves(value)
    if len(parts) != 1 or parts[0] is not value:
        return [tensor for part in parts for tensor in tensors_in(part)]
    if is_dataclass(value) and not isinstance(value, type):
        return [tensor for field in fields(value) for tensor in tensors_in(getattr(value, field.name))]
    return []


def along(vector: Layer, axis: int, ndim: int) -> Layer:
    """A vector of channels as a layer along one dimension."""
    return vector.reshape([-1 if each == axis else 1 for each in range(ndim)])


def aligned(layer: Layer, ndim: int) -> Layer:
    """A layer with dimensions of size 1 before its own."""
    return layer.reshape((1,) * (ndim - layer.ndim) + layer.shape)


def unknown(call: OpCall) -> None:
    """Whatever goes into an operator without a rule cannot be narrowed."""
    why = f"no rule says how channels go through {call.where}"
    for tensor in tensors_in(call.arguments):
        call.pin(call.layers(tensor), why)
    for tensor in tensors_in(call.out):
        call.give(tensor, ())


def vector(call: OpCall, layers: Sequence[Layer], axis: int, size: int) -> Layer:
    """The channels along one dimension; what varies along others cannot be narrowed there."""
    found = np.zeros(size, np.int64)
    for layer in layers:
        fixed = call.channels.fixed_along(layer, [each for each in range(layer.ndim) if each != axis], call.where)
        if fixed is not None and varying(fixed):
            vector = fixed.reshape(-1)
            if found.any():
                call.channels.link(found, vector, call.where)
            found = vector
    return found


def without(call: OpCall, layers: Sequence[Layer], axes: Iterable[int], *, mixes: bool) -> list[Layer]:
    """The layers that are left where some dimensions are summed over.

    Where a layer varies along others too (heads, of which each sums up channels of its own), these get channels that go
    where all goes that is summed up there.
    """
    gone = frozenset(axes)
    kept = [layer for layer in layers if not varying(layer) & gone]
    why = f"nothing would be left to sum up in {call.where}"
    for layer in layers:
        rest = varying(layer) - gone
        if rest == varying(layer):
            continue
        if mixes:
            call.channels.mixed.append(layer)
        exact = any(varying(each) == rest for each in kept)
        if rest and not (exact and not mixes):
            lines = call.channels.lines(layer, rest, why)
            same = [each for each in kept if varying(each) >= rest]
            for each in same:
                call.channels.within(each, lines, why)
            if not any(varying(each) > rest or np.unique(each).size >= np.unique(lines).size for each in same):
                # Of layers that vary along the same dimensions the finer one stays: it tells of the other.
                kept = [each for each in kept if varying(each) != rest] + [lines]
    return kept


def joined(channels: Channels, operands: Sequence[tuple[Sequence[Layer], Shape]], why: str) -> list[Layer]:
    """The layers of a result whose elements come of the elements at the same place in all operands.

    Args:
        channels: Where it is noted which channels go together.
        operands: The layers and the shape of each; all have as many dimensions, of size 1 where they are broadcast.
        why: The call.
    """
    held: dict[frozenset[int], dict[int, Layer]] = {}
    extra: dict[frozenset[int], list[Layer]] = {}
    for number, (layers, _) in enumerate(operands):
        for axes, several in _several(layers).items():
            # A weight that is viewed with its inputs and its kernel along one dimension: each of them goes by itself.
            extra.setdefault(axes, several)
            for other, (layers, shape) in enumerate(operands):
                if other != number and any(shape[axis] > 1 for axis in axes):
                    _tie_several(channels, several, [each for each in layers if varying(each) & axes], why)
    for number, (layers, _) in enumerate(operands):
        for layer in layers:
            if varying(layer) not in extra:
                held.setdefault(varying(layer), {})[number] = layer
    results: dict[frozenset[int], Layer] = {}
    covered: dict[frozenset[int], set[int]] = {}  # by a finer layer: which operands have that
    for axes in sorted(held, key=len, reverse=True):
        # Beside a finer layer of the same operand one only says what of it is repeated: all of that goes, or nothing.
        repeats = {number: any(axes < varying(each) for each in operands[number][0]) for number in held[axes]}
        first: Layer | None = held[axes][min(held[axes], key=lambda number: repeats[number])]
        for number, layer in held[axes].items():
            if first is not None and layer is not first:
                (channels.within if repeats[number] else channels.link)(first, layer, why)
        for number, (layers, shape) in enumerate(operands):
            if first is None or number in held[axes] or number in covered.get(axes, ()):
                continue
            extent = frozenset(axis for axis in varying(first) if shape[axis] > 1)
            told = extent & frozenset().union(*map(varying, layers))
            first = channels.fixed_along(first, extent - told, why)  # the operand has no channels along the others
            for layer in layers if first is not None else ():
                if varying(layer) < axes and set(held[axes]) <= set(held[varying(layer)]):
                    continue  # what is finer has channels of its own there, beside these (rows of a grouped weight)
                _tie(channels, first, layer, why)
                if varying(layer) < axes:
                    covered.setdefault(varying(layer), set()).update(held[axes])
        if first is not None and axes not in covered:
            channels.link(results.setdefault(varying(first), first), first, why)
    return [*results.values(), *(layer for several in extra.values() for layer in several)]


def _several(layers: Iterable[Layer]) -> dict[frozenset[int], list[Layer]]:
    """The layers that share their dimensions with others of the same operand."""
    found: dict[frozenset[int], list[Layer]] = {}
    for layer in layers:
        same = found.setdefault(varying(layer), [])
        if not any(np.array_equal(each, layer) for each in same):
            same.append(layer)
    return {axes: each for axes, each in found.items() if axes and len(each) > 1}


def _tie_several(channels: Channels, several: Sequence[Layer], others: Sequence[Layer], why: str) -> None:
    """Tie the layers of an operand along the same dimensions to those of another one."""
    for one in several:
        told = [each for each in others if varying(each) != varying(one) or _refines(one, each)]
        for each in told:
            _tie(channels, each, one, why) if varying(each) != varying(one) else channels.within(each, one, why)
        if not told:
            channels.pin(one, why)


def _refines(one: Layer, other: Layer) -> bool:
    """Whether each channel of one of two layers stands only where a single one of the other does."""
    left, right = np.unique(one, return_inverse=True)[1].ravel(), np.unique(other, return_inverse=True)[1].ravel()
    return bool(np.unique(left * one.size + right).size == max(left.max(), right.max()) + 1)


def _tie(channels: Channels, first: Layer | None, layer: Layer, why: str) -> None:
    """Tie two layers of different operands along the dimensions that both vary along."""
    common = frozenset() if first is None else varying(first) & varying(layer)
    if first is None or not common:
        return
    if common == varying(first) == varying(layer):
        channels.link(first, layer, why)
    else:
        channels.within(first, layer if common == varying(layer) else channels.lines(layer, common, why), why)
