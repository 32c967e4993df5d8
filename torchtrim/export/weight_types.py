"""Weights that need other 8-bit types than the rest of a file, on x86 processors whose sums saturate."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

_PRODUCTS = ("Conv", "Gemm", "MatMul")


def weight_types(
    model: onnx.ModelProto, chosen: set[str], exact: float = 0.0, *, per_channel: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """The weights with a type of their own, as ONNX Runtime's quantizer takes them (`TensorQuantOverrides`).

    Those of depthwise convolutions are signed with all 8 bits: ONNX Runtime's kernel for them multiplies in 16 bits and
    adds up in 32, so that nothing saturates, and has no fast form for unsigned ones (measured on AVX2: a file of
    EfficientNet-Lite0 with these runs in 0.9 of the float file's time, with unsigned ones in 5 times that).

    Of the other weights those that suffer most from a bit less (by the energy of the rounding error beside their own)
    keep 8 bits and are unsigned, which is exact and slower. On EfficientNet-Lite0 half of the multiplications bring
    the cosine from 0.982 to 0.990, at 0.75 instead of 0.68 of the float file's time.

    Args:
        model: A prepared file.
        chosen: The names of the nodes to quantize.
        exact: The share of the multiplications, depthwise ones apart, that are to be exact.
        per_channel: One scale for each output channel.
    """
    from onnxruntime.quantization import QuantType

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = _sizes(model)
    found: dict[str, list[dict[str, Any]]] = {}
    products: dict[str, tuple[float, float, int]] = {}  # by weight: its error, its multiplications, its axis
    for node in model.graph.node:
        if node.name not in chosen or node.op_type not in _PRODUCTS or node.input[1] not in constants:
            continue
        weight: NDArray[Any] = numpy_helper.to_array(constants[node.input[1]])
        if is_depthwise(node, weight):
            found[node.input[1]] = [_typed(QuantType.QInt8, symmetric=True, axis=0 if per_channel else None)]
            continue
        axis = 0 if node.op_type == "Conv" or any(each.name == "transB" and each.i for each in node.attribute) else 1
        error, count, _ = products.get(node.input[1], (rounding_error(weight, axis), 0.0, axis))
        places = sizes.get(node.output[0], [])
        places = places[2:] if node.op_type == "Conv" else places[1:-1]  # the batch is the same for all
        products[node.input[1]] = error, count + weight.size * float(np.prod(places)), axis
    room = exact * sum(count for _, count, _ in products.values())
    for name, (_, count, axis) in sorted(products.items(), key=lambda item: -item[1][0]):
        if count <= room:
            room -= count
            found[name] = [_typed(QuantType.QUInt8, symmetric=False, axis=axis if per_channel else None)]
    return found


def is_depthwise(node: onnx.NodeProto, weight: NDArray[Any]) -> bool:
    """Whether a node is a convolution of each channel by itself."""
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1


def rounding_error(weight: NDArray[Any], axis: int) -> float:
    """The energy of the error of 7-bit weights, beside that of the weights.

    Example:
        >>> spread, spiky = np.array([[1.0, 0.9, 0.8]]), np.array([[1.0, 0.1, 0.1]])
        >>> rounding_error(spiky, 0) > rounding_error(spread, 0)
        True
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
    steps = np.abs(rows).max(1) / 64
    return float((steps**2).sum() / 12 * rows.shape[1] / max(float((rows**2).sum()), 1e-30))


def _typed(kind: Any, *, symmetric: bool, axis: int | None) -> dict[str, Any]:
    found = {"quant_type": kind, "symmetric": symmetric, "reduce_range": False}
    return found if axis is None else {"axis": axis, **found}


def _sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The sizes of the tensors; 1 for what is not known."""
    return {
        value.name: [size.dim_value or 1 for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.output)
    }
