"""What flows through each channel: a statistic of its values where the next layers read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.channels.groups import Dependencies, Group
from torchtrim.channels.labels import Layer, varying
from torchtrim.channels.units import IntArray
from torchtrim.errors import InputError
from torchtrim.graph.batches import answer_to
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.execution import no_fused_attention
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.gradients import arguments_in, runnable_copy, watched
from torchtrim.importance.matrices import Places, rows_of

Statistic: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def mean_size(values: torch.Tensor) -> torch.Tensor:
    """The size of each value, of which the mean is taken."""
    return values.abs()


def share_of_nonzero(values: torch.Tensor) -> torch.Tensor:
    """One for each value that is not zero: the mean is one minus the average percentage of zeros (APoZ)."""
    return values != 0


def observations(
    model: nn.Module, dependencies: Dependencies, data: Iterable[Any], inputs: Inputs, statistic: Statistic
) -> list[list[tuple[IntArray, torch.Tensor]]]:
    """For each group, and each layer that reads it, the mean of a statistic of every unit's values.

    What is looked at are the values that go into the layers that read a group, so behind the activation function. Where
    none of these is a module that is called by itself, the products with their weights are (attention computed by a
    function); or else what the layers return that make the group.

    The model runs as a copy that shares its weights, in the mode that it is in, without gradients: a forward for each
    batch. No activations are kept.

    Raises:
        InputError: The data holds nothing, or does not fit the model.
    """
    readings = _readings(dependencies, model.training)
    wanted: dict[str, list[_Reading]] = {}
    for reading in (each for several in readings for each in several):
        wanted.setdefault(reading.path, []).append(reading)
    twin = runnable_copy(model)
    counts: dict[str, int] = {}
    for path, module in twin.named_modules():
        if path in wanted:
            module.register_forward_hook(_watch(path, counts, wanted, statistic))
    weights = {name: held for name, held in twin.named_parameters(remove_duplicate=False) if name in wanted}
    products = _Products({_storage(held): wanted[name] for name, held in weights.items()}, statistic)
    empty = True
    with kept_random_state(), torch.no_grad(), no_fused_attention(), products if weights else nullcontext():
        for number, batch in enumerate(watched(data, "activations")):
            empty = False
            counts.clear()
            given = arguments_in(batch, number, model, inputs)
            answer_to(given.fresh(), twin, number)
    if empty:
        raise InputError("the data gave no batches", path="data", hint="a list or a DataLoader; an iterator is used up")
    return [[reading.mean() for reading in _best(several)] for several in readings]


def _best(readings: list[_Reading]) -> list[_Reading]:
    seen = [reading for reading in readings if reading.count]
    return [reading for reading in seen if not reading.returned] or seen


@dataclass(eq=False)
class _Reading:
    """The values of one group in one call of a module, over all batches.

    Attributes:
        path: The module; or the weight that the values are multiplied with.
        call: Which call of it in a forward.
        returned: Whether what it returns is looked at, or what it is given.
        number: Which tensor of those.
        layer: The unit of each place, as in a label.
        places: Where the units of the group are in it.
        total: The sum over batches of the mean of each place.
        count: Batches so far.
    """

    path: str
    call: int
    returned: bool
    number: int
    layer: Layer
    places: Places
    total: torch.Tensor | None = None
    count: int = 0

    def add(self, value: torch.Tensor, statistic: Statistic) -> None:
        """Take the values of another batch."""
        axes = varying(self.layer)
        if value.dim() != self.layer.ndim or any(value.shape[axis] != self.layer.shape[axis] for axis in axes):
            raise InputError(
                "the data has another size than the example inputs, on which the channels here depend",
                path=self.path,
                found=list(value.shape),
                expected=[size if axis in axes else "any" for axis, size in enumerate(self.layer.shape)],
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError("on this data the values here are not finite", path=self.path, hint="data without NaN")
        rest = [axis for axis in range(value.dim()) if axis not in axes]
        found = statistic(value).float()
        found = (found.mean(rest) if rest else found).flatten()
        self.total = found if self.total is None else self.total + found
        self.count += 1

    def mean(self) -> tuple[IntArray, torch.Tensor]:
        """The units that are there, by their place in the group, and the mean over their values."""
        if self.total is None:
            raise InputError("nothing was read here", path=self.path)
        entries = np.asarray(self.total.double().cpu())[self.places.order] / self.count
        starts = np.cumsum(self.places.counts) - self.places.counts
        return self.places.units, torch.from_numpy(np.add.reduceat(entries, starts) / self.places.counts)


def _readings(dependencies: Dependencies, training: bool) -> list[list[_Reading]]:
    """Where each group is looked at: in what the layers that read it are given, or what those that make it return."""
    calls = dependencies.flow.runs[training].calls
    position = np.full(dependencies.count + 1, -1, dtype=np.int64)
    unit_of = dependencies.unit_of
    several = []
    for group in dependencies.groups:
        position[group.units] = np.arange(len(group.units))

        def called(role: str, *, returned: bool, group: Group = group) -> Iterator[_Reading]:
            owners = dict.fromkeys(member.path.rpartition(".")[0] for member in group.members if member.role == role)
            for path in owners:
                for nth, call in enumerate(calls.get(path, ())):
                    for number, (_, label) in enumerate(call.outputs if returned else call.given):
                        for layer in label.layers:
                            places = rows_of(unit_of[layer], position)
                            if places is not None:
                                yield _Reading(path, nth, returned, number, unit_of[layer], places)

        found = list(called("reads", returned=False))
        if not found:
            for member in group.members:
                places = rows_of(member.units, position)
                if member.role == "reads" and varying(member.units) == {1} and places is not None:
                    found.append(_Reading(member.path, 0, False, 0, member.units, places))
            found += called("writes", returned=True)
        position[group.units] = -1
        several.append(found)
    return several


def _watch(
    path: str, counts: dict[str, int], wanted: dict[str, list[_Reading]], statistic: Statistic
) -> Callable[..., None]:
    def look(_module: nn.Module, given: Any, output: Any) -> None:
        nth = counts[path] = counts.get(path, -1) + 1
        sides = [
            [leaf for leaf in pytree.tree_leaves(side) if isinstance(leaf, torch.Tensor)] for side in (given, output)
        ]
        for reading in wanted[path]:
            if reading.call == nth and reading.number < len(sides[reading.returned]):
                reading.add(sides[reading.returned][reading.number], statistic)

    return look


_OPERANDS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::convolution": (0, 1)}


class _Products(TorchDispatchMode):
    """Sees what is multiplied with a weight, whichever module or function it is that does."""

    def __init__(self, wanted: dict[int, list[_Reading]], statistic: Statistic) -> None:
        TorchDispatchMode.__init__(self)
        self.wanted = wanted
        self.statistic = statistic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = _OPERANDS.get(func._schema.name)
        if places is not None:
            value, weight = (args[place] for place in places)
            for reading in self.wanted.get(_storage(weight), ()):
                reading.add(value, self.statistic)
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    """What a weight and its views share."""
    return tensor.untyped_storage().data_ptr()
