"""Units: the smallest sets of channels that can only go together, such that any choice of them can be taken out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from torchtrim.channels.labels import FIXED, EqualParts, Layer, Mask, varying
from torchtrim.channels.run import Flow

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Units:
    """Which channels go together.

    Attributes:
        root: For each channel the least channel of its unit; `FIXED` where it cannot go.
        first: The same as links alone say it.
        reasons: Why channels cannot go, by what `first` says of them.
        implied: What goes where others go.
    """

    root: IntArray
    first: IntArray
    reasons: dict[int, str]
    implied: Implied

    def reason(self, layer: Layer) -> str | None:
        """Why one of a layer's channels cannot go; `None` where all can."""
        held = self.first[layer[self.root[layer] == FIXED]].ravel()
        return next((self.reasons[each] for each in held.tolist() if each in self.reasons), None)


def units_of(flow: Flow, chosen: Mask, protect: Iterable[tuple[Layer, str]] = ()) -> Units:
    """The units of a model's channels.

    Channels that are tied one by one are one unit; where values are taken apart over several dimensions (attention
    heads, shuffles), whole rows are; and in parts that must stay equal, the same place of every part, or whole parts.

    Args:
        flow: The channels.
        chosen: Whether each channel is one that a weight writes or reads: others go when all that implies them does.
        protect: Channels that are to stay, and why.
    """
    merge = _Merge.of(flow, protect)
    implied = Implied.of(flow, chosen)
    tables = _tables(flow)
    parts = _by_call([*flow.channels.parts, *flow.equal_parts])
    heads = _heads(flow)
    merge.shared(heads, implied)
    while True:
        before = merge.root.copy()
        for layer, axis in heads:
            merge.heads(layer, axis, implied)
        implied.join(merge)
        for layer in flow.channels.scale:
            merge.whole_heads(layer)
        for call in parts:
            merge.parts(call)
        implied.join(merge)
        for layer, where in tables:
            merge.rows(layer, where)
        for tie in flow.ties:
            if (merge.root[tie.one] == FIXED).any() or (merge.root[tie.other] == FIXED).any():
                for layer in (tie.one, tie.other):
                    merge.pin(layer, f"as many have to stay as of what cannot be narrowed, at {tie.where}")
        if (merge.root == before).all():
            return Units(merge.root, merge.first, merge.reasons, implied)


def all_layers(flow: Flow) -> list[tuple[Layer, str]]:
    """Every layer of every value, once, and the call that made it."""
    found: dict[int, tuple[Layer, str]] = {}
    for run in flow.runs:
        for step in run.steps:
            for _, label in step.outputs:
                for layer in label.layers:
                    found.setdefault(id(layer), (layer, step.where))
    return list(found.values())


def _tables(flow: Flow) -> list[tuple[Layer, str]]:
    """Every layer over several dimensions, once."""
    found: dict[tuple[tuple[int, ...], bytes], tuple[Layer, str]] = {}
    for layer, where in (*flow.channels.tables, *all_layers(flow)):
        if len(varying(layer)) > 1:
            found.setdefault((layer.shape, layer.tobytes()), (layer, where))
    return list(found.values())


def _heads(flow: Flow) -> list[tuple[Layer, int]]:
    """The heads of each attention, once; those first whose number of channels sets its scale."""
    scale = {layer.tobytes() for layer in flow.channels.scale}
    found = {(layer.tobytes(), axis): (layer, axis) for layer, axis in flow.channels.heads}
    return sorted(found.values(), key=lambda each: each[0].tobytes() not in scale)


def _by_call(parts: Sequence[EqualParts]) -> list[list[EqualParts]]:
    """The parts of each call (what it reads and what it writes): all of them go by rows, or all by columns."""
    calls: dict[tuple[str, int], dict[bytes, EqualParts]] = {}
    for part in parts:
        calls.setdefault((part.where, len(part.channels)), {}).setdefault(part.channels.tobytes(), part)
    return [list(call.values()) for call in calls.values()]


_HEADS = "the heads of an attention"


@dataclass(eq=False)
class _Merge:
    """Channels while they are merged."""

    root: IntArray
    first: IntArray
    reasons: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(flow: Flow, protect: Iterable[tuple[Layer, str]]) -> _Merge:
        """Merged as links say; what is linked to what cannot go is `FIXED`."""
        channels = flow.channels
        pins = [(np.zeros(0, np.int64), ""), *((layer.ravel(), why) for layer, why in protect)]
        for run in flow.runs:
            for call in run.calls.get("", ()):
                outputs = [layer for _, label in call.outputs for layer in label.layers]
                pins += [(layer.ravel(), "the model's output has its width") for layer in outputs]
        one, other = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for left, right, why in channels.links:
            held = (left == FIXED) | (right == FIXED)
            if held.any():
                pins.append((np.maximum(left, right)[held], f"it runs together with what cannot be narrowed at {why}"))
            if not held.all():
                one.append(left[~held])
                other.append(right[~held])
        merge = _Merge(np.arange(channels.count, dtype=np.int64), np.zeros(0, np.int64))
        merge.join(np.concatenate(one), np.concatenate(other))
        merge.first = merge.root.copy()
        held_by = np.concatenate([np.full(held.size, number) for number, (held, _) in enumerate(pins)])
        roots, places = np.unique(merge.first[np.concatenate([held for held, _ in pins])], return_index=True)
        merge.reasons = {
            int(root): pins[number][1] for root, number in zip(roots.tolist(), held_by[places].tolist(), strict=True)
        }
        merge._hold(roots)
        return merge

    def _hold(self, roots: IntArray) -> None:
        held = np.zeros(self.root.shape, dtype=bool)
        held[roots] = True
        self.root[held[self.root]] = FIXED

    def pin(self, channels: Layer, why: str) -> None:
        """Hold channels fast."""
        roots = np.unique(self.root[channels])
        self._because(roots, why)
        self._hold(roots)

    def _because(self, roots: IntArray, why: str) -> None:
        for each in np.unique(self.first[np.isin(self.root, roots[roots != FIXED])]).tolist():
            self.reasons.setdefault(each, why)

    def join(self, one: IntArray, other: IntArray, why: Sequence[str] = ("",), of: IntArray | None = None) -> None:
        """Merge channels, each with the one at its place in the other array.

        Args:
            one: Channels.
            other: As many.
            why: Reasons for channels that cannot go since.
            of: The number of the reason of each pair; by default the first.
        """
        root = self.root
        of = np.zeros(one.shape, dtype=np.int64) if of is None else of
        while True:
            left, right = root[one], root[other]
            apart = left != right
            if not apart.any():
                return
            one, other, of = one[apart], other[apart], of[apart]
            low, high = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
            held = low == FIXED
            for number in np.unique(of[held]).tolist():
                self._because(high[held & (of == number)], why[number])
            np.minimum.at(root, high, low)
            while (root[root] != root).any():
                root[:] = root[root]

    def rows(self, layer: Layer, where: str, axis: int | None = None) -> None:
        """Merge a table's slices along one dimension, so that what stays of it has no gaps.

        Args:
            layer: The table.
            where: The call.
            axis: The dimension; by default that which leaves the most units.
        """
        cells = self.root[layer]
        choices = sorted(varying(layer)) if axis is None else [axis]
        flat = {each: np.moveaxis(cells, each, 0).reshape(cells.shape[each], -1) for each in choices}
        if not any(bool((each == each[:, :1]).all()) for each in flat.values()):
            self._slices(max(flat.values(), key=_units_left), f"its channels are taken apart at {where}")

    def shared(self, heads: Sequence[tuple[Layer, int]], implied: Implied) -> None:
        """Hold weights fast that all heads of an attention share: positions' embeddings, a convolution of each head.

        One of their channels would take the same place of every head with it, so that no head could go whole.

        Args:
            heads: The channels of each attention by heads, and the dimension that counts these.
            implied: What goes where others go.
        """
        one, taken = implied.alone(self)
        found = []
        for layer, axis in heads:
            rows = np.moveaxis(self.root[layer], axis, 0).reshape(layer.shape[axis], -1)
            head_of = np.full(self.root.shape, -1)
            head_of[rows] = np.arange(len(rows))[:, None]
            head_of[FIXED] = -1
            if any(len(np.unique(head_of[row])) > 1 for row in rows):
                continue  # they run together anyway
            of, to = head_of[one], head_of[taken]
            pairs = np.unique(np.stack([one, to])[:, (of < 0) & (to >= 0)], axis=1)
            several, counts = np.unique(pairs[0], return_counts=True)
            found.append(several[counts > 1])
        for each in found:
            self.pin(each, "all heads of an attention share it")

    def _units_in(self, layer: Layer) -> int:
        found = np.unique(self.root[layer])
        return len(found) - bool((found == FIXED).any())

    def heads(self, layer: Layer, axis: int, implied: Implied) -> None:
        """Merge the channels of each attention head; where heads cannot go, the same place of all of them.

        Args:
            layer: The channels, by heads.
            axis: The dimension that counts the heads.
            implied: What goes with a head.
        """
        if (self.root[layer] == FIXED).all():
            return
        before = self.root.copy(), dict(self.reasons)
        self.rows(layer, _HEADS, axis)
        implied.join(self)
        if self._units_in(layer) > 1:
            return
        self.root, self.reasons = before
        for other in varying(layer) - {axis}:
            self.rows(layer, _HEADS, other)

    def whole_heads(self, layer: Layer) -> None:
        """Hold channels fast that set the scale of an attention by their number, unless its heads go whole."""
        cells = self.root[layer].reshape(layer.shape[0], -1)
        if not bool((cells == cells[:, :1]).all()):
            self.pin(layer, "how many there are in a head sets the scale of an attention")

    def parts(self, call: list[EqualParts]) -> None:
        """Merge parts that must stay equal: whole ones where these are more, else the same place in each.

        Parts of one channel each can only go whole, whether or not the call can do with fewer: what cannot is told when
        its numbers are settled.
        """
        cells = [self.root[part.channels] for part in call]
        sizes = [each.shape[1] for each in cells]
        by_rows = max(sizes) == 1 or (all(part.whole for part in call) and len(cells[0]) >= min(sizes))
        for part, each in zip(call, cells, strict=True):
            self._slices(each if by_rows else each.T, f"its parts must stay equal at {part.where}")

    def _slices(self, table: Layer, why: str) -> None:
        self.join(table[:, 1:].ravel(), np.repeat(table[:, :1], table.shape[1] - 1, axis=1).ravel(), [why])


def _units_left(table: Layer) -> int:
    """How many units are left of a table whose rows are merged."""
    values, numbers = np.unique(np.append(table, FIXED), return_inverse=True)  # `FIXED` is the least, so it stays 0
    merge = _Merge(np.arange(values.size), np.arange(values.size))
    merge._slices(numbers[:-1].reshape(table.shape), "")
    left = np.unique(merge.root[numbers[:-1]])
    return int((left != FIXED).sum())


@dataclass(frozen=True, eq=False)
class Implied:
    """What goes where others go, the conditions one after the other.

    Attributes:
        starts: Where each condition begins.
        channels: The channels of all of them.
        ends: What follows of all of them.
        by: For each of these the number of its condition.
        why: For each condition, why.
        held: The channels that weights write or read.
    """

    starts: IntArray
    channels: Layer
    ends: Layer
    by: IntArray
    why: list[str]
    held: Layer

    @staticmethod
    def of(flow: Flow, chosen: Mask) -> Implied:
        """All that is implied in a model."""
        implied = [each for each in flow.channels.implied if each[0].size]
        starts = np.cumsum([0, *(before.size for before, _, _ in implied)])[:-1].astype(np.int64)
        cells = [before for before, _, _ in implied] or [np.zeros(0, np.int64)]
        ends = [after for _, after, _ in implied] or [np.zeros(0, np.int64)]
        by = np.repeat(np.arange(len(ends)), [each.size for each in ends])
        why = [why for _, _, why in implied]
        return Implied(starts, np.concatenate(cells), np.concatenate(ends), by, why, np.flatnonzero(chosen))

    def closed(self, gone: Mask) -> Mask:
        """What goes where some channels go: those that are implied too."""
        found = gone.copy()
        while self.why:
            count = int(found.sum())
            found[self.ends[np.logical_and.reduceat(found[self.channels], self.starts)[self.by]]] = True
            found[FIXED] = False
            if int(found.sum()) == count:
                break
        return found

    def alone(self, merge: _Merge) -> tuple[IntArray, IntArray]:
        """Units that take others with them by themselves, and what each takes; of those that are chosen."""
        if not self.why:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        roots = merge.root[self.channels]
        low, high = np.minimum.reduceat(roots, self.starts), np.maximum.reduceat(roots, self.starts)
        own = np.zeros(merge.root.shape, dtype=bool)
        own[merge.root[self.held]] = True
        alone = ((low == high) & (low != FIXED) & own[low])[self.by]
        return low[self.by[alone]], merge.root[self.ends[alone]]

    def join(self, merge: _Merge) -> None:
        """Where one unit alone takes others with it, they are one.

        Channels that no weight writes or reads are not chosen: they go when all that implies them does.
        """
        while self.why:
            roots = merge.root[self.channels]
            low, high = np.minimum.reduceat(roots, self.starts), np.maximum.reduceat(roots, self.starts)
            own = np.zeros(merge.root.shape, dtype=bool)
            own[merge.root[self.held]] = True
            alone = ((low == high) & (low != FIXED) & own[low])[self.by]
            before = merge.root.copy()
            merge.join(low[self.by[alone]], self.ends[alone], self.why, self.by[alone])
            if (merge.root == before).all():
                return
