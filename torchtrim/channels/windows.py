"""How channel labels move where values are taken apart into windows, and put together again."""

from __future__ import annotations

import numpy as np

from torchtrim.channels.rules import OpCall, along, rule, vector


@rule("unfold")
def _unfold(call: OpCall) -> None:
    """Windows along one dimension, which cannot be narrowed; what stands in a window is a last dimension."""
    source = call["self"]
    axis = call["dimension"] % max(source.dim(), 1)
    layers = [call.channels.fixed_along(layer, (axis,), call.where) for layer in call.layers(source)]
    call.give(call.out, [None if layer is None else layer[..., np.newaxis] for layer in layers])


@rule("im2col")
def _im2col(call: OpCall) -> None:
    """`(batch, channels, height, width)` to `(batch, channels * points, windows)`."""
    source = call["self"]
    axis = source.dim() - 3
    read = vector(call, call.layers(source), axis, int(source.shape[axis]))
    call.give(call.out, [along(read.repeat(int(np.prod(call["kernel_size"]))), axis, call.out.dim())])


@rule("col2im")
def _col2im(call: OpCall) -> None:
    """`(batch, channels * points, windows)` to `(batch, channels, height, width)`; a channel's points go together."""
    source = call["self"]
    axis = source.dim() - 2
    read = vector(call, call.layers(source), axis, int(source.shape[axis]))
    table = read.reshape(-1, int(np.prod(call["kernel_size"])))
    call.channels.link(table, table[:, :1], call.where)
    call.give(call.out, [along(table[:, 0], axis, call.out.dim())])
