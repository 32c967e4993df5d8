"""How channel labels go through arithmetic: element by element, sums, norms."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from torchtrim.channels.labels import EqualParts, varying
from torchtrim.channels.rules import (
    OpCall,
    Shape,
    aligned,
    along,
    extent_of,
    joined,
    rule,
    shape_of,
    tensors_in,
    vector,
    without,
)


def elementwise(call: OpCall) -> None:
    """An operator that works on each element by itself, or on those at the same place of several tensors."""
    outs = tensors_in(call.out)
    ndim = max((out.dim() for out in outs), default=0)
    operands = []
    for tensor in tensors_in(call.arguments):
        if tensor.dim() <= ndim:
            layers = [aligned(layer, ndim) for layer in call.layers(tensor)]
            extent = extent_of(tensor, call.layers(tensor))
            operands.append((layers, (1,) * (ndim - tensor.dim()) + extent))
        else:
            call.pin(call.layers(tensor))
    layers = joined(call.channels, operands, call.where)
    for out in outs:
        call.give(out, layers if out.dim() == ndim else ())


def reduction(call: OpCall) -> None:
    """A sum, a mean, a norm over some dimensions."""
    source = call.arguments.get("self", call.arguments.get("input"))
    if not isinstance(source, torch.Tensor):
        elementwise(call)
        return
    given = call.arguments.get("dim")
    axes = [given] if isinstance(given, int) else given
    reduced = {axis % max(source.dim(), 1) for axis in axes} if axes else set(range(source.dim()))
    layers = without(call, call.layers(source), reduced, mixes=not call.static)
    if call.static:  # a weight that is standardised
        call.channels.mixed += [layer for layer in call.layers(source) if varying(layer) & reduced]
    picked = tuple(layer for layer in call.layers(source) if varying(layer) & reduced)
    for number, out in enumerate(tensors_in(call.out)):
        kept = layers
        if out.dim() < source.dim():
            shape = [axis for axis in range(source.dim()) if axis not in reduced]
            kept = [layer.reshape([layer.shape[axis] for axis in shape]) for layer in layers]
        call.give(out, kept)
        if picked and out.dtype == torch.int64 and (number or call.name.startswith("arg")):  # the second of `max`
            call.labels.give(out, replace(call.labels.label(out), numbers=picked))


@rule("glu")
def _glu(call: OpCall) -> None:
    """The first half times what the second one lets through."""
    source = call["self"]
    axis, half = call["dim"] % source.dim(), shape_of(call.out)
    size = half[axis]
    operands = []
    for start in (0, size):
        window = (slice(None),) * axis + (slice(start, start + size),)
        operands.append(([each[window] if each.shape[axis] > 1 else each for each in call.layers(source)], half))
    call.give(call.out, joined(call.channels, operands, call.where))


@rule("_weight_norm_interface")
def _weight_norm(call: OpCall) -> None:
    weight, size, axis = call["v"], call["g"], call["dim"] % call["v"].dim()
    # The size first, whose channels the weight has then: a size of zero is no division by zero.
    operands = [(call.layers(each), shape_of(each)) for each in (size, weight)]
    layers = joined(call.channels, operands, call.where)
    call.channels.mixed += [layer for layer in layers if varying(layer) != {axis}]
    call.give(call.out[0], layers)
    call.set_aside(call.out[1:])


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "_safe_softmax")
def _softmax(call: OpCall) -> None:
    source, axis = call["self"], call["dim"] % max(call["self"].dim(), 1)
    for layer in call.layers(source):
        if layer.ndim and layer.shape[axis] > 1:
            call.channels.mixed.append(layer)
    call.give(call.out, call.layers(source))


def spatial(call: OpCall) -> None:
    """Pooling, resizing and padding along height and width."""
    source = call["self"]
    space = range(2 if source.dim() > 3 else source.dim() - (2 if "2d" in call.name else 1), source.dim())
    layers = [call.channels.fixed_along(layer, space, call.where) for layer in call.layers(source)]
    for out in tensors_in(call.out):
        call.give(out, layers)


def batch_norm(call: OpCall) -> None:
    """A batch norm, in whatever form."""
    source = call["input"]
    operands = [
        ([along(layer.reshape(-1), 1, source.dim()) for layer in call.layers(each)], _shape_along_1(source))
        for name, each in call.arguments.items()
        if isinstance(each, torch.Tensor) and name != "input" and each.dim() == 1
    ]
    operands.append((list(call.layers(source)), shape_of(source)))
    layers = joined(call.channels, operands, call.where)
    # What is normalised over has channels of its own where a weight is standardised.
    call.channels.mixed += [layer for layer in layers if varying(layer) != {1}]
    first, *others = tensors_in(call.out)
    call.give(first, layers)
    call.set_aside(others)


def _shape_along_1(tensor: torch.Tensor) -> Shape:
    return tuple(size if axis == 1 else 1 for axis, size in enumerate(shape_of(tensor)))


@rule("native_group_norm", "group_norm")
def _group_norm(call: OpCall) -> None:
    source = call["input"]
    read = vector(call, call.layers(source), 1, int(source.shape[1]))
    for name in ("weight", "bias"):
        for layer in call.layers(call.arguments.get(name)):
            call.channels.link(layer.reshape(-1), read, call.where)
    groups = int(call.arguments.get("group", call.arguments.get("num_groups", 1)))
    call.channels.mixed.append(read)
    if groups > 1:
        whole = isinstance(call.module, nn.GroupNorm)
        call.channels.parts.append(EqualParts(read.reshape(groups, -1), whole, call.where))
    first, *others = tensors_in(call.out)
    call.give(first, [along(read, 1, source.dim())])
    call.set_aside(others)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(call: OpCall) -> None:
    source = call["input"]
    ndim, count = source.dim(), len(call["normalized_shape"])
    operands = [(list(call.layers(source)), shape_of(source))]
    for name in ("weight", "bias"):
        held = call.arguments.get(name)
        if isinstance(held, torch.Tensor):
            shape = (1,) * (ndim - held.dim()) + shape_of(held)
            operands.append(([aligned(layer, ndim) for layer in call.layers(held)], shape))
    layers = joined(call.channels, operands, call.where)
    for layer in layers:
        if any(axis >= ndim - count for axis in varying(layer)):
            call.channels.mixed.append(layer)
    first, *others = tensors_in(call.out)
    call.give(first, layers)
    call.set_aside(others)
