"""What a model costs once channels are gone, from its followed channels alone: MACs and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from torchtrim.channels.labels import Label, Layer, Mask, varying
from torchtrim.channels.rules import Shape, shape_of
from torchtrim.channels.run import Flow, Step, Values

_Numbers: TypeAlias = npt.NDArray[np.int64]


def macs(flow: Flow, gone: Mask) -> int:
    """Multiply-accumulates of one eval-mode forward at batch 1 when channels are gone.

    Made for a search: what depends on the model alone is worked out in the first call.

    Args:
        flow: The channels of the model.
        gone: Whether each channel goes, `(flow.channels.count,)`.
    """
    if flow not in _RUNS:
        steps = [step for step in flow.runs[0].steps if step.cost is not None]
        _RUNS[flow] = (steps, Sizes.of(side for step in steps for side in (step.given, step.outputs)))
    steps, sizes = _RUNS[flow]
    shapes = iter(sizes.after(gone))
    total = 0
    for step in steps:
        total += _at_one(step, flow.runs[0].batch, next(shapes), next(shapes))
    return total


def params(model: nn.Module, flow: Flow, gone: Mask) -> int:
    """How many parameters a model has when channels are gone; shared ones count once.

    Args:
        model: The model that was followed.
        flow: Its channels.
        gone: Whether each channel goes.
    """
    held = list(model.parameters())
    return sum(_counts(flow, held, gone))


def size_mb(model: nn.Module, flow: Flow, gone: Mask) -> float:
    """The size of a model's parameters and buffers when channels are gone, in MB of a million bytes.

    Args:
        model: The model that was followed.
        flow: Its channels.
        gone: Whether each channel goes.
    """
    held = [*model.parameters(), *model.buffers()]
    counts = _counts(flow, held, gone)
    return sum(count * tensor.element_size() for count, tensor in zip(counts, held, strict=True)) / 1e6


def _counts(flow: Flow, held: Sequence[torch.Tensor], gone: Mask) -> list[int]:
    """How many values are left of each parameter or buffer."""
    labels = [flow.tensors.get(id(each), Label()) for each in held]
    known = _HELD.setdefault(flow, {})
    if len(held) not in known:
        known[len(held)] = Sizes.of([tuple(zip(map(shape_of, held), labels, strict=True))])
    (shapes,) = known[len(held)].after(gone)
    return [math.prod(shape) for shape in shapes]


def _at_one(step: Step, batch: int, given: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    if step.cost is None:
        return 0
    count = step.cost(given, outputs)
    return count if step.static or count % batch else count // batch


@dataclass(frozen=True, eq=False)
class Sizes:
    """The shapes of many values, as functions of the channels that are gone.

    A dimension along which a layer varies keeps as many indices as there are channels left in a line of the layer; of
    the lines of a table (and of a weight whose groups read other channels each) the longest tells.

    Attributes:
        values: For each list of values the shapes before, and for each dimension that may shrink the number of its
            count: `(value, dimension, count)`.
        lines: The channels of all lines, one line after the other.
        starts: Where each line begins.
        counts: For each count, where its lines begin.
    """

    values: list[tuple[list[Shape], list[tuple[int, int, int]]]]
    lines: Layer
    starts: _Numbers
    counts: _Numbers

    @staticmethod
    def of(sides: Iterable[Values]) -> Sizes:
        """The shapes of each list of values."""
        lines: list[Layer] = []
        first: list[int] = []  # for each count, its first line
        known: dict[bytes, int] = {}
        values = []
        for side in sides:
            shrinks = []
            for number, (_, label) in enumerate(side):
                for axis, table in _lines(label):
                    if not table.size:
                        continue
                    key = np.int64(table.shape[1]).tobytes() + table.tobytes()
                    if key not in known:
                        known[key] = len(first)
                        first.append(len(lines))
                        lines.extend(table)
                    shrinks.append((number, axis, known[key]))
            values.append(([shape for shape, _ in side], shrinks))
        starts = np.cumsum([0, *(line.size for line in lines)])[:-1] if lines else np.zeros(0, np.int64)
        joined = np.concatenate(lines) if lines else np.zeros(0, np.int64)
        return Sizes(values, joined, starts.astype(np.int64), np.array(first, np.int64))

    def after(self, gone: Mask) -> list[list[Shape]]:
        """The shapes of each list of values."""
        longest: list[int] = []
        if self.lines.size:
            left = np.add.reduceat((~gone[self.lines]).astype(np.int64), self.starts)
            longest = np.maximum.reduceat(left, self.counts).tolist()
        found = []
        for before, shrinks in self.values:
            shapes = [list(shape) for shape in before]
            for number, axis, count in shrinks:
                shapes[number][axis] = min(shapes[number][axis], longest[count])
            found.append([tuple(shape) for shape in shapes])
        return found


def _lines(label: Label) -> Iterable[tuple[int, Layer]]:
    """For each dimension along which a label tells channels apart, its lines."""
    for layer in label.layers:
        for axis in varying(layer):
            table = np.moveaxis(layer, axis, -1).reshape(-1, layer.shape[axis])
            yield axis, table if len(table) == 1 else np.unique(table, axis=0)


_RUNS: WeakKeyDictionary[Flow, tuple[list[Step], Sizes]] = WeakKeyDictionary()
_HELD: WeakKeyDictionary[Flow, dict[int, Sizes]] = WeakKeyDictionary()  # by how many tensors are asked for
