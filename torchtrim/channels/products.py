"""How channel labels go through products: of matrices, attention, convolutions."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from torchtrim.channels.labels import EqualParts, Layer, lines_of, varying
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
    unknown,
    vector,
    without,
)

Operand: TypeAlias = "tuple[Sequence[Layer], Shape, bool]"


def _operand(call: OpCall, tensor: torch.Tensor) -> Operand:
    """The layers of a tensor, its shape, and whether it is computed from parameters and constants alone."""
    label = call.labels.label(tensor)
    return label.layers, shape_of(tensor), label.static


def _contract(call: OpCall, equation: str, operands: Sequence[Operand]) -> list[Layer]:
    """The layers of a sum of products, written as for `einsum`; dimensions of the same letter run together."""
    terms, result = equation.split("->")
    letters = "".join(dict.fromkeys(result + terms.replace(",", "")))
    mixes = not any(static for _, _, static in operands)
    placed: list[tuple[list[Layer], Shape]] = []
    for term, (layers, shape, static) in zip(terms.split(","), operands, strict=True):
        summed = {axis for axis, letter in enumerate(term) if letter not in result}
        for layer in layers:
            if static and varying(layer) & summed:
                call.channels.consumed.append(layer)
            if mixes:
                _note_heads(call, layer, term, summed, {letter for letter in term if terms.count(letter) > 1})
        sizes = tuple(shape[term.index(letter)] if letter in term else 1 for letter in letters)
        placed.append(([_placed(layer, term, letters) for layer in layers], sizes))
    layers = joined(call.channels, placed, call.where)
    kept = without(call, layers, range(len(result), len(letters)), mixes=mixes)
    return [layer.reshape(layer.shape[: len(result)]) for layer in kept]


def _note_heads(call: OpCall, layer: Layer, term: str, summed: set[int], shared: set[str]) -> None:
    """What a product of two computed values takes of a layer each time, and what it sums up."""
    counted = {axis for axis in varying(layer) - summed if term[axis] in shared}
    if counted and varying(layer) - counted:
        call.channels.heads.append((lines_of(layer, counted)[0], 0))
    if varying(layer) & summed:
        call.channels.scale.append(lines_of(layer, varying(layer) - summed)[0])


def _placed(layer: Layer, term: str, letters: str) -> Layer:
    order = [term.index(letter) for letter in letters if letter in term]
    moved = layer.transpose(order)
    return moved.reshape([layer.shape[term.index(letter)] if letter in term else 1 for letter in letters])


def _by_heads(call: OpCall, tensor: torch.Tensor) -> Operand:
    """The same, where queries (keys, values) that are learned and projected, by heads, count as computed."""
    layers, shape, static = _operand(call, tensor)
    learned = len(shape) == 3 and call.labels.label(tensor).made and any(0 in varying(layer) for layer in layers)
    return layers, shape, static and not learned


def _repeated(call: OpCall, names: Sequence[str]) -> None:
    """Give what is repeated for each matrix of the other operand channels along these: there are as many as of those.

    A weight that all heads share is repeated so (embeddings of relative positions).
    """
    one, other = (call[name] for name in names)
    for tensor, beside in ((one, other), (other, one)):
        label = call.labels.label(tensor)
        told = any(0 in varying(layer) for layer in call.layers(beside))
        if told and tensor.dim() == 3 and extent_of(tensor, label.layers)[0] < tensor.shape[0]:
            along_batch = along(call.channels.new((int(tensor.shape[0]),)), 0, 3)
            call.labels.give(tensor, replace(label, layers=(*label.layers, along_batch)))


_PRODUCTS = {
    "mm": ("mk,kn->mn", "self", "mat2"),
    "bmm": ("bmk,bkn->bmn", "self", "mat2"),
    "addmm": ("mk,kn->mn", "mat1", "mat2"),
    "baddbmm": ("bmk,bkn->bmn", "batch1", "batch2"),
    "mv": ("mk,k->m", "self", "vec"),
    "addmv": ("mk,k->m", "mat", "vec"),
    "dot": ("k,k->", "self", "tensor"),
    "vdot": ("k,k->", "self", "other"),
}


@rule(*_PRODUCTS)
def _product(call: OpCall) -> None:
    equation, *names = _PRODUCTS[call.name.removesuffix("_")]
    if "b" in equation:
        _repeated(call, names)
    operands = [_by_heads(call, call[name]) for name in names]
    layers = _contract(call, equation, operands)
    if call.name.startswith(("add", "badd")):
        added, ndim = call["self"], call.out.dim()
        shift = [aligned(layer, ndim) for layer in call.layers(added)]
        sums = [(layers, shape_of(call.out)), (shift, (1,) * (ndim - added.dim()) + shape_of(added))]
        layers = joined(call.channels, sums, call.where)
    call.give(call.out, layers)


@rule("_grouped_mm")
def _experts(call: OpCall) -> None:
    """Rows in groups, each times a matrix of its own: experts stay, and channels go from all of them alike."""
    rows, matrices = (_operand(call, call[name]) for name in ("self", "mat2"))
    if (len(rows[1]), len(matrices[1])) != (2, 3) or call.arguments.get("bias") is not None:
        unknown(call)
        return
    call.pin(call.layers(call.arguments.get("offs")))
    held = [call.channels.fixed_along(layer, (0,), call.where) for layer in matrices[0]]
    if matrices[2]:
        call.channels.consumed += [layer for layer in matrices[0] if 1 in varying(layer)]
    layers = [layer.reshape(layer.shape[1:]) for layer in held if layer is not None]
    call.give(call.out, _contract(call, "mk,kn->mn", [rows, (layers, matrices[1][1:], matrices[2])]))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
def _attention(call: OpCall) -> None:
    first, *others = call.out
    query, key, value = ((*_operand(call, call[name])[:2], False) for name in ("query", "key", "value"))
    key, value = (_for_queries(each, query[1]) for each in (key, value))
    scores = _contract(call, "bhnd,bhmd->bhnm", [query, key])
    shape = (*query[1][:-1], key[1][-2])
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    if isinstance(mask, torch.Tensor):
        added = [aligned(layer, 4) for layer in call.layers(mask)]
        scores = joined(call.channels, [(scores, shape), (added, (1,) * (4 - mask.dim()) + shape_of(mask))], call.where)
    call.give(first, _contract(call, "bhnm,bhme->bhne", [(scores, shape, False), value]))
    call.set_aside(tensors_in(others))


def _for_queries(held: Operand, asked: Shape) -> Operand:
    """Keys or values of which several heads in a row share one: each as often as it is read."""
    layers, shape, static = held
    times = asked[1] // max(shape[1], 1)
    if times < 2:
        return held
    wide = [np.repeat(layer, times, 1) if layer.shape[1] > 1 else layer for layer in layers]
    return wide, (shape[0], asked[1], *shape[2:]), static


@rule("_trilinear")
def _bilinear(call: OpCall) -> None:
    """A sum of products of three, of which each lacks the dimensions along which it is expanded."""
    names = ("i1", "i2", "i3")
    letters = string.ascii_lowercase[: call["i1"].dim() + len(call["expand1"])]
    lacks = [call[f"expand{number}"] for number in (1, 2, 3)]
    terms = ["".join(each for axis, each in enumerate(letters) if axis not in lack) for lack in lacks]
    result = "".join(each for axis, each in enumerate(letters) if axis not in call["sumdim"])
    call.give(call.out, _contract(call, f"{','.join(terms)}->{result}", [_operand(call, call[name]) for name in names]))


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(call: OpCall) -> None:
    source, weight, groups = call["input"], call["weight"], int(call["groups"])
    channels, where = call.channels, call.where
    passing = _passing(call)
    others = [layer for layer in call.layers(source) if not any(layer is each for each in passing)]
    by_batch = _over_heads(call, others, groups)
    if by_batch is not None:
        call.give(call.out, [*by_batch, *passing])
        return
    read = vector(call, others, 1, int(source.shape[1]))
    layers = [channels.fixed_along(layer, range(2, weight.dim()), where) for layer in call.layers(weight)]
    tables = [layer.reshape(layer.shape[:2]) for layer in layers if layer is not None]
    if call.arguments.get("transposed"):
        written = _transposed(call, tables, read, groups, shape_of(weight))
    else:
        written = _plain(call, tables, read, groups, shape_of(weight))
    if written is not None and isinstance(call["bias"], torch.Tensor):
        for layer in call.layers(call["bias"]):
            channels.link(layer, written, where)
    call.give(call.out, [*([] if written is None else [along(written, 1, call.out.dim())]), *passing])


def _over_heads(call: OpCall, layers: Sequence[Layer], groups: int) -> list[Layer] | None:
    """The layers that come of a convolution over each head by itself, where heads stand in the batch; else `None`.

    All of them share one weight, as in a product of matrices.
    """
    source, weight = call["input"], call["weight"]
    if call.arguments.get("transposed") or not any(0 in varying(layer) for layer in layers):
        return None
    if any(not varying(layer) <= {0, 1} for layer in layers):
        return None
    (wide, size), count = shape_of(weight)[:2], int(source.shape[0])
    held = [call.channels.fixed_along(layer, range(2, weight.dim()), call.where) for layer in call.layers(weight)]
    tables = [layer.reshape(layer.shape[:2]) for layer in held if layer is not None]
    given = [layer.reshape(layer.shape[:2]) for layer in layers]
    shape = (count, int(source.shape[1]))
    if groups == 1:
        made = _contract(call, "nc,oc->no", [(given, shape, False), (tables, (wide, size), True)])
    elif groups == wide and size == 1:
        rows = [layer.reshape(1, -1) for layer in tables]
        made = joined(call.channels, [(given, shape), (rows, (1, wide))], call.where)
    else:
        return None
    if isinstance(call["bias"], torch.Tensor):
        shift = [along(layer, 1, 2) for layer in call.layers(call["bias"])]
        made = joined(call.channels, [(made, (count, wide)), (shift, (1, wide))], call.where)
    return [layer.reshape(*layer.shape, *(1,) * (call.out.dim() - 2)) for layer in made]


def _passing(call: OpCall) -> list[Layer]:
    """The channels along dimensions over which a convolution goes point by point: it does not see them."""
    if call.arguments.get("transposed"):
        return []
    space = range(2, call["weight"].dim())
    point = {
        axis
        for number, axis in enumerate(space)
        if call["weight"].shape[axis] == 1
        and all(call[name][number % len(call[name])] == still for name, still in (("stride", 1), ("padding", 0)))
    }
    return [layer for layer in call.layers(call["input"]) if varying(layer) and varying(layer) <= point]


def _plain(call: OpCall, tables: Sequence[Layer], read: Layer, groups: int, shape: Shape) -> Layer | None:
    """Tie a weight `(out, in / groups, ...)` to the channels it reads; returns those it writes."""
    wide, size = shape[:2]
    written = next((table.reshape(-1) for table in tables if varying(table) == {0}), np.zeros(wide, np.int64))
    told = [table for table in tables if 1 in varying(table)]
    by_output = read.reshape(groups, size).repeat(wide // groups if groups > 1 else 1, axis=0)
    for table in told:
        call.channels.link(table, by_output, call.where)
        call.channels.consumed.append(table)
    if size > 1 and not told:
        call.channels.pin(read, call.where)
    _tie_groups(call, read, written, groups)
    return written


def _transposed(call: OpCall, tables: Sequence[Layer], read: Layer, groups: int, shape: Shape) -> Layer | None:
    """The same for a weight `(in, out / groups, ...)`."""
    deep, size = shape[:2]
    for table in tables:
        if varying(table) == {0}:
            call.channels.link(table.reshape(-1), read, call.where)
            call.channels.consumed.append(table)
    told = next((table for table in tables if 1 in varying(table)), None)
    if told is not None:
        written = np.broadcast_to(told, (deep, size)).reshape(groups, deep // groups, size)[:, 0].reshape(-1)
    elif size > 1:
        written = np.zeros(groups * size, np.int64)
    else:
        written = call.channels.new((groups,)) if groups > 1 else np.zeros(1, np.int64)
    _tie_groups(call, read, written, groups)
    return written


def _tie_groups(call: OpCall, read: Layer, written: Layer, groups: int) -> None:
    """A group goes whole, in what it reads and what it writes; the others must stay equal."""
    if groups == 1:
        return
    ins, outs = read.reshape(groups, -1), written.reshape(groups, -1)
    if ins.shape[1] == 1 and outs.shape[1] == 1:
        call.channels.link(ins, outs, call.where)
    else:
        call.channels.whole(ins, outs, call.where)
    whole = isinstance(call.module, nn.modules.conv._ConvNd)
    for part in (ins, outs):
        call.channels.parts.append(EqualParts(part, whole, call.where))
