"""What a followed forward did: its operators, its modules' calls, and the channels of every value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from torchtrim.channels.labels import Channels, EqualParts, Label, Mask, kept_indices
from torchtrim.channels.rules import Shape
from torchtrim.channels.widths import Attribute, Demand, Tie
from torchtrim.graph.macs import macs_of, multiplies

Values: TypeAlias = "tuple[tuple[Shape, Label], ...]"
Cost: TypeAlias = Callable[[Sequence[Shape], Sequence[Shape]], int]


@dataclass(frozen=True)
class Step:
    """One operator that was run.

    Attributes:
        name: The operator.
        where: The call, in words.
        path: The module that made it.
        outputs: The shape and label of each tensor it gave.
        given: The same of its tensor arguments, in order.
        macs: Its multiply-accumulates, at the batch size of the run.
        start: Where a slice begins, and along which dimension.
        source: The label of what is sliced.
        cost: Its multiply-accumulates from the shapes of what it is given and gives; `None` where it has none.
        free: For each output the dimensions along which the same values are repeated and no channels are told apart:
            as often as something else needs them.
    """

    name: str
    where: str
    path: str
    outputs: Values
    given: Values = ()
    macs: int = 0
    start: tuple[int, int] | None = None
    source: Label | None = None
    cost: Cost | None = None
    free: tuple[frozenset[int], ...] = ()

    @property
    def static(self) -> bool:
        """Whether it is computed from parameters and constants alone, whatever the batch."""
        return all(label.static for _, label in self.given)

    def macs_after(self, gone: Mask) -> int:
        """Its multiply-accumulates when channels are gone, at the batch size of the run.

        Where what is left of a value has gaps, its shape before is taken.
        """
        if self.cost is None:
            return 0
        given, outputs = (
            [shape_after(*value, gone) or value[0] for value in side] for side in (self.given, self.outputs)
        )
        return self.cost(given, outputs)


@dataclass(frozen=True)
class ModuleCall:
    """What a module was given and what it returned: the shape and label of each tensor.

    Attributes:
        given: Its positional arguments.
        outputs: What it returned.
    """

    given: Values
    outputs: Values


@dataclass
class Run:
    """One forward in one mode.

    Attributes:
        training: The mode.
        batch: The batch size.
        blank: Whether it ran on the meta device, not on fake tensors.
        steps: Every operator, in order.
        calls: The calls of each module, by its path (its first one), in the order of return.
        random: Whether random numbers were drawn.
        joints: The modules whose forward joins a branch that is taken out to others.
        unclear: Whether a dead summand is not the output of a module: what the sum was without it cannot be told.
    """

    training: bool
    batch: int = 1
    blank: bool = False
    steps: list[Step] = field(default_factory=list)
    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)
    random: bool = False
    joints: dict[str, None] = field(default_factory=dict)
    unclear: bool = False


@dataclass(eq=False)
class Flow:
    """The channels of a model: what `follow` found.

    Attributes:
        channels: All channels, and what ties them.
        tensors: The label of every parameter and buffer, by the identity of the tensor.
        runs: A forward in eval mode, and one in train mode.
        demands: The numbers that are given where sizes are meant, in both.
        ties: Channels of which the same fraction must be kept.
        equal_parts: Channels in parts that a forward takes for equally large (`chunk`).
        numbers: The whole numbers that modules hold.
    """

    channels: Channels
    tensors: dict[int, Label]
    runs: list[Run]
    demands: list[Demand] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    equal_parts: list[EqualParts] = field(default_factory=list)
    numbers: dict[Attribute, int] = field(default_factory=dict)


def shape_after(shape: Shape, label: Label, gone: Mask) -> Shape | None:
    """The shape of a value when channels are gone; `None` where what is left of it has gaps."""
    kept: dict[int, Mask] = {}
    for layer in label.layers:
        indices = kept_indices(layer, gone)
        if indices is None:
            return None
        for axis, mask in indices.items():
            kept[axis] = kept.get(axis, mask) & mask
    return tuple(int(kept[axis].sum()) if axis in kept else size for axis, size in enumerate(shape))


def cost_of(op: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, Cost | None]:
    """An operator's multiply-accumulates, and the same as a function of the shapes of its tensors."""
    now = macs_of(op, args, kwargs, out) if multiplies(op) else 0
    if not now:
        return 0, None
    taken, form = pytree.tree_flatten((args, kwargs))
    given, made = pytree.tree_flatten(out)
    plain, rest = ([_HOLE if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves] for leaves in (taken, given))
    known: dict[tuple[Shape, ...], int] = {}

    def cost(given: Sequence[Shape], outputs: Sequence[Shape]) -> int:
        key = (*given, *outputs)
        if key not in known:
            sizes = iter([torch.empty(shape, device="meta") for shape in key])
            filled, found = ([next(sizes) if leaf is _HOLE else leaf for leaf in leaves] for leaves in (plain, rest))
            (args, kwargs), out = pytree.tree_unflatten(filled, form), pytree.tree_unflatten(found, made)
            known[key] = macs_of(op, args, kwargs, out)
        return known[key]

    return now, cost


_HOLE = object()  # where a tensor is
