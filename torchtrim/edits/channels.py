"""`delete_channels`: take channels out by their numbers; everything downstream follows."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from torchtrim.channels.follow import Flow, follow
from torchtrim.channels.labels import FIXED, Label, Layer, Mask, varying
from torchtrim.edits.apply import run
from torchtrim.edits.channel_branches import take_out
from torchtrim.edits.channel_check import check_shapes, check_values, refuse_uneven
from torchtrim.edits.channel_narrow import changed_in, narrow, narrowings, tell_the_truth
from torchtrim.edits.edit import Edit
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import EditError, PathError, SelectionError, nearest
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.reader import inputs_for
from torchtrim.graph.stale import forget_computed

Selection = int | slice | Iterable[Any] | torch.Tensor


@dataclass(frozen=True)
class DeleteChannels(Edit):
    """Delete channels by their numbers.

    Attributes:
        channels: For each path of a layer the numbers of the channels of its output that go.
        output: Whether the model's own outputs may get narrower.
        narrowed: What followed, in the record of a deletion that was done: for each parameter and buffer, the indices
            that went along each of its dimensions (`"0,1"`: of a grouped layer's table of outputs and inputs, flat).
    """

    kind: ClassVar[str] = "delete_channels"
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    output: bool = False
    narrowed: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{path}: {_few(numbers)}" for path, numbers in self.channels.items()]
        return f"{self.kind}({'; '.join(told[:6] + (['...'] if len(told) > 6 else []))})"

    def perform(self, work: Work) -> Edit:
        """Do it on `work.model`; returns the record with what followed."""
        if not self.channels or not all(self.channels.values()):
            raise EditError("no channels to delete", found=self.channels, expected="a path, and numbers of channels")
        flow = follow(work.model, work.inputs)
        asked = {path: _Asked.of(work.model, flow, path, numbers) for path, numbers in self.channels.items()}
        dead = frozenset(_first_name(work.model, path) for path, each in asked.items() if each.all)
        if dead:
            flow = follow(work.model, work.inputs, dead=dead)
        some = [_Asked.of(work.model, flow, path, each.numbers) for path, each in asked.items() if not each.all]
        gone = _gone(flow, some, self.output)
        if dead:
            take_out(work, flow)
        changes = narrowings(work.model, flow, gone)
        narrow(work, changes)
        tell_the_truth(work.model, flow, gone, {change.owner for change in changes})
        forget_computed(work.model, changed_in(changes))
        check_shapes(work, flow, gone, cut=bool(dead))
        if work.check:
            work.checked += check_values(work, flow, gone)
        work.joints += [each.joint(gone) for each in some]
        others = sorted({change.path.rpartition(".")[0] for change in changes} - set(asked))
        if others:
            work.notes.append(f"narrowed with them: {', '.join(others)}")
        if any(bool(gone[layer].any()) for layer in flow.channels.mixed):
            work.notes.append("a norm or sum over the deleted channels computes something else without them")
        return replace(
            self,
            channels={path: each.numbers for path, each in asked.items()},
            narrowed={change.path: change.removed for change in changes},
        )


def delete_channels(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    path: str | Mapping[str, Selection],
    channels: Selection | None = None,
    *,
    output: bool = False,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Delete channels of a layer's output, and all that depends on them, in whatever else has to follow.

    The channels are followed through the whole forward, operator by operator, in both modes: through views,
    concatenations, splits, groups and recurrent cells. What reads a deleted channel loses its weights for it; what is
    added to one (a residual connection) loses its own channel of that number too. Every attribute that counts channels
    tells the truth afterwards.

    Deleting every channel of a layer takes out the branch that it feeds: a concatenation keeps its other parts, a sum
    the other summand.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        path: The path of a layer; or for several at once, a dict of paths and their channels.
        channels: The numbers of the channels that go, counted along the layer's output: a number (negative ones count
            from the end), several, a slice, or a boolean mask, true where a channel goes.
        output: Whether the model's own outputs may get narrower (a class taken out of a classifier).
        copy: As for `cut`; without it, parameters that lose channels stay the same objects too.
        check: Run the result in both modes, at several batch sizes and another input size, and compare it with the
            original that ignores the deleted channels. Where a norm goes over them, it is only run.

    Returns:
        The narrower model.

    Raises:
        PathError: No such path, or it is never called.
        SelectionError: A number out of range, or a mask of another length.
        EditError: A channel cannot go: it reaches the model's output, an operator without a rule, or a width that is
            written into a forward; or groups would keep different numbers of channels. Says where.
        CheckFailed: The result does not compute what it should.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> narrow = delete_channels(net, torch.zeros(1, 3, 8, 8), "0", [0, -1])
        >>> narrow[0].out_channels, narrow[1].num_features, narrow[4].in_features
        (6, 6, 216)
    """
    selections = _selections(path, channels)
    if any(not _is_numbers(each) for each in selections.values()):
        plain = unwrap(model)
        flow = follow(plain, inputs_for(plain, example_inputs))
        widths = {key: _Asked.of(plain, flow, key, (0,)).width for key in selections}
    else:
        widths = dict.fromkeys(selections, 0)
    numbers = {key: _numbers(key, each, widths[key]) for key, each in selections.items()}
    return run(model, example_inputs, [DeleteChannels(numbers, output)], copy=copy, check=check)


def _few(numbers: tuple[int, ...], limit: int = 8) -> str:
    more = f", ... ({len(numbers)} channels)" if len(numbers) > limit else ""
    return ", ".join(map(str, numbers[:limit])) + more


def _selections(path: str | Mapping[str, Selection], channels: Selection | None) -> dict[str, Selection]:
    if isinstance(path, str):
        if channels is None:
            raise EditError("which channels of it?", path=path, expected="numbers, a slice or a mask")
        return {path: channels}
    if not isinstance(path, Mapping) or channels is not None:
        raise EditError(
            "channels are given with a path, or by path in a dict",
            found=path,
            expected='"conv1", [0, 3] or {"conv1": [0, 3]}',
        )
    return dict(path)


def _is_mask(selection: Selection) -> bool:
    if isinstance(selection, (torch.Tensor, np.ndarray)):
        return selection.dtype in (torch.bool, np.dtype(bool))
    return isinstance(selection, (list, tuple)) and bool(selection) and all(type(each) is bool for each in selection)


def _is_numbers(selection: Selection) -> bool:
    return not isinstance(selection, slice) and not _is_mask(selection)


def _numbers(path: str, selection: Selection, width: int) -> tuple[int, ...]:
    if isinstance(selection, slice):
        return tuple(range(width)[selection])
    if _is_mask(selection):
        mask = np.asarray(selection)
        if mask.shape != (width,):
            raise SelectionError("a mask of another length", path=path, found=list(mask.shape), expected=[width])
        return tuple(int(number) for number in np.flatnonzero(mask))
    if isinstance(selection, (torch.Tensor, np.ndarray)):
        selection = selection.reshape(-1).tolist()
    several: Iterable[Any] = selection if isinstance(selection, Iterable) else [selection]
    try:
        return tuple(operator.index(_no_truth_value(each)) for each in several)
    except TypeError as error:
        raise SelectionError(
            "channels are given by number", path=path, found=selection, expected="whole numbers, a slice or a mask"
        ) from error


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError("a truth value among numbers")
    return value


@dataclass(frozen=True, eq=False)
class _Asked:
    """The channels asked for at one path.

    Attributes:
        path: The path.
        numbers: Their numbers, from 0, in order.
        width: How many channels there are.
        shape: The shape of the output.
        axis: The dimension that they lie along.
        layers: The channels along it, for each call in each mode.
    """

    path: str
    numbers: tuple[int, ...]
    width: int
    shape: tuple[int, ...]
    axis: int
    layers: tuple[Layer, ...]

    @staticmethod
    def of(model: nn.Module, flow: Flow, path: str, numbers: Iterable[int]) -> _Asked:
        name = _first_name(model, path)
        calls = [call.outputs[0] for each in flow.runs for call in each.calls.get(name, []) if call.outputs]
        weight = model.get_submodule(path)._parameters.get("weight")
        if not calls and weight is not None and weight.dim():
            # Its weight is read by the module that it lies in.
            rows = [layer for layer in flow.tensors[id(weight)].layers if varying(layer) == {0}]
            calls = [((1, int(weight.shape[0])), Label(tuple(layer.reshape(1, -1) for layer in rows)))]
        if not calls:
            raise PathError(
                "it is never called for these inputs, so it has no channels",
                path=path,
                hint="a path that tt.trace lists",
            )
        shape = calls[0][0]
        pinned = flow.channels.pinned()
        free = [layer for _, label in calls for layer in label.layers if not pinned[layer].all()]
        told = free or [layer for _, label in calls for layer in label.layers]
        axes = {axis for layer in told for axis in varying(layer)}
        axis = next(iter(axes)) if len(axes) == 1 else _axis_of_one(shape)
        layers = tuple(layer.reshape(-1) for layer in told if varying(layer) == {axis})
        # A layer of its own may tie two of its channels (both directions of a recurrent one); a view repeats them.
        repeated = any(len(set(each.tolist())) < each.size for each in layers) and not _has_weights(model, path)
        if len(axes) > 1 or repeated or (not layers and shape[axis] > 1):
            raise EditError(
                "its output has no channels of its own that could go one by one",
                path=path,
                found=list(shape),
                hint="the path of the layer that makes them",
            )
        width = shape[axis]
        found = sorted({_in_range(path, number, width) for number in numbers})
        return _Asked(path, tuple(found), width, shape, axis, layers or (np.zeros(1, np.int64),))

    @property
    def all(self) -> bool:
        """Whether every channel goes."""
        return len(self.numbers) == self.width

    def joint(self, gone: Mask) -> Joint:
        """What becomes of its output, for a plan."""
        after = list(self.shape)
        after[self.axis] = int((~gone[self.layers[0]]).sum())
        return Joint(self.path, (1, *self.shape[1:]), (1, *after[1:]), "narrowed")


def _has_weights(model: nn.Module, path: str) -> bool:
    return any(parameter is not None for parameter in model.get_submodule(path)._parameters.values())


def _axis_of_one(shape: tuple[int, ...]) -> int:
    """Where the single channel of an output is."""
    return 1 if len(shape) > 2 and shape[1] == 1 else len(shape) - 1


def _in_range(path: str, number: int, width: int) -> int:
    if not -width <= number < width:
        raise SelectionError("no such channel", path=path, found=number, expected=f"{-width} to {width - 1}")
    return number % width


def _first_name(model: nn.Module, path: str) -> str:
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        raise PathError("no such module", path=path, hint=nearest(path, modules))
    return str(next(name for name, module in modules.items() if module is modules[path]))


def _gone(flow: Flow, asked: Iterable[_Asked], output: bool) -> Mask:
    """Every channel that has to go.

    Raises:
        EditError: One of them cannot.
    """
    wanted = np.zeros(flow.channels.count, dtype=bool)
    for layer in flow.channels.doomed:
        wanted[layer] = True
    for each in asked:
        for layer in each.layers:
            chosen = layer[list(each.numbers)]
            if (chosen == FIXED).any():
                raise EditError("these channels are not made by a layer of the model", path=each.path)
            wanted[chosen] = True
    gone = flow.channels.closure(wanted)
    paths = ", ".join(each.path for each in asked)
    obstacles = flow.channels.obstacles(gone)
    if obstacles:
        raise EditError(
            "these channels cannot be deleted: they run together with what cannot be narrowed at "
            + "; ".join(obstacles[:4]),
            path=paths,
            hint="other channels, or another layer",
        )
    for forward in flow.runs:
        for shape, label in forward.calls[""][0].outputs:
            if not output and any(bool(gone[layer].any()) for layer in label.layers):
                raise EditError(
                    "these channels reach the model's output",
                    path=paths,
                    found=f"an output of shape {list(shape)}",
                    hint="output=True, if the output may get narrower",
                )
    refuse_uneven(flow, gone)
    return gone
