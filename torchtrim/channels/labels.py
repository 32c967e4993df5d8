"""Channel labels: which channel each index of a tensor belongs to, and which channels must go together.

A *channel* is a number. The label of a tensor is a list of layers: whole-number arrays with as many dimensions as the
tensor, of its size where the channel differs along a dimension and of size 1 elsewhere. A weight `(out, in, 3, 3)` has
the layers `(out, 1, 1, 1)` and `(1, in, 1, 1)`; after `flatten`, an activation `(batch, channels, 7, 7)` has one layer
`(1, channels * 49)` in which every channel stands 49 times. So an operator that moves values moves labels by the same
rule, and two tensors that are added tell that their channels go together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Layer: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]

FIXED = 0  # the channel of what cannot be deleted


def varying(layer: Layer) -> frozenset[int]:
    """The dimensions along which a layer tells channels apart.

    Example:
        >>> sorted(varying(np.zeros((1, 4, 1, 2), dtype=np.int64)))
        [1, 3]
    """
    return frozenset([axis for axis, size in enumerate(layer.shape) if size > 1])


@dataclass(frozen=True, eq=False)
class Label:
    """What is known of one tensor.

    Attributes:
        layers: Its layers.
        static: Whether it is computed from parameters and constants alone.
        dead: Whether all of it goes: it belongs to a branch that is taken out.
        aside: Whether it is a by-product (saved statistics) that nothing in a forward reads.
        made: Whether it is static and a product made it: learned queries that were projected, say.
        numbers: The channels that it holds the numbers of, as of `argmax`; an operator that reads these needs all.
    """

    layers: tuple[Layer, ...] = ()
    static: bool = False
    dead: bool = False
    aside: bool = False
    made: bool = False
    numbers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class EqualParts:
    """Channels in parts (the groups of a grouped layer), of which each must keep as many as the others.

    Attributes:
        channels: `(parts, size)`.
        whole: Whether whole parts may go.
        where: The call that asks for it.
    """

    channels: Layer
    whole: bool
    where: str


@dataclass(eq=False)
class Channels:
    """All channels of a model, and what ties them.

    Attributes:
        count: How many there are; 0 is the one that stands for all that cannot be deleted.
        mixed: Channels over which something is computed that depends on all of them (a layer norm): the rest computes
            something else once one is gone.
        consumed: Channels of weights, along the dimension that is summed over.
        doomed: Channels of branches that are taken out.
        parts: What must stay equal.
        tables: Channels that are taken apart and put together in another order, and where: only whole rows and columns
            may go.
        heads: Channels of which a product of two computed values takes a part each time (attention), and the dimension
            that counts the parts: `((heads, width), 0)`.
        scale: Channels that such a product sums up: how many there are in a head sets the scale of the attention.
        links: Channels that go together, each with the one at its place, and why.
        implied: Channels that go if all of some others do, after those, and why.
    """

    count: int = 1
    mixed: list[Layer] = field(default_factory=list)
    consumed: list[Layer] = field(default_factory=list)
    doomed: list[Layer] = field(default_factory=list)
    parts: list[EqualParts] = field(default_factory=list)
    tables: list[tuple[Layer, str]] = field(default_factory=list)
    heads: list[tuple[Layer, int]] = field(default_factory=list)
    scale: list[Layer] = field(default_factory=list)
    links: list[tuple[Layer, Layer, str]] = field(default_factory=list)
    implied: list[tuple[Layer, Layer, str]] = field(default_factory=list)
    _lines: dict[bytes, Layer] = field(default_factory=dict)

    @contextmanager
    def kept_unless_done(self) -> Iterator[None]:
        """Forget what was noted inside, if it ends in an error."""
        before = {name: value if isinstance(value, int) else copy.copy(value) for name, value in vars(self).items()}
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def new(self, shape: Sequence[int]) -> Layer:
        """New channels, in an array of this shape."""
        size = int(np.prod(shape))
        layer = np.arange(self.count, self.count + size, dtype=np.int64).reshape(tuple(shape))
        self.count += size
        return layer

    def leaf(self, shape: Sequence[int], *, static: bool = True) -> Label:
        """The label of a tensor that is not computed from others: channels of its own along every dimension."""
        layers = []
        for axis, size in enumerate(shape):
            if size > 1:
                layers.append(self.new([size if each == axis else 1 for each in range(len(shape))]))
        return Label(tuple(layers), static=static)

    def link(self, one: Layer, other: Layer, why: str) -> None:
        """Say that channels go together, each with the one at its place in the other array."""
        left, right = np.broadcast_arrays(one, other)
        self.links.append((left.ravel(), right.ravel(), why))

    def pin(self, layer: Layer, why: str) -> None:
        """Say that channels cannot be deleted."""
        self.link(layer, np.full((), FIXED, dtype=np.int64), why)

    def pin_numbered(self, label: Label, why: str) -> None:
        """Say that the channels whose numbers a value holds cannot be deleted: an operator reads the value."""
        for layer in label.numbers:
            self.pin(layer, why)

    def implies(self, all_of: Layer, then: Layer, why: str) -> None:
        """Say that if all of some channels go, others have to."""
        self.implied.append((all_of.ravel(), then.ravel(), why))

    def whole(self, one: Layer, other: Layer, why: str) -> None:
        """Say that where all channels in a row of one array go, all those in the same row of the other go too."""
        for left, right in zip(one, other, strict=True):
            self.implies(left, right, why)
            self.implies(right, left, why)

    def within(self, fine: Layer, coarse: Layer, why: str) -> None:
        """Say that each channel of one array goes where all those of a finer one go that stand at its places.

        Where the first is the finer one after all (each of its channels stands at one of the other's), the other way.
        """
        left, right = np.broadcast_arrays(coarse, fine)
        one, other = np.divmod(np.unique(left.ravel() * self.count + right.ravel()), self.count)
        if np.unique(one).size == one.size and np.unique(other).size < other.size:
            one, other = other[np.argsort(other, kind="stable")], one[np.argsort(other, kind="stable")]
        starts = np.flatnonzero(np.diff(one, prepend=-1))
        for each, row in zip(one[starts], np.split(other, starts[1:]), strict=True):
            self.implies(row, each.reshape(1), why)
            self.implies(each.reshape(1), row, why)

    def lines(self, layer: Layer, axes: Collection[int], why: str) -> Layer:
        """Channels that stand for the lines of a layer across some dimensions: one goes where all in its line do."""
        table, places = lines_of(layer, axes)
        key = np.int64(table.shape[1]).tobytes() + table.tobytes()
        if key not in self._lines:
            self._lines[key] = self.new((len(table),))
            self.within(table, self._lines[key][:, None], why)
        shape = [size if axis in axes else 1 for axis, size in enumerate(layer.shape)]
        return self._lines[key][places].reshape(shape)

    def fixed_along(self, layer: Layer, axes: Iterable[int], why: str) -> Layer | None:
        """The layer without some dimensions, which cannot be narrowed: along them, all goes or nothing does.

        `None` where it varies along no others: then none of it can be deleted.
        """
        along = varying(layer) & frozenset(axes)
        if not along:
            return layer
        if along == varying(layer):
            self.pin(layer, why)
            return None
        first = layer[tuple(slice(0, 1) if axis in along else slice(None) for axis in range(layer.ndim))]
        self.link(layer, first, why)
        return first

    def closure(self, wanted: Mask) -> Mask:
        """Whether each channel goes, where some are to go. What cannot be deleted is told by `obstacles`."""
        gone = wanted.copy()
        one, other = self._edges()
        while True:
            count = int(gone.sum())
            gone[other[gone[one]]] = True
            gone[one[gone[other]]] = True
            if int(gone.sum()) > count:
                continue
            for before, after, _ in self.implied:
                if before.size and gone[before].all():
                    gone[after] = True
            gone[FIXED] = False
            if int(gone.sum()) == count:
                return gone

    def pinned(self) -> Mask:
        """Whether each channel runs together with what cannot be deleted."""
        found = np.zeros(self.count, dtype=bool)
        for left, right, _ in self.links:
            found[right[left == FIXED]] = True
            found[left[right == FIXED]] = True
        one, other = self._edges()
        count = -1
        while count != (count := int(found.sum())):
            found[other[found[one]]] = True
            found[one[found[other]]] = True
        return found

    def obstacles(self, gone: Mask) -> list[str]:
        """Why some of the channels that would have to go cannot."""
        found = [
            why
            for left, right, why in self.links
            if (((left == FIXED) & gone[right]) | ((right == FIXED) & gone[left])).any()
        ]
        found += [why for before, after, why in self.implied if before.size and gone[before].all() and not after.all()]
        return list(dict.fromkeys(found))

    def _edges(self) -> tuple[Layer, Layer]:
        if not self.links:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        pairs = np.stack([np.concatenate([link[side] for link in self.links]) for side in (0, 1)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != FIXED).all(axis=0)]
        return np.divmod(np.unique(pairs[0] * self.count + pairs[1]), self.count)


def lines_of(layer: Layer, axes: Iterable[int]) -> tuple[Layer, Layer]:
    """The different lines of a layer across some dimensions, and for each place along these the number of its line.

    Example:
        >>> table, places = lines_of(np.array([[1, 2], [3, 4], [1, 2]]), {0})
        >>> table.tolist(), places.tolist()
        ([[1, 2], [3, 4]], [0, 1, 0])
    """
    first = sorted(axes)
    moved = np.moveaxis(layer, first, range(len(first)))
    table, places = np.unique(moved.reshape(math.prod(moved.shape[: len(first)]), -1), axis=0, return_inverse=True)
    return table, places.reshape(-1)


def kept_indices(layer: Layer, gone: Mask) -> dict[int, Mask] | None:
    """For each dimension the indices that stay; `None` where what stays has gaps; none of a layer without entries.

    Example:
        >>> layer = np.array([[1, 2], [3, 4]])
        >>> gone = np.array([False, True, False, True, False])
        >>> kept_indices(layer, gone)
        {0: array([ True,  True]), 1: array([False,  True])}
        >>> gone[3] = False
        >>> kept_indices(layer, gone) is None
        True
    """
    if not layer.size:
        return {}
    stays = ~gone[layer]
    if layer.size == max(layer.shape, default=0) > 1:
        return {layer.shape.index(layer.size): stays.ravel()}
    found: dict[int, Mask] = {}
    grid: Mask = np.ones((1,) * layer.ndim, dtype=bool)
    for axis in sorted(varying(layer)):
        others = tuple(each for each in range(layer.ndim) if each != axis)
        found[axis] = np.asarray(stays.any(axis=others))
        grid = grid & found[axis].reshape([-1 if each == axis else 1 for each in range(layer.ndim)])
    if not stays.any():
        return {axis: np.zeros(layer.shape[axis], dtype=bool) for axis in found}
    return found if bool((grid == stays).all()) else None
