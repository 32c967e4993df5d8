"""How channel labels move: a rule for each operator that takes values elsewhere (views, slices, concatenations)."""

from __future__ import annotations

import numpy as np
import torch

from torchtrim.channels.labels import FIXED, Layer, varying
from torchtrim.channels.rules import OpCall, Shape, along, joined, rule, shape_of, unknown


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "flatten")
def _view(call: OpCall) -> None:
    source = call["self"]
    old, new = shape_of(source), shape_of(call.out)
    call.give(call.out, [resized(layer, old, new) for layer in call.layers(source)])


@rule("as_strided")
def _as_strided(call: OpCall) -> None:
    source = call["self"]
    if shape_of(source) == shape_of(call.out) and not call["storage_offset"]:
        call.give(call.out, call.layers(source))  # only how it lies in memory changes
    else:
        unknown(call)


@rule("permute", "transpose", "transpose_", "t", "t_", "movedim", "numpy_T")
def _permute(call: OpCall) -> None:
    source = call["self"]
    order = list(range(source.dim()))
    if call.name == "permute":
        order = [axis % source.dim() for axis in call["dims"]]
    elif "dim0" in call.arguments:
        one, other = call["dim0"] % source.dim(), call["dim1"] % source.dim()
        order[one], order[other] = order[other], order[one]
    else:
        order.reverse()
    call.give(call.out, [layer.transpose(order) for layer in call.layers(source)])


@rule("expand", "repeat")
def _expand(call: OpCall) -> None:
    """What is repeated along a dimension has channels of its own there: it is as wide as something else is.

    Not where each value is repeated a given number of times (`repeat_interleave`): that number is not a width.
    """
    source, new = call["self"], call.out.dim() - call["self"].dim()
    before = (1,) * new + shape_of(source)
    times = [size // old if old else 1 for old, size in zip(before, shape_of(call.out), strict=True)]
    layers = []
    for layer in call.layers(source):
        wide = layer.reshape((1,) * new + layer.shape)
        layers.append(np.tile(wide, [each if size > 1 else 1 for each, size in zip(times, wide.shape, strict=True)]))
    first = new if call.static and new else 1  # not the batch, nor a weight for each of it
    for axis in range(0 if call.static and call.out.dim() == 1 else first, call.out.dim()):
        if before[axis] == 1 and times[axis] > 1 and not call.repeats:
            layers.append(along(call.channels.new((times[axis],)), axis, call.out.dim()))
    call.give(call.out, layers)


@rule("repeat_interleave")
def _repeat_interleave(call: OpCall) -> None:
    times, axis = call.arguments.get("repeats"), call.arguments.get("dim")
    source = call.arguments.get("self")
    if not isinstance(times, int) or axis is None or source is None:
        unknown(call)
        return
    axis %= source.dim()
    call.give(
        call.out, [np.repeat(each, times, axis) if each.shape[axis] > 1 else each for each in call.layers(source)]
    )


@rule("slice")
def _slice(call: OpCall) -> None:
    source, axis = call["self"], call["dim"] % call["self"].dim()
    part = slice(call["start"], call["end"], call["step"])
    layers = []
    for layer in call.layers(source):
        if layer.shape[axis] == 1:
            layers.append(layer)
            continue
        if call["step"] != 1:
            # A step counts anew from what is left: the wrong channels would be taken, without an error. Whole heads
            # may go, each with all that is counted in it.
            why = f"{call.where}, which takes one channel in {call['step']}"
            call.channels.fixed_along(layer, [axis], why)
        taken = layer[(slice(None),) * axis + (part,)]
        if not varying(taken):
            call.pin([taken], f"it is picked by its number by {call.where}")
        layers.append(taken)
    call.give(call.out, layers)


@rule("select")
def _select(call: OpCall) -> None:
    source, axis, index = call["self"], call["dim"] % call["self"].dim(), call["index"]
    call.give(call.out, [_picked(call, layer, axis, index) for layer in call.layers(source)])


def _picked(call: OpCall, layer: Layer, axis: int, index: int) -> Layer:
    if layer.shape[axis] == 1:
        return layer.reshape(layer.shape[:axis] + layer.shape[axis + 1 :])
    picked: Layer = np.take(layer, index, axis)
    if not varying(picked):
        call.pin([picked], f"it is picked by its number by {call.where}")
    return picked


@rule("unbind")
def _unbind(call: OpCall) -> None:
    source = call["self"]
    axis = call["dim"] % source.dim()
    for index, part in enumerate(call.out):
        call.give(part, [_picked(call, layer, axis, index) for layer in call.layers(source)])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split")
def _split(call: OpCall) -> None:
    source = call["self"]
    axis, start = call["dim"] % source.dim(), 0
    for part in call.out:
        stop = start + int(part.shape[axis])
        window = (slice(None),) * axis + (slice(start, stop),)
        call.give(part, [layer if layer.shape[axis] == 1 else layer[window] for layer in call.layers(source)])
        start = stop


@rule("cat")
def _cat(call: OpCall) -> None:
    parts = [part for part in call["tensors"] if part.dim() == call.out.dim()]
    axis = call["dim"] % call.out.dim()
    rows: list[Layer | None] = []
    others: list[tuple[tuple[Layer, ...], Shape]] = []
    for part in parts:
        across = [layer for layer in call.layers(part) if layer.shape[axis] > 1]
        for extra in across[1:]:
            call.pin([extra])
        if part.shape[axis] == 1 or not across:
            rows.append(None)
        else:
            rows.append(across[0])
        rest = tuple(layer for layer in call.layers(part) if layer.shape[axis] == 1)
        others.append((rest, tuple(1 if each == axis else size for each, size in enumerate(shape_of(part)))))
    layers: list[Layer | None] = list(joined(call.channels, others, call.where))
    if any(row is not None for row in rows):
        wide = [max(1 if row is None else row.shape[each] for row in rows) for each in range(call.out.dim())]
        pieces = []
        for part, row in zip(parts, rows, strict=True):
            shape = [int(part.shape[axis]) if each == axis else size for each, size in enumerate(wide)]
            pieces.append(np.broadcast_to(np.zeros((1,) * len(shape), np.int64) if row is None else row, shape))
        layers.append(np.concatenate(pieces, axis))
    call.give(call.out, layers)


@rule("stack")
def _stack(call: OpCall) -> None:
    axis = call["dim"] % call.out.dim()
    operands = []
    for part in call["tensors"]:
        shape = list(shape_of(part))
        shape.insert(axis, 1)
        operands.append((tuple(np.expand_dims(layer, axis) for layer in call.layers(part)), tuple(shape)))
    call.give(call.out, joined(call.channels, operands, call.where))


@rule("constant_pad_nd", "pad")
def _pad(call: OpCall) -> None:
    source = call["self"]
    pads = list(call["pad"])
    layers = []
    for layer in call.layers(source):
        for number in range(len(pads) // 2):
            axis = source.dim() - 1 - number
            before, after = pads[2 * number], pads[2 * number + 1]
            if layer.shape[axis] > 1:
                window = slice(max(-before, 0), layer.shape[axis] - max(-after, 0))
                layer = layer[(slice(None),) * axis + (window,)]
                width = [(max(before, 0), max(after, 0)) if each == axis else (0, 0) for each in range(layer.ndim)]
                added = np.pad(np.zeros(layer.shape, dtype=bool), width, constant_values=True)
                layer = np.pad(layer, width, constant_values=FIXED)
                if getattr(call.module, "pads_channels", False):  # it can be told to add fewer
                    layer[added] = call.channels.new((int(added.sum()),))
        layers.append(layer)
    call.give(call.out, layers)


@rule("roll", "flip")
def _roll(call: OpCall) -> None:
    for layer in call.layers(call["self"]):
        if any(layer.shape[axis % layer.ndim] > 1 for axis in call["dims"]):
            call.pin([layer])
    call.give(call.out, call.layers(call["self"]))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(call: OpCall) -> None:
    source = call["self"]
    *rest, depth, height, width = shape_of(source)
    lead = len(rest)
    if call.name == "pixel_shuffle":
        factor, counted = call["upscale_factor"], [lead + 1, lead + 2]
        middle = (*rest, depth // factor**2, factor, factor, height, width)
        order = [*range(lead), lead, lead + 3, lead + 1, lead + 4, lead + 2]
    elif call.name == "pixel_unshuffle":
        factor, counted = call["downscale_factor"], []
        middle = (*rest, depth, height // factor, factor, width // factor, factor)
        order = [*range(lead), lead, lead + 2, lead + 4, lead + 1, lead + 3]
    else:
        (first, depth, *space), counted = shape_of(source), [1]
        middle = (first, call["groups"], depth // call["groups"], *space)
        order = [0, 2, 1, *range(3, len(middle))]
    layers = []
    for layer in call.layers(source):
        table = resized(layer, shape_of(source), middle)
        call.channels.tables.append((table, call.where))
        for axis in (each for each in counted if table.shape[each] > 1):
            for row in np.moveaxis(table, axis, 0):  # how many parts there are is written into the call
                call.channels.implies(row, np.zeros(1, np.int64), f"a part would go whole of {call.where}")
        moved = table.transpose(order)
        layers.append(resized(moved, tuple(middle[axis] for axis in order), shape_of(call.out)))
    call.give(call.out, layers)


@rule("index", "index_select", "_unsafe_index", "gather", "embedding")
def _index(call: OpCall) -> None:
    if call.name == "embedding":
        source, indices = call["weight"], [call["indices"]]
    elif call.name == "gather" or not isinstance(call["self"], torch.Tensor):
        unknown(call)
        return
    elif call.name == "index_select":
        source, indices = call["self"], [None] * (call["dim"] % call["self"].dim()) + [call["index"]]
    else:
        source, indices = call["self"], list(call["indices"])
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)) or any(indices[axis].dtype == torch.bool for axis in used):
        unknown(call)
        return
    for axis in used:
        call.pin(call.layers(indices[axis]))
    ndim = max(indices[axis].dim() for axis in used)
    layers = []
    for layer in call.layers(source):
        fixed = call.channels.fixed_along(layer, used, f"it is looked up by number by {call.where}")
        if fixed is not None:
            layers.append(fixed.reshape(fixed.shape[: used[0]] + (1,) * ndim + fixed.shape[used[-1] + 1 :]))
    call.give(call.out, layers)


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def _new(call: OpCall) -> None:
    call.labels.give(call.out, call.channels.leaf(shape_of(call.out)))


def resized(layer: Layer, old: Shape, new: Shape) -> Layer:
    """The layer of a tensor that is viewed in another shape.

    Example:
        >>> resized(np.array([[[1], [2]]]), (5, 2, 3), (5, 6)).tolist()
        [[1, 1, 1, 2, 2, 2]]
    """
    if 0 in old or not varying(layer):
        return np.zeros((1,) * len(new), dtype=np.int64)
    source: list[int] = []
    target: list[int] = []
    for left, right in _groups(old, new):
        told = any(layer.shape[axis] > 1 for axis in left)
        source += [old[axis] if told else 1 for axis in left]
        target += [new[axis] if told else 1 for axis in right]
    return compressed(np.broadcast_to(layer, source).reshape(target))


def _groups(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Runs of dimensions of the same size in both shapes, as short as can be."""
    found = []
    left = right = 0
    while left < len(old) or right < len(new):
        first, second = left, right
        one = other = 1
        if left < len(old):
            one, left = old[left], left + 1
        if right < len(new) and (one > 1 or left >= len(old) or new[right] == 1):
            other, right = new[right], right + 1
        while one != other:
            if one < other:
                one, left = one * old[left], left + 1
            else:
                other, right = other * new[right], right + 1
        found.append((range(first, left), range(second, right)))
    return found


def compressed(layer: Layer) -> Layer:
    """The layer, of size 1 in every dimension along which it does not tell channels apart."""
    for axis in sorted(varying(layer)):
        first = layer[(slice(None),) * axis + (slice(0, 1),)]
        if bool((layer == first).all()):
            layer = first
    return layer
