"""Weights that need other 8-bit types than the rest of a file, on x86 processors whose sums saturate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from torchtrim.errors import InputError

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_DEAD = 1e-5  # of a weight's largest value: a channel below it is left to the bits that keep its bias
_Weight = NDArray[Any]


def weight_types(
    model: onnx.ModelProto, chosen: set[str], exact: float = 0.0, *, unsigned: bool = False, per_channel: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """The weights with a type of their own, as ONNX Runtime's quantizer takes them (`TensorQuantOverrides`).

    Those of depthwise convolutions are signed with all 8 bits: ONNX Runtime's kernel for them does not saturate, and is
    the fast one. With unsigned ones the file of EfficientNet-Lite0 took 5.2 times as long as the float file, with these
    0.75 (ONNX Runtime 1.31.1, AVX2, one thread; all other weights unsigned in both).

    Of the other weights those that suffer most from a bit less (by the energy of the rounding error beside their own)
    keep 8 bits and are unsigned, which is exact and slower. Their zero points are all the same, since ONNX Runtime 1.24
    refuses a convolution with several. A weight with a channel of (nearly) nothing stays signed: its zero point would
    be another, and ONNX Runtime widens a scale until the bias fits beside signed weights alone.

    Args:
        model: A prepared file.
        chosen: The names of the nodes to quantize.
        exact: The share of the multiplications, depthwise ones apart, that are to be exact.
        unsigned: Whether the rest of the file has unsigned weights.
        per_channel: One scale for each output channel.

    Raises:
        InputError: `exact` is not from 0 to 1.
    """
    from onnxruntime.quantization import QuantType

    if not 0 <= exact <= 1:
        raise InputError("no share of the multiplications", path="exact", found=exact, expected="0 to 1")

    def typed(kind: Any, axis: int, *, reduce_range: bool = False) -> list[dict[str, Any]]:
        found = {"quant_type": kind, "symmetric": True, "reduce_range": reduce_range}
        return [{"axis": axis, **found} if per_channel else found]

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        if node.name in chosen and node.op_type in _PRODUCTS and node.input[1] in constants:
            readers[node.input[1]].append(node)
    sizes, stacked = _sizes(model), {node.input[1] for node in stacked_products(model.graph)}
    found: dict[str, list[dict[str, Any]]] = {}
    products: dict[str, tuple[float, float, int]] = {}  # by weight: its error, its multiplications, its axis
    for name, nodes in readers.items():
        kinds = {is_depthwise(node, list(constants[name].dims)) for node in nodes}
        if kinds == {True}:
            found[name] = typed(QuantType.QInt8, 0)
        elif kinds == {False} and (exact or unsigned):
            axes = {_axis(node) for node in nodes}
            if len(axes) > 1 or len(constants[name].dims) < 2 or name in stacked:
                continue
            axis = axes.pop()
            weight: _Weight = numpy_helper.to_array(constants[name])
            if _has_dead_channels(weight, axis):
                if unsigned:
                    found[name] = typed(QuantType.QInt8, axis, reduce_range=True)
                continue
            count = sum(weight.size * _places(node, sizes) for node in nodes)
            products[name] = rounding_error(weight, axis if per_channel else None), count, axis
    room = exact * sum(count for _, count, _ in products.values())
    for name, (_, count, axis) in sorted(products.items(), key=lambda item: -item[1][0]):
        if count <= room:
            room -= count
            found[name] = typed(QuantType.QUInt8, axis)
    return found


def stacked_weights(
    model: onnx.ModelProto, chosen: Collection[str], kind: Any, *, reduce_range: bool
) -> dict[str, list[dict[str, Any]]]:
    """One scale for each weight of a MatMul that is no matrix: ONNX Runtime has no kernel for one in each channel."""
    override = {"quant_type": kind, "symmetric": True, "reduce_range": reduce_range}
    return {node.input[1]: [dict(override)] for node in stacked_products(model.graph) if node.name in chosen}


def stacked_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The MatMul nodes whose constant weights are no matrix but several, or a vector."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type == "MatMul" and ranks.get(node.input[1], 2) != 2]


def is_depthwise(node: onnx.NodeProto, shape: list[int]) -> bool:
    """Whether a node is a convolution of each channel by itself; `shape` is its weight's."""
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1 and shape[:2] == [groups, 1]


def rounding_error(weight: _Weight, axis: int | None) -> float:
    """The energy of the error of 7-bit weights, beside that of the weights; `axis` has a scale each, None: one for all.

    Example:
        >>> spread, spiky = np.array([[1.0, 0.9, 0.8]]), np.array([[1.0, 0.1, 0.1]])
        >>> rounding_error(spiky, 0) > rounding_error(spread, 0)
        True
    """
    rows = _rows(weight, axis)
    steps = np.abs(rows).max(1) / 64
    return float((steps**2).sum() / 12 * rows.shape[1] / max(float((rows**2).sum()), 1e-30))


def _rows(weight: _Weight, axis: int | None) -> NDArray[np.float64]:
    if axis is None:
        return weight.reshape(1, -1).astype(np.float64)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)


def _has_dead_channels(weight: _Weight, axis: int) -> bool:
    largest = np.abs(_rows(weight, axis)).max(1)
    return bool((largest <= _DEAD * largest.max()).any())


def _axis(node: onnx.NodeProto) -> int:
    return 0 if node.op_type == "Conv" or any(each.name == "transB" and each.i for each in node.attribute) else 1


def _places(node: onnx.NodeProto, sizes: dict[str, list[int]]) -> float:
    """At how many places a weight is used, for one row; what is not known counts once."""
    size = sizes.get(node.output[0], [1])
    return float(np.prod([size[0], *size[2:]] if node.op_type == "Conv" else size[:-1]))


def _sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {
        value.name: [size.dim_value or 1 for size in value.type.tensor_type.shape.dim] or [1]
        for value in (*model.graph.value_info, *model.graph.output)
    }
