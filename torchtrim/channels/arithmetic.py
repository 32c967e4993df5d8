"""How channel labels go through arithmetic: element by element, sums, products of matrices, convolutions, norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from torchtrim.channels.labels import EqualParts, Layer, varying
from torchtrim.channels.rules import RULES, OpCall, Rule, Shape, along, joined, rule, shape_of, tensors_in, unknown

_ELEMENTWISE = {
    *("copy", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "lift_fresh", "lift_fresh_copy", "fill"),
    *("native_dropout", "dropout", "bernoulli", "masked_fill", "where", "hardswish", "hardsigmoid", "hardtanh"),
    *("_prelu_kernel", "prelu", "gelu", "elu", "selu", "celu", "mish", "silu", "softplus", "leaky_relu", "rrelu"),
    *("rrelu_with_noise", "threshold", "uniform", "normal", "exponential", "clamp", "clamp_min", "clamp_max", "zero"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "addcmul", "addcdiv", "lerp"),
    *("_conj", "nan_to_num", "logical_not", "relu6", "log_sigmoid_forward", "set_data"),
}
_REDUCTIONS = {
    *("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "prod", "max"),
    *("min", "argmax", "argmin", "any", "all", "logsumexp", "median", "nansum"),
}
_SPATIAL: tuple[str, ...] = (
    "max_pool",
    "avg_pool",
    "_adaptive_avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "upsample_",
)
_SPATIAL += ("_upsample_", "reflection_pad", "replication_pad", "fractional_max_pool", "mkldnn_max_pool")
_NORMS = ("native_batch_norm", "_native_batch_norm", "cudnn_batch_norm", "_batch_norm", "batch_norm", "miopen_batch")


def rule_for(op: Any) -> Rule:
    """The rule of an operator; where there is none, that what goes in cannot be narrowed."""
    name = op._schema.name.partition("::")[2]
    bare = name.removesuffix("_")
    found = RULES.get(name) or RULES.get(bare)
    if found is not None:
        return found
    if torch.Tag.pointwise in op.tags or bare in _ELEMENTWISE:
        return _elementwise
    if bare in _REDUCTIONS:
        return _reduction
    if name.startswith(_SPATIAL):
        return _spatial
    return _batch_norm if name.startswith(_NORMS) else unknown


def _aligned(layer: Layer, ndim: int) -> Layer:
    return layer.reshape((1,) * (ndim - layer.ndim) + layer.shape)


def _elementwise(call: OpCall) -> None:
    outs = tensors_in(call.out)
    ndim = max((out.dim() for out in outs), default=0)
    operands = []
    for tensor in tensors_in(call.arguments):
        if tensor.dim() <= ndim:
            layers = [_aligned(layer, ndim) for layer in call.layers(tensor)]
            operands.append((layers, (1,) * (ndim - tensor.dim()) + shape_of(tensor)))
        else:
            call.pin(call.layers(tensor))
    layers = joined(call.channels, operands, call.where)
    for out in outs:
        call.give(out, layers if out.dim() == ndim else ())


def _reduction(call: OpCall) -> None:
    source = call.arguments.get("self", call.arguments.get("input"))
    if not isinstance(source, torch.Tensor):
        _elementwise(call)
        return
    given = call.arguments.get("dim")
    axes = [given] if isinstance(given, int) else given
    reduced = {axis % max(source.dim(), 1) for axis in axes} if axes else set(range(source.dim()))
    mixes = not call.static
    layers = _without(call, call.layers(source), reduced, mixes=mixes)
    for out in tensors_in(call.out):
        kept = layers
        if out.dim() < source.dim():
            shape = [axis for axis in range(source.dim()) if axis not in reduced]
            kept = [layer.reshape([layer.shape[axis] for axis in shape]) for layer in layers]
        call.give(out, kept)


def _without(call: OpCall, layers: Sequence[Layer], axes: Iterable[int], *, mixes: bool) -> list[Layer]:
    """The layers that are left where some dimensions are summed over."""
    gone = frozenset(axes)
    kept = [layer for layer in layers if not varying(layer) & gone]
    told = {varying(layer) for layer in kept}
    for layer in layers:
        if not varying(layer) & gone:
            continue
        if mixes:
            call.channels.mixed.append(layer)
        rest = sorted(varying(layer) - gone)
        if rest and frozenset(rest) not in told:
            # What is summed up keeps the other dimensions whole: something must be left of each of their places.
            rows = np.moveaxis(layer, rest, range(len(rest))).reshape(int(np.prod([layer.shape[a] for a in rest])), -1)
            for row in rows:
                call.channels.implies(row, np.zeros(1, np.int64), f"nothing would be left to sum up in {call.where}")
    return kept


@rule("_weight_norm_interface")
def _weight_norm(call: OpCall) -> None:
    weight, size, axis = call["v"], call["g"], call["dim"] % call["v"].dim()
    operands = [(call.layers(each), shape_of(each)) for each in (weight, size)]
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


def _spatial(call: OpCall) -> None:
    source = call["self"]
    space = range(2 if source.dim() > 3 else source.dim() - (2 if "2d" in call.name else 1), source.dim())
    layers = [call.channels.fixed_along(layer, space, call.where) for layer in call.layers(source)]
    for out in tensors_in(call.out):
        call.give(out, layers)


def _contract(call: OpCall, equation: str, tensors: Sequence[torch.Tensor]) -> list[Layer]:
    """The layers of a sum of products, written as for `einsum`; dimensions of the same letter run together."""
    terms, result = equation.split("->")
    letters = "".join(dict.fromkeys(result + terms.replace(",", "")))
    operands = []
    for term, tensor in zip(terms.split(","), tensors, strict=True):
        summed = [axis for axis, letter in enumerate(term) if letter not in result]
        statically = call.labels.label(tensor).static
        for layer in call.layers(tensor):
            if varying(layer) & set(summed) and statically:
                call.channels.consumed.append(layer)
        operands.append(
            (
                [_placed(layer, term, letters) for layer in call.layers(tensor)],
                tuple(int(tensor.shape[term.index(letter)]) if letter in term else 1 for letter in letters),
            )
        )
    layers = joined(call.channels, operands, call.where)
    mixes = not any(call.labels.label(tensor).static for tensor in tensors)
    kept = _without(call, layers, range(len(result), len(letters)), mixes=mixes)
    return [layer.reshape(layer.shape[: len(result)]) for layer in kept]


def _placed(layer: Layer, term: str, letters: str) -> Layer:
    order = [term.index(letter) for letter in letters if letter in term]
    moved = layer.transpose(order)
    return moved.reshape([layer.shape[term.index(letter)] if letter in term else 1 for letter in letters])


_PRODUCTS = {
    "mm": ("mk,kn->mn", "self", "mat2"),
    "bmm": ("bmk,bkn->bmn", "self", "mat2"),
    "addmm": ("mk,kn->mn", "mat1", "mat2"),
    "baddbmm": ("bmk,bkn->bmn", "batch1", "batch2"),
    "mv": ("mk,k->m", "self", "vec"),
    "addmv": ("mk,k->m", "mat", "vec"),
    "dot": ("k,k->", "self", "tensor"),
}


@rule(*_PRODUCTS)
def _product(call: OpCall) -> None:
    equation, *names = _PRODUCTS[call.name.removesuffix("_")]
    layers = _contract(call, equation, [call[name] for name in names])
    if call.name.startswith(("add", "badd")):
        added, ndim = call["self"], call.out.dim()
        operands = [(layers, shape_of(call.out))]
        operands.append(
            (
                [_aligned(layer, ndim) for layer in call.layers(added)],
                (1,) * (ndim - added.dim()) + shape_of(added),
            )
        )
        layers = joined(call.channels, operands, call.where)
    call.give(call.out, layers)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
def _attention(call: OpCall) -> None:
    first, *others = call.out
    layers = _contract(call, "bhnd,bhmd,bhme->bhne", [call["query"], call["key"], call["value"]])
    call.give(first, layers)
    call.set_aside(tensors_in(others))
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    if isinstance(mask, torch.Tensor):
        call.pin(call.layers(mask))


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(call: OpCall) -> None:
    source, weight, groups = call["input"], call["weight"], int(call["groups"])
    channels, where = call.channels, call.where
    read = _vector(call, call.layers(source), 1, int(source.shape[1]))
    layers = [channels.fixed_along(layer, range(2, weight.dim()), where) for layer in call.layers(weight)]
    tables = [layer.reshape(layer.shape[:2]) for layer in layers if layer is not None]
    if call.arguments.get("transposed"):
        written = _transposed(call, tables, read, groups, shape_of(weight))
    else:
        written = _plain(call, tables, read, groups, shape_of(weight))
    if written is not None and isinstance(call["bias"], torch.Tensor):
        for layer in call.layers(call["bias"]):
            channels.link(layer, written, where)
    call.give(call.out, [] if written is None else [along(written, 1, call.out.dim())])


def _vector(call: OpCall, layers: Sequence[Layer], axis: int, size: int) -> Layer:
    """The channels along one dimension; what varies along others cannot be narrowed there."""
    found = np.zeros(size, np.int64)
    for layer in layers:
        fixed = call.channels.fixed_along(layer, [each for each in range(layer.ndim) if each != axis], call.where)
        if fixed is not None and varying(fixed):
            vector = fixed.reshape(-1)
            if found.any():
                call.channels.link(found, vector, call.where)
            found = vector
    return found


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


def _batch_norm(call: OpCall) -> None:
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
    vector = _vector(call, call.layers(source), 1, int(source.shape[1]))
    for name in ("weight", "bias"):
        for layer in call.layers(call.arguments.get(name)):
            call.channels.link(layer.reshape(-1), vector, call.where)
    groups = int(call.arguments.get("group", call.arguments.get("num_groups", 1)))
    call.channels.mixed.append(vector)
    if groups > 1:
        whole = isinstance(call.module, nn.GroupNorm)
        call.channels.parts.append(EqualParts(vector.reshape(groups, -1), whole, call.where))
    first, *others = tensors_in(call.out)
    call.give(first, [along(vector, 1, source.dim())])
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
            operands.append(([_aligned(layer, ndim) for layer in call.layers(held)], shape))
    layers = joined(call.channels, operands, call.where)
    for layer in layers:
        if any(axis >= ndim - count for axis in varying(layer)):
            call.channels.mixed.append(layer)
    first, *others = tensors_in(call.out)
    call.give(first, layers)
    call.set_aside(others)
