"""Where the widths in a forward come from: numbers that know which attribute, or which value's size, they are.

In a followed forward every whole number that a module holds is a `Width`, and so is the size of a value along a
dimension whose channels may go. What is computed from them is one too. Where such a number (or a plain one) is given as
a size, what it has to be once channels are gone is known from the labels: that is a `Demand`. `settle` solves them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from torchtrim.channels.labels import EqualParts, Label, Layer, varying
from torchtrim.channels.rules import Shape


@dataclass(frozen=True)
class Attribute:
    """A number that a module holds.

    Attributes:
        path: The module.
        name: The attribute.
        keys: Where in it, if it is a list or a dict.
    """

    path: str
    name: str
    keys: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Size:
    """The size of a value along a dimension.

    Attributes:
        shape: The value's shape.
        label: Its channels.
        axis: The dimension.
    """

    shape: Shape
    label: Label
    axis: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The channels along it."""
        return tuple(layer for layer in self.label.layers if self.axis in varying(layer))


@dataclass(frozen=True, eq=False)
class Computed:
    """A number computed from others."""

    function: Callable[..., int]
    operands: tuple[Source, ...]


Source: TypeAlias = "int | Attribute | Size | Computed"


class Width(int):
    """A whole number that knows where it comes from.

    Example:
        >>> heads, width = Width(4, Attribute("attn", "num_heads")), Width(64, Attribute("attn", "dim"))
        >>> width // heads, (width // heads).source.operands[1]
        (16, Attribute(path='attn', name='num_heads', keys=()))
    """

    source: Source

    def __new__(cls, value: int, source: Source | None = None) -> Width:
        """A number, and where it comes from."""
        made = super().__new__(cls, value)
        made.source = int(value) if source is None else source
        return made


def source_of(number: int) -> Source:
    """Where a number comes from; a plain one is what it is."""
    return number.source if isinstance(number, Width) else int(number)


def _computing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)
    function = getattr(operator, name.replace("__r", "__"))

    def compute(self: Width, *others: Any) -> Any:
        value = plain(self, *others)
        if value is NotImplemented or not isinstance(value, int):
            return value
        operands = tuple(map(source_of, (self, *others)))
        return Width(value, Computed(function, operands[::-1] if name.startswith("__r") else operands))

    return compute


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Width, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(Width, f"__r{_name}__", _computing(f"__r{_name}__"))
Width.__neg__ = _computing("__neg__")  # type: ignore[method-assign]


def attributes_of(source: Source) -> list[Attribute]:
    """The attributes that a number is computed from."""
    if isinstance(source, Computed):
        return [found for each in source.operands for found in attributes_of(each)]
    return [source] if isinstance(source, Attribute) else []


def sizes_of(source: Source) -> list[Size]:
    """The sizes that a number is computed from."""
    if isinstance(source, Computed):
        return [found for each in source.operands for found in sizes_of(each)]
    return [source] if isinstance(source, Size) else []


@dataclass(frozen=True, eq=False)
class Demand:
    """A number that is given where a size is meant.

    Attributes:
        given: The number.
        source: Where it comes from.
        size: What it has to be.
        where: The call, in words.
    """

    given: int
    source: Source
    size: Size
    where: str


@dataclass(frozen=True, eq=False)
class Tie:
    """Two lists of channels of which the same fraction must be kept: a width is taken from one for the other.

    Attributes:
        one: Channels.
        other: Other channels.
        where: The call that asks for it.
    """

    one: Layer
    other: Layer
    where: str


@dataclass
class Demands:
    """All that a forward asks of widths.

    Attributes:
        demands: Numbers given where sizes are meant.
        ties: Channels of which the same fraction must be kept.
        equal_parts: Channels in parts that a forward takes for equally large (`chunk`).
    """

    demands: list[Demand] = field(default_factory=list)
    ties: dict[tuple[bytes, bytes], Tie] = field(default_factory=dict)
    equal_parts: list[EqualParts] = field(default_factory=list)

    def want(self, given: Any, size: Size, where: str) -> None:
        """Note a number that is given where a size is meant."""
        if not isinstance(given, int) or isinstance(given, bool) or int(given) != size.shape[size.axis]:
            return  # -1, or a tensor
        source = source_of(given)
        if isinstance(source, int) and not size.layers:
            return
        self.demands.append(Demand(int(given), source, size, where))
        for other in sizes_of(source):
            for one, two in ((one, two) for one in other.layers for two in size.layers):
                mine, its = set(one.ravel().tolist()), set(two.ravel().tolist())
                if not mine <= its and not its <= mine:
                    self.ties.setdefault((one.tobytes(), two.tobytes()), Tie(one.ravel(), two.ravel(), where))


def mark(model: nn.Module) -> dict[Attribute, int]:
    """Put a `Width` in place of every whole number above 1 that a module holds, also in its lists and dicts.

    Returns:
        The numbers.
    """
    found: dict[Attribute, int] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if not name.startswith("_") or type(value) is int:
                marked = _marked(value, Attribute(path, name), found)
                if marked is not value:
                    module.__dict__[name] = marked
    return found


def _marked(value: Any, place: Attribute, found: dict[Attribute, int]) -> Any:
    if type(value) is int:
        if value < 2:
            return value
        found[place] = value
        return Width(value, place)
    if type(value) not in (tuple, list, dict) or len(place.keys) > 1 or len(value) > _LONGEST:
        return value
    pairs = list(value.items() if type(value) is dict else enumerate(value))
    marked = [_marked(item, replace(place, keys=(*place.keys, key)), found) for key, item in pairs]
    if all(one is other for one, (_, other) in zip(marked, pairs, strict=True)):
        return value
    return dict(zip(value, marked, strict=True)) if type(value) is dict else type(value)(marked)


_LONGEST = 64


def narrowed_to(size: Size, start: int, stop: int) -> Size:
    """The size of a part of a value."""
    axis = size.axis
    shape = (*size.shape[:axis], stop - start, *size.shape[axis + 1 :])
    window = (slice(None),) * axis + (slice(start, stop),)
    layers: Sequence[Layer] = [
        layer[window] if layer.ndim == len(shape) and layer.shape[axis] > 1 else layer for layer in size.label.layers
    ]
    return Size(shape, Label(tuple(layers), size.label.static), axis)


def along_axis(tensor: torch.Tensor, label: Label, axis: int) -> Size:
    """The size of a tensor along one dimension."""
    shape = tuple(map(int, tensor.shape))
    return Size(shape, label, axis % max(len(shape), 1))
